"""Read what torch's exporter writes for ``as_strided``: a Gather from the flattened tensor, by computed positions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx

from ...arrays import Array
from ...graph import Graph, attribute, operator
from .each import rewrite_each
from .reshapes import open_length, row_size


class _Positions(NamedTuple):
    """Positions ``step * i + offsets``, where i counts along the first axis.

    Attributes
    ----------
    step : int
    offsets : ndarray
        int64; the first axis has length 1 where ``step`` is not 0.
    """

    step: int
    offsets: Array


def read_strided_copies(graph: Graph) -> bool:
    """Gather(Reshape(x, [-1]), row * i + offsets) -> x, its rows reordered by a constant and reshaped.

    That is how torch changes the memory layout of a tensor. Positions may depend on the batch size; each image must
    read its own row.

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "Gather", _read)


def _read(graph: Graph, node: onnx.NodeProto) -> bool:
    if attribute(node, "axis", 0) != 0 or node.input[1] in graph.constants:
        return False
    flat = graph.producer(node.input[0])
    if flat is None or operator(flat) != "Reshape" or graph.rank(flat.output[0]) != 1:
        return False
    source = flat.input[0]
    row = row_size(graph.shape(source)) if graph.rank(source) is not None else None
    positions = _positions(graph, node.input[1])
    if row is None or positions is None or positions.step != row or positions.offsets.shape[:1] != (1,):
        return False
    order = positions.offsets.reshape(-1)
    if order.min() < 0 or order.max() >= row:
        return False
    shape = graph.emit_constant(np.array([0, *positions.offsets.shape[1:]], np.int64), stem="shape")
    if not np.array_equal(order, np.arange(row)):
        rows = graph.emit("Reshape", source, graph.emit_constant(np.array([0, row], np.int64)), stem="strided/rows")
        source = graph.emit("Gather", rows, graph.emit_constant(order), axis=1, stem="strided/ordered")
    graph.rewrite(node, "Reshape", [source, shape])
    return True


def _positions(graph: Graph, value: str) -> _Positions | None:
    """Return what an arithmetic expression of positions computes, or None if it is not of that form."""
    constant = graph.constants.get(value)
    if constant is not None:
        return _Positions(0, np.asarray(constant, np.int64)) if constant.dtype.kind == "i" else None
    node = graph.producer(value)
    if node is None:
        return None
    if operator(node) == "Range":
        return _counted(graph, node)
    known = [_positions(graph, name) for name in node.input]
    parts = [part for part in known if part is not None]
    if not parts or len(parts) != len(known) or (operator(node) not in _STEPS):
        return None
    return _STEPS[operator(node)](parts)


def _counted(graph: Graph, node: onnx.NodeProto) -> _Positions | None:
    start, limit, delta = node.input
    bounds = [graph.constants.get(name) for name in (start, delta)]
    if any(bound is None for bound in bounds) or [int(bound.item()) for bound in bounds if bound is not None] != [0, 1]:
        return None
    return _Positions(1, np.zeros(1, np.int64)) if open_length(graph, limit) else None


def _sum(parts: list[_Positions]) -> _Positions | None:
    return _Positions(sum(part.step for part in parts), np.asarray(parts[0].offsets + parts[1].offsets))


def _product(parts: list[_Positions]) -> _Positions | None:
    factor = next((part for part in parts if not part.step and part.offsets.size == 1), None)
    other = next((part for part in parts if part is not factor), None)
    if factor is None or other is None:
        return None
    number = int(factor.offsets.item())
    return _Positions(number * other.step, number * other.offsets)


def _unsqueezed(parts: list[_Positions]) -> _Positions | None:
    values, axes = parts[0], [int(axis) for axis in parts[1].offsets.reshape(-1)]
    # The images must stay on the first axis.
    if values.step and not all(axis > 0 for axis in axes):
        return None
    return _Positions(values.step, np.expand_dims(values.offsets, tuple(axes)))


_STEPS = {"Add": _sum, "Mul": _product, "Unsqueeze": _unsqueezed}
