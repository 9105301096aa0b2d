"""A model prepared for export: imported, simplified, its outputs made a table of scores, its layers chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import LayerError
from ..graph import Graph, needed_nodes
from .importers import ImportedModel, ImportOptions, ModelSource, import_model
from .layers import branch_notes, choose_layer, find_value, list_candidates, put_on_map
from .passes.simplify import simplify
from .score_kinds import KINDS, Scored, ScoreRequest


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
    scores : Scored
        What is known of the table of scores.
    map_shapes : list of tuple of int
        Of each layer of a network for series or volumes, whose maps are laid out as planes: their shape.
    """

    graph: Graph
    imported: ImportedModel
    layers: list[str]
    candidates: list[str]
    score_activation: str
    scores: Scored
    map_shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)


# The name by which the end of a detector's backbone is asked for.
CONTEXT = "context"


def open_classifier(
    model: ModelSource,
    layers: Sequence[str | None],
    options: ImportOptions | None = None,
    grid: tuple[int, int] | None = None,
    request: ScoreRequest | None = None,
    *,
    wants_layers: bool = True,
) -> Classifier:
    """Import a model, clean it, make its outputs a table of scores, choose the layers; raises as `fastcam.export` does.

    A layer that is None is the kind's own choice, for classes the last one with a map. Without ``wants_layers`` none is
    chosen, and the model needs none.
    """
    request = request or ScoreRequest()
    imported = import_model(model, options)
    graph = imported.graph
    if request.names is None and imported.classes is not None:
        request = request._replace(names=len(imported.classes))
    # Looked up before the clean-up, which keeps the value but not all node names.
    asks_context = list(layers) == [CONTEXT] and request.kind == "boxes"
    asked = [
        find_value(graph, layer, imported.layers) if layer is not None and not asks_context else None
        for layer in layers
    ]
    simplify(graph, keep=[value for value in asked if value])
    scores = KINDS[request.kind](graph, request)
    imported.notes.extend(scores.notes)
    candidates = list_candidates(graph)
    if scores.end is not None:
        before = {name for node in needed_nodes(graph, [scores.end]) for name in node.output} - {scores.end}
        candidates = [name for name in candidates if name in before]
    if not wants_layers:
        return Classifier(graph, imported, [], candidates, scores.removed, scores)
    choose = scores.context if asks_context and scores.context is not None else scores.layers
    default = choose(graph, candidates) if not any(asked) else []
    if default:
        asked, layers = list(default), default
    elif asks_context:
        layers = [None]
    values = [choose_layer(graph, value, layer, grid) for value, layer in zip(asked, layers, strict=True)]
    _check_distinct(values, layers)
    imported.notes.extend(branch_notes(graph, values, candidates))
    shapes = [shape for value in values if (shape := put_on_map(graph, value, grid))]
    return Classifier(graph, imported, values, candidates, scores.removed, scores, shapes)


def _check_distinct(values: Sequence[str], layers: Sequence[str | None]) -> None:
    for position, value in enumerate(values):
        first = values.index(value)
        if first != position:
            raise LayerError(f"layers {layers[first]!r} and {layers[position]!r} are the same value: name it once")
