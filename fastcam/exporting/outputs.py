"""The outputs of an explained model, and the input `target`: nodes that are appended to the classifier's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ModelError
from ..graph import Graph, TensorType, static_dims
from ..metadata import IMAGE_GRADIENTS, LARGEST_BATCH, MAXIMUM_RANK, layer_outputs
from ..preprocessing import Layout
from .gradients.pooling import pooled_gradients
from .score_kinds import CLASSES, ScoreTable


class Asked(NamedTuple):
    """What is asked about the scores of an explained graph.

    Attributes
    ----------
    logits : str
        The table of scores, (N,M).
    table : ScoreTable
    targets : str
        The targets (N,K), existing ones where a class that does not exist is asked for.
    valid : str or None
        Which targets exist, bool (N,K); None where ONNX Runtime rejects runs with other targets.
    image : str
        The network's input.
    layout : {"NHWC", "NCHW"}
    grid : (int, int) or None
        Rows and columns of a transformer's patches, where the caller gave them.
    """

    logits: str
    table: ScoreTable
    targets: str
    valid: str | None
    image: str
    layout: Layout
    grid: tuple[int, int] | None = None

    def differentiate(self, graph: Graph, logits: str | None = None) -> tuple[str, str]:
        """Return a value, and the gradient of the targets' scores in it; of a copy of the table if one is named."""
        return _differentiate(graph, self.table, logits or self.logits, self.targets)


def add_explanation(
    graph: Graph,
    values: Sequence[str],
    *,
    full: bool,
    required: bool = False,
    table: ScoreTable = CLASSES,
    image: str | None = None,
) -> tuple[str, str | None]:
    """Add ``target`` and, for every layer, ``activations``, ``weights`` and, if asked, ``gradients`` to the graph.

    Parameters
    ----------
    graph : Graph
        Changed in place.
    values : sequence of str
        The explained layers.
    full : bool
        Whether to add ``gradients``.
    required : bool
        Whether every run must be given ``target``. A class that does not exist then fails alone: its entry of
        ``targets`` is -1, its weights and gradients are NaN.
    table : ScoreTable
        How the scores are ranked, differentiated and described.
    image : str, optional
        The input whose gradients become the output ``image_gradients``.

    Returns
    -------
    targets : str
    valid : str or None
        See `Asked`.
    """
    scores = graph.outputs[0]
    for name in (scores, *values):
        if graph.type(name).dtype != np.float32:
            raise ModelError(f"value {name!r} is {graph.type(name).dtype}: fastcam explains float32 networks")
    names = [layer_outputs(position) for position in range(len(values))]
    logits, *explained = graph.outputs = _rename_all(graph, [scores, *values], forward_outputs(values))
    chosen, valid = _add_targets(graph, logits, table, required=required)
    if not values:
        return chosen, valid
    local = table.localize(graph, chosen, explained)
    if local is None:
        pooled, whole = _everywhere(graph, logits, table, chosen, explained, explained if full else (), image)
    else:
        pooled, whole = _pooled(graph, local)
        if image is not None:
            whole += _everywhere(graph, logits, table, chosen, (), (), image)[1]
    for output, gradient in zip(names, pooled, strict=True):
        name_output(graph, only_valid(graph, gradient, valid, axes=[2]), output.weights)
    for output, gradient in zip(names, whole if full else (), strict=False):
        name_output(graph, only_valid(graph, gradient, valid, axes=[2, 3, 4]), output.gradients)
    if image is not None:
        name_output(graph, only_valid(graph, whole[-1], valid, axes=[2, 3, 4]), IMAGE_GRADIENTS)
    return chosen, valid


def _everywhere(
    graph: Graph,
    logits: str,
    table: ScoreTable,
    targets: str,
    pooled: Sequence[str],
    full: Sequence[str],
    image: str | None,
) -> tuple[list[str], list[str]]:
    """Return pooled gradients (N,K,C), and full ones (N,K,C,h,w), that of the image last, by one reverse pass."""
    value, gradient = _differentiate(graph, table, logits, targets)
    whole = [*full, image] if image is not None else full
    # Not the same name: the file format gives it to one of them.
    stems = [IMAGE_GRADIENTS if name == image else "gradients" for name in whole]
    means, gradients = pooled_gradients(graph, {value: gradient}, pooled, whole)
    return (
        [graph.emit("Transpose", one, perm=[1, 0, 2], stem="weights") for one in means],
        [
            graph.emit("Transpose", one, perm=[1, 0, 2, 3, 4], stem=stem)
            for one, stem in zip(gradients, stems, strict=True)
        ],
    )


def _differentiate(graph: Graph, table: ScoreTable, logits: str, targets: str) -> tuple[str, str]:
    by_target = graph.emit("Transpose", targets, perm=[1, 0], stem="target/by_target")
    return table.differentiate(graph, logits, by_target)


def _pooled(graph: Graph, whole: list[str]) -> tuple[list[str], list[str]]:
    axes = graph.emit_integers(3, 4)
    return [graph.emit("ReduceMean", one, axes, keepdims=0, stem="weights") for one in whole], whole


