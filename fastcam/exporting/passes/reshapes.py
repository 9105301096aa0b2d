"""Give every Reshape a constant target shape."""

from __future__ import annotations

import math

import numpy as np
import onnx

from ...arrays import Array
from ...batch_sizes import factored, is_multiple, multiple_of
from ...graph import Dim, Graph, attribute, operator
from .each import rewrite_each


def settle_reshapes(graph: Graph) -> bool:
    """Reshape(x, computed) -> Reshape(x, constant), wherever at most one dimension is open; the batch remains dynamic.

    The arithmetic that computed the target is then no longer read. A Reshape of one number, as torch's exporter puts
    between a batch size and the shape that holds it, becomes an Unsqueeze, through which ONNX follows sizes.

    Returns
    -------
    bool
        Whether any target became constant.
    """
    return rewrite_each(graph, "Reshape", _settle)


def _settle(graph: Graph, node: onnx.NodeProto) -> bool:
    if graph.rank(node.input[0]) is None or graph.rank(node.output[0]) is None:
        return False
    if graph.shape(node.input[0]) == () and graph.rank(node.output[0]) == 1:
        graph.rewrite(node, "Unsqueeze", [node.input[0], graph.emit_integers(0)])
        return True
    target = _reshape_target(graph.shape(node.input[0]), graph.shape(node.output[0]))
    target = _target_behind_batch(graph, node) if target is None else target
    if target is None:
        return False
    computed = node.input[1] not in graph.constants
    graph.set_input(node, 1, graph.emit_constant(target, stem="shape"))
    # allowzero would turn the 0 that keeps the batch into a size of 0.
    graph.set_attributes(node, allowzero=None)
    return computed


def _reshape_target(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> Array | None:
    """Return a constant target of Reshape: 0 keeps the batch if the rows stay intact, -1 is the open axis."""
    rows = [row_size(shape) for shape in (before, after)]
    if rows[0] is not None and rows[0] == rows[1]:
        return np.array([0, *after[1:]], np.int64)
    if sum(not isinstance(size, int) for size in after) <= 1:
        return np.array([size if isinstance(size, int) else -1 for size in after], np.int64)
    return None


def _target_behind_batch(graph: Graph, node: onnx.NodeProto) -> Array | None:
    """Return a constant target for Concat(batch, constants), one of which may be -1: as `x.view(len(x), 8, -1)` is."""
    before = graph.shape(node.input[0])
    row, joined = row_size(before), graph.producer(node.input[1])
    if row is None or joined is None or operator(joined) != "Concat" or not isinstance(before[0], str):
        return None
    constants = [graph.constants.get(name) for name in joined.input[1:]]
    length = open_length(graph, joined.input[0])
    if any(array is None for array in constants) or length is None:
        return None
    (times, name), (rows, other) = factored(before[0]), factored(length)
    if name != other or times * row % rows:
        return None
    # Elements behind each of the target's rows.
    row = times * row // rows
    sizes = [int(size) for array in constants for size in np.asarray(array).reshape(-1)]
    known = math.prod(size for size in sizes if size > 0)
    if known and sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = row // known
    keeps = 0 if times == rows else -1
    return np.array([keeps, *sizes], np.int64) if min(sizes, default=0) > 0 and math.prod(sizes) == row else None


def open_length(graph: Graph, value: str) -> str | None:
    """Return the name of the open size that a value is: the first size of some shape, or a multiple of that."""
    node, times = graph.producer(value), 1
    while node is not None and operator(node) in ("Cast", "Identity", "Mul", "Reshape", "Squeeze", "Unsqueeze"):
        following = node.input[0]
        if operator(node) == "Mul":
            factors = [name for name in node.input if name in graph.constants]
            if len(factors) != 1 or graph.constants[factors[0]].size != 1:
                return None
            times *= int(graph.constants[factors[0]].item())
            following = next(name for name in node.input if name not in factors)
        node = graph.producer(following)
    is_first = node is not None and attribute(node, "end") == 1
    if node is not None and operator(node) == "Gather":
        index = graph.constants.get(node.input[1])
        is_first = index is not None and index.size == 1 and index.item() == 0
        node = graph.producer(node.input[0])
    if node is None or not is_first or operator(node) != "Shape" or attribute(node, "start", 0) != 0:
        return None
    length = graph.shape(node.input[0])[0] if graph.rank(node.input[0]) else None
    return multiple_of(length, times) if isinstance(length, str) and (times == 1 or not is_multiple(length)) else None


def row_size(shape: tuple[Dim, ...]) -> int | None:
    """Return the number of elements per row of the first axis, or None if an axis is open or there are no axes."""
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    return math.prod(sizes) if shape and len(sizes) == len(shape) - 1 else None
