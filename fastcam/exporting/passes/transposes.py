"""Sink transposes towards the outputs, until they cancel."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper

from ...graph import Graph, attribute, operator
from ..ops import ELEMENTWISE_OPS

# Maps the output of every Transpose to its input and its permutation.
Orders: TypeAlias = "dict[str, tuple[str, tuple[int, ...]]]"


def sink_transposes(graph: Graph, fixed: Collection[str] = ()) -> bool:
    """op(Transpose(x)) -> Transpose(op(x)), for element-wise ops and reductions; drop pairs that cancel.

    TensorFlow's graphs have their channels last, ONNX's convolutions first: there is a Transpose on either side of
    every Conv, and ops between two of them then work in the order of axes that the Conv uses. A value keeps its name
    and takes the new order; the values named in ``fixed`` keep their order too.

    Returns
    -------
    bool
        Whether anything changed.
    """
    orders: Orders = {}
    changed = False
    for node in graph.nodes:
        sink = _SINKS.get(operator(node)) if len(node.output) == 1 else None
        order = sink(graph, node, orders) if sink and node.output[0] not in fixed else None
        if order is not None:
            changed = True
            _restore_order(graph, node, order, orders)
        elif operator(node) == "Transpose":
            orders[node.output[0]] = (node.input[0], _permutation(graph, node))
    return changed


def _restore_order(graph: Graph, node: onnx.NodeProto, order: tuple[int, ...], orders: Orders) -> None:
    """Let the readers of a node that now works in a different order of axes read a Transpose of its output."""
    if order == tuple(range(len(order))):
        return
    value = node.output[0]
    transposed = graph.unused_name(f"{value}/transposed")
    graph.replace_uses(value, transposed, outputs=False)
    graph.insert_after(node, helper.make_node("Transpose", [value], [transposed], name=transposed, perm=order))
    orders[transposed] = (value, order)


def _sink_elementwise(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    """Work on the untransposed inputs, if all are constant or transposed alike; return the order to restore."""
    known = {orders[name][1] for name in node.input if name in orders}
    if len(known) != 1:
        return None
    (order,) = known
    constants = [name for name in node.input if name and name not in orders]
    if any(name not in graph.constants or graph.constants[name].ndim > len(order) for name in constants):
        return None
    for index, name in enumerate(node.input):
        if name in orders:
            graph.set_input(node, index, orders[name][0])
        elif name and graph.constants[name].ndim:
            graph.set_input(node, index, _moved_constant(graph, name, order))
    return order


def _moved_constant(graph: Graph, name: str, order: tuple[int, ...]) -> str:
    array = graph.constants[name]
    full = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
    return graph.emit_constant(np.ascontiguousarray(full.transpose(np.argsort(order))), stem=name)


def _sink_transpose(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    """Merge two in a row: the second then reads what the first read."""
    if node.input[0] not in orders:
        return None
    source, first = orders[node.input[0]]
    joined = tuple(first[axis] for axis in attribute(node, "perm") or range(len(first))[::-1])
    graph.set_input(node, 0, source)
    graph.set_attributes(node, perm=joined)
    return None


def _sink_reduction(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if node.input[0] not in orders or axes is None or not axes.size:
        return None
    source, order = orders[node.input[0]]
    reduced = sorted(order[int(axis)] for axis in axes)
    graph.set_input(node, 0, source)
    graph.set_input(node, 1, graph.emit_constant(np.array(reduced, np.int64), stem="axes"))
    if attribute(node, "keepdims", 1):
        return order
    left = [axis for axis in range(len(order)) if axis not in reduced]
    return tuple(left.index(axis) for axis in order if axis in left)


def _sink_pad(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    pads = graph.constants.get(node.input[1])
    if node.input[0] not in orders or pads is None or (len(node.input) > 3 and node.input[3]):
        return None
    source, order = orders[node.input[0]]
    moved = pads.reshape(2, -1)[:, np.argsort(order)].reshape(-1)
    graph.set_input(node, 0, source)
    graph.set_input(node, 1, graph.emit_constant(np.ascontiguousarray(moved), stem="pads"))
    return order


def _sink_slice(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    axes = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    if node.input[0] not in orders or axes is None:
        return None
    source, order = orders[node.input[0]]
    moved = np.array([order[int(axis)] for axis in axes], np.int64)
    graph.set_input(node, 0, source)
    graph.set_input(node, 3, graph.emit_constant(moved, stem="axes"))
    return order


def _sink_concat(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    known = {orders[name][1] for name in node.input if name in orders}
    if len(known) != 1 or not all(name in orders for name in node.input):
        return None
    (order,) = known
    graph.set_inputs(node, [orders[name][0] for name in node.input])
    graph.set_attributes(node, axis=order[attribute(node, "axis")])
    return order


def _sink_reshape(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    if node.input[0] in orders:
        source, order = orders[node.input[0]]
        # The shape is known in one of the two orders; for the number of axes it does not matter which.
        moves_ones = graph.rank(source) and sum(size != 1 for size in graph.shape(source)[1:]) <= 1
        target = graph.constants.get(node.input[1])
        if moves_ones and order[0] == 0 and target is not None and target[1:].all():
            graph.set_input(node, 0, source)
            return None
    return _sink_gate(graph, node, orders)


def _sink_gate(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    """(N,C) or (N,C,1,1) to (N,1,1,C), as in squeeze-and-excitation: make it (N,C,1,1), to be transposed."""
    if graph.rank(node.input[0]) not in (2, 4) or graph.rank(node.output[0]) != 4:
        return None
    _, channels, *rest = graph.shape(node.input[0])
    if not isinstance(channels, int) or graph.shape(node.output[0])[1:] != (1, 1, channels) or rest not in ([], [1, 1]):
        return None
    graph.set_input(node, 1, graph.emit_constant(np.array([0, channels, 1, 1], np.int64), stem="shape"))
    return (0, 2, 3, 1)


_SINKS: dict[str, Callable[[Graph, onnx.NodeProto, Orders], tuple[int, ...] | None]] = {
    **dict.fromkeys(ELEMENTWISE_OPS, _sink_elementwise),
    "Transpose": _sink_transpose,
    "ReduceMean": _sink_reduction,
    "ReduceSum": _sink_reduction,
    "ReduceMax": _sink_reduction,
    "Pad": _sink_pad,
    "Slice": _sink_slice,
    "Concat": _sink_concat,
    "Reshape": _sink_reshape,
}


def _permutation(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    given = attribute(node, "perm")
    return tuple(given) if given else tuple(range(len(graph.shape(node.input[0]))))[::-1]
