"""Drop nodes that pass their input through."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import helper

from ...graph import Graph, attribute, operator

# However exporters write "to the end", it is at least this.
_OPEN_END = 2**31 - 1


def drop_no_ops(graph: Graph) -> bool:
    """op(x) -> x, for nodes that return their first input unchanged.

    Returns
    -------
    bool
        Whether anything was dropped.
    """
    sources: dict[str, str] = {}
    for node in graph.nodes:
        passes_through = _RULES.get(operator(node))
        if passes_through and passes_through(graph, node) and node.output[0] not in graph.outputs:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
            graph.remove(node)
    graph.replace_all_uses(sources)
    return bool(sources)


def _always(graph: Graph, node: onnx.NodeProto) -> bool:
    return True


def _dropout(graph: Graph, node: onnx.NodeProto) -> bool:
    return len([name for name in node.output if name]) == 1 and not _trains(node, graph)


def _trains(node: onnx.NodeProto, graph: Graph) -> bool:
    """A Dropout whose training_mode input is, or may be, true."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    mode = graph.constants.get(node.input[2])
    return mode is None or bool(mode.any())


def _cast(graph: Graph, node: onnx.NodeProto) -> bool:
    dtype = graph.dtype(node.input[0])
    return dtype is not None and bool(helper.np_dtype_to_tensor_dtype(dtype) == attribute(node, "to"))


def _transpose(graph: Graph, node: onnx.NodeProto) -> bool:
    order = attribute(node, "perm", [])
    return bool(order) and bool(order == sorted(order))


def _same_shape(graph: Graph, node: onnx.NodeProto) -> bool:
    """Equal along every axis, open ones by name."""
    if graph.rank(node.input[0]) is None or graph.rank(node.output[0]) is None:
        return False
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return before == after and None not in before


def _slice(graph: Graph, node: onnx.NodeProto) -> bool:
    """Every sliced axis is taken from its first element to its last, one by one."""
    rank = graph.rank(node.input[0])
    given = [graph.constants.get(name) for name in node.input[1:] if name]
    if rank is None or len(given) < 2 or any(array is None for array in given):
        return False
    starts, ends, *rest = ([int(number) for number in array.reshape(-1)] for array in given if array is not None)
    has_axes = len(node.input) > 3 and bool(node.input[3])
    axes = rest[0] if has_axes else list(range(len(starts)))
    steps = rest[-1] if len(rest) > has_axes else [1] * len(starts)
    sizes = graph.shape(node.input[0])
    return all(
        step == 1 and start == 0 and (end >= _OPEN_END or (isinstance(size := sizes[axis], int) and end >= size))
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )


def _one_input(graph: Graph, node: onnx.NodeProto) -> bool:
    return len(node.input) == 1


_RULES: dict[str, Callable[[Graph, onnx.NodeProto], bool]] = {
    "Cast": _cast,
    "Concat": _one_input,
    "Dropout": _dropout,
    "Expand": _same_shape,
    "Identity": _always,
    "Reshape": _same_shape,
    "Slice": _slice,
    "Sum": _one_input,
    "Transpose": _transpose,
}
