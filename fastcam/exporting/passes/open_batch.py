"""Make a fixed batch dynamic, where every op treats its images independently.

Exporters often write the batch size that they traced with, usually 1, into the file. It can be opened when no op
mixes rows of axis 0, no constant has a row for every image, and no shape depends on their number.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from ...arrays import Array
from ...errors import ModelError
from ...graph import Graph, TensorType, attribute, dependents, operator
from ...notes import Note
from ..importers.imported import BATCH
from ..ops import Rows, op_row


def open_batch(graph: Graph) -> Note | None:
    """Make a fixed batch dynamic if that is sound.

    Parameters
    ----------
    graph : Graph
        Simplified: shape arithmetic folded. Changed in place.

    Returns
    -------
    Note or None
        What was done, or why nothing was; None if the batch was already dynamic.
    """
    image, type_ = next(iter(graph.inputs.items()))
    size = type_.shape[0]
    if not isinstance(size, int):
        return None
    inputs = {image: TensorType(type_.dtype, (BATCH, *type_.shape[1:]))}
    # The known types of outputs would be mistaken for their declaration.
    types = {name: known for name, known in graph.types.items() if name not in graph.outputs}
    opened = graph.copy(inputs=inputs, types=types)
    try:
        opened.infer_types()
    except ModelError:
        return Note(
            "batch", f"The batch is fixed at {size}: with an open one, the model's shapes contradict each other."
        )
    obstacle = _first_obstacle(opened, image)
    if obstacle is not None:
        return Note("batch", f"The batch is fixed at {size}: {obstacle}.")
    graph.inputs, graph.types = opened.inputs, opened.types
    return Note("batch", f"The batch was fixed at {size} and is open now: no op mixes images.")


def _first_obstacle(graph: Graph, image: str) -> str | None:
    """Return a message naming the node that prevents a dynamic batch."""
    nodes = dependents(graph, image)
    rows = {image} | {output for node in nodes for output in node.output if output}
    for node in nodes:
        keeps_rows = _row_rule(operator(node))
        name = f"op {node.op_type!r} (node {node.name or node.output[0]!r})"
        if keeps_rows is None:
            return f"{name} is not known to treat images one by one"
        if not all(_has_open_rows(graph, output) for output in node.output if output):
            return f"{name} does not give one row per image"
        if not keeps_rows(graph, node, rows):
            return f"{name} mixes images, or has one constant per image"
    return None


def _has_open_rows(graph: Graph, value: str) -> bool:
    if not graph.rank(value):
        return False
    batch, *rest = graph.shape(value)
    return batch == BATCH and all(isinstance(size, int) for size in rest)


RowRule = Callable[[Graph, onnx.NodeProto, "set[str]"], bool]


def _elementwise(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    """Rows meet rows of the same image: all images are on axis 0 of the output, and constants have no rows."""
    rank = graph.rank(node.output[0])
    return all(
        graph.rank(name) == rank if name in rows else _has_no_rows(graph, name, rank) for name in node.input if name
    )


def _has_no_rows(graph: Graph, name: str, rank: int | None) -> bool:
    own = graph.rank(name)
    return own is not None and rank is not None and (own < rank or (own == rank and graph.shape(name)[0] == 1))


def _first_input_only(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    return node.input[0] in rows and not rows.intersection(node.input[1:])


def _along(default: int | None) -> RowRule:
    """Return the rule of ops that work along the attribute ``axis``."""

    def keeps_rows(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
        axis = attribute(node, "axis", default)
        return _first_input_only(graph, node, rows) and axis % _rank(graph, node) != 0

    return keeps_rows


def _rank(graph: Graph, node: onnx.NodeProto) -> int:
    return graph.rank(node.input[0]) or 1


def _concat(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    return rows.issuperset(node.input) and attribute(node, "axis") % _rank(graph, node) != 0


def _over_axes(position: int) -> RowRule:
    """Return the rule of ops whose input number ``position`` lists the axes."""

    def keeps_rows(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
        axes = _constant(graph, node, position)
        if not _first_input_only(graph, node, rows) or axes is None or not axes.size:
            return False
        rank = max(_rank(graph, node), graph.rank(node.output[0]) or 1)
        return all(int(axis) % rank != 0 for axis in axes)

    return keeps_rows


def _constant(graph: Graph, node: onnx.NodeProto, position: int) -> Array | None:
    return graph.constants.get(node.input[position]) if len(node.input) > position else None


def _transpose(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    return bool(attribute(node, "perm", [1])[0] == 0)


def _reshape(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    target = _constant(graph, node, 1)
    return target is not None and target[0] == 0 and not attribute(node, "allowzero", 0)


def _flatten(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    return bool(attribute(node, "axis", 1) == 1)


def _first_is(position: int, neutral: int) -> RowRule:
    """Return the rule of ops whose constant input ``position`` has one number per axis, ``neutral`` for no change."""

    def keeps_rows(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
        numbers = _constant(graph, node, position)
        return numbers is not None and numbers.size == graph.rank(node.input[0]) and numbers.reshape(-1)[0] == neutral

    return keeps_rows


def _pad(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    pads = _constant(graph, node, 1)
    if pads is None or (len(node.input) > 3 and node.input[3]):
        return False
    return not pads.reshape(2, -1)[:, 0].any()


def _resize(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    axes = attribute(node, "axes")
    return bool(axes and 0 not in axes) or _first_is(2, 1)(graph, node, rows)


def _matmul(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    """Images are rows of one matrix, or each has its own matrices."""
    left, right = node.input
    ranks = {name: graph.rank(name) or 0 for name in node.input}
    if left in rows and right in rows:
        return ranks[left] == ranks[right] > 2
    if left in rows:
        return ranks[right] == 2 or (ranks[left] > 2 and _has_no_rows(graph, right, ranks[left]))
    return ranks[right] > 2 and ranks[left] == 2


def _gemm(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    bias = [name for name in node.input[2:] if name]
    return (
        _first_input_only(graph, node, rows)
        and not attribute(node, "transA", 0)
        and all(_has_no_rows(graph, name, 2) for name in bias)
    )


def _batch_normalization(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    """In training mode it uses the statistics of the batch."""
    return _first_input_only(graph, node, rows) and not attribute(node, "training_mode", 0)


def _quantization(graph: Graph, node: onnx.NodeProto, rows: set[str]) -> bool:
    """One scale for the tensor, or one per channel."""
    per_tensor = graph.rank(node.input[1]) == 0
    return _first_input_only(graph, node, rows) and (per_tensor or attribute(node, "axis", 1) % _rank(graph, node) != 0)


def _row_rule(op: str) -> RowRule | None:
    """Return the rule of an op: from its row in the table of ops, or its own."""
    return _RULES.get(op_row(op).rows) or _RULES_BY_OP.get(op)


_RULES: dict[Rows, RowRule] = {
    Rows.ELEMENTWISE: _elementwise,
    Rows.OWN_ROWS: _first_input_only,
    Rows.ALONG_FIRST: _along(0),
    Rows.ALONG_LAST: _along(-1),
    Rows.OVER_AXES: _over_axes(1),
    Rows.OVER_SLICED_AXES: _over_axes(3),
}

_RULES_BY_OP: dict[str, RowRule] = {
    "BatchNormalization": _batch_normalization,
    "QuantizeLinear": _quantization,
    "DequantizeLinear": _quantization,
    "Concat": _concat,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _first_is(1, 1),
    "Tile": _first_is(1, 1),
    "Pad": _pad,
    "Resize": _resize,
    "MatMul": _matmul,
    "Gemm": _gemm,
}
