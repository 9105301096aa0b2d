"""A model prepared for export: imported, simplified, its score activation removed, its layers chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import LayerError
from ..graph import Graph
from .importers import ImportedModel, ImportOptions, ModelSource, import_model
from .layers import branch_notes, choose_layer, find_value, list_candidates, put_on_map
from .passes.open_batch import open_batch
from .passes.simplify import simplify
from .scores import remove_score_activation


@dataclasses.dataclass
class Classifier:
    """A classifier prepared for export.

    Attributes
    ----------
    graph : Graph
        Image -> logits, simplified.
    imported : ImportedModel
        Where it came from.
    layers : list of str
        The explained values, (N,C,h,w).
    candidates : list of str
        Values that could be explained, from the last to the first.
    score_activation : str
        What was removed after the scores, as `scores.remove_score_activation` returns it.
    """

    graph: Graph
    imported: ImportedModel
    layers: list[str]
    candidates: list[str]
    score_activation: str


def open_classifier(
    model: ModelSource,
    layers: Sequence[str | None],
    options: ImportOptions | None = None,
    grid: tuple[int, int] | None = None,
) -> Classifier:
    """Import a model, clean it, remove its score activation and choose the layers; raises as `fastcam.export` does.

    A layer that is None is the last one with a map.
    """
    imported = import_model(model, options)
    graph = imported.graph
    # Looked up before the clean-up, which keeps the value but not all node names.
    asked = [find_value(graph, layer, imported.layers) if layer is not None else None for layer in layers]
    simplify(graph, keep=[value for value in asked if value])
    note = open_batch(graph)
    imported.notes.extend([note] if note else [])
    score_activation = remove_score_activation(graph)
    candidates = list_candidates(graph)
    values = [choose_layer(graph, value, layer, grid) for value, layer in zip(asked, layers, strict=True)]
    _check_distinct(values, layers)
    imported.notes.extend(branch_notes(graph, values, candidates))
    for value in values:
        put_on_map(graph, value, grid)
    return Classifier(graph, imported, values, candidates, score_activation)


def _check_distinct(values: Sequence[str], layers: Sequence[str | None]) -> None:
    for position, value in enumerate(values):
        first = values.index(value)
        if first != position:
            raise LayerError(f"layers {layers[first]!r} and {layers[position]!r} are the same value: name it once")