def only_valid(graph: Graph, value: str, valid: str | None, axes: Sequence[int]) -> str:
    """Return ``value``, or NaN where its target is not valid."""
    if valid is None:
        return value
    condition = graph.emit("Unsqueeze", valid, graph.emit_constant(np.array(axes, np.int64)))
    return graph.emit("Where", condition, value, graph.emit_number(np.nan))


def forward_outputs(layers: Sequence[str]) -> list[str]:
    """Return the outputs that the network computes without gradients."""
    return ["logits", *(layer_outputs(position).activations for position in range(len(layers)))]


def _rename_all(graph: Graph, values: Sequence[str], names: Sequence[str]) -> list[str]:
    """Give the values these names, renaming other values that have them; one may have another one's new name."""
    passing = [graph.unused_name("explained") for _ in values]
    for value, name in zip(values, passing, strict=True):
        graph.rename(value, name)
    for value, name in zip(passing, names, strict=True):
        reserve(graph, name)
        graph.rename(value, name)
    return list(names)


def name_output(graph: Graph, value: str, name: str) -> str:
    """Make ``value`` an output called ``name``, renaming another value that has the name."""
    if value != name:
        reserve(graph, name)
        graph.rename(value, name)
    graph.outputs = [*(output for output in graph.outputs if output != name), name]
    return name


def reserve(graph: Graph, name: str) -> None:
    """Free a name that the file format defines."""
    if name in graph.inputs:
        raise ModelError(f"the model's input is called {name!r}, a name that explained models use: rename it")
    graph.rename(name, graph.unused_name(f"model/{name}"))


def _add_targets(graph: Graph, logits: str, table: ScoreTable, *, required: bool) -> tuple[str, str | None]:
    """Add the input ``target``, the output ``targets``, and those that describe the targets.

    Returns
    -------
    chosen : str
        The targets (N,K), existing ones where the output holds -1 for others.
    valid : str or None
        Which targets exist, bool (N,K); None where ONNX Runtime rejects runs with other targets.
    """
    reserve(graph, "target")
    batch = graph.type(logits).shape[0]
    if isinstance(batch, int) and batch > LARGEST_BATCH:
        raise ModelError(f"the model takes batches of exactly {batch} images: export it with a dynamic batch")
    # One row for all images; with a fixed batch size, runtimes want that many rows.
    graph.inputs["target"] = TensorType(np.dtype(np.int64), (batch, "targets"))
    if not required:
        graph.defaults["target"] = np.full((batch if isinstance(batch, int) else 1, 1), -1, np.int64)
    target, valid = _clamped(graph, logits) if required else ("target", None)
    if table is not CLASSES:
        target = _for_each_image(graph, logits, target)
    absent = graph.emit("Less", target, graph.emit_integer(0), stem="target/absent")
    chosen = graph.emit("Where", absent, _ranked(graph, logits, table, target), target, stem="targets")
    shown = chosen
    if valid is not None:
        shown = graph.emit("Where", valid, chosen, graph.emit_integer(-1), stem="target/shown")
    name_output(graph, shown, "targets")
    chosen = "targets" if valid is None else chosen
    for name, description in zip(table.outputs, table.describe(graph, logits, chosen), strict=True):
        name_output(graph, description, name)
    return chosen, valid


def _clamped(graph: Graph, logits: str) -> tuple[str, str]:
    """Return ``target`` clipped to existing classes and ranks, and where clipping changes nothing."""
    (classes,) = static_dims(graph, logits, [1])
    lowest, highest = (graph.emit_integer(n) for n in (-min(classes, MAXIMUM_RANK), classes - 1))
    at_least = graph.emit("Max", "target", lowest, stem="target/at_least")
    clamped = graph.emit("Min", at_least, highest, stem="target/clamped")
    return clamped, graph.emit("Equal", clamped, "target", stem="target/valid")


def _ranked(graph: Graph, logits: str, table: ScoreTable, target: str) -> str:
    """Return the class of rank -target for every image, (N,K): -1 is the top class, -2 the second."""
    best = table.rank(graph, logits)
    from_zero = graph.emit("Sub", graph.emit_integer(-1), target, stem="target/rank")
    # Where a class is given, the rank is unused but has to be valid.
    rank = graph.emit("Max", from_zero, graph.emit_integer(0), stem="target/valid_rank")
    each = _for_each_image(graph, logits, rank)
    return graph.emit("GatherElements", best, each, axis=1, stem="target/ranked")


def _for_each_image(graph: Graph, logits: str, value: str) -> str:
    """Repeat a single row (1,K) for every image.

    ONNX Runtime reuses the memory of values that have the same declared shape; ``target`` is declared (N,K), and one
    row is allowed: tables whose entries are looked up need all rows at once.
    """
    rows = graph.emit("Shape", logits, start=0, end=1, stem="target/images")
    shape = graph.emit("Concat", rows, graph.emit_integers(1), axis=0, stem="target/shape")
    return graph.emit("Expand", value, shape, stem="target/ranks")
