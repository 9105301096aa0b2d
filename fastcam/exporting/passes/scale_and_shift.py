"""Merge per-channel Mul and Add."""

from __future__ import annotations

import numpy as np
import onnx

from ...graph import Graph, operator
from ..ops import ELEMENTWISE_OPS, Fact, op_row
from .affine import addition, multiplication, value_and_constant

_EPSILON = 1e-5


def join_scale_and_shift(graph: Graph) -> bool:
    """Add(Mul(x, scale), shift) -> BatchNormalization(x), where both have one number per channel.

    They come from a BatchNormalization that precedes its block. Runtimes compute the single op in one pass over the
    map, together with the activation that follows.

    Returns
    -------
    bool
        Whether anything changed.
    """
    changed = False
    order = _ChannelOrder(graph)
    for add in graph.nodes:
        if operator(add) == "Add":
            changed |= _join(graph, add, order)
    return changed


def _join(graph: Graph, add: onnx.NodeProto, order: _ChannelOrder) -> bool:
    scaled, _ = value_and_constant(graph, add)
    mul = graph.producer(scaled)
    if mul is None or operator(mul) != "Mul" or graph.only_reader(scaled) is None:
        return False
    shift, scale = addition(graph, add), multiplication(graph, mul)
    if shift is None or scale is None or not order.is_first(scale[0]):
        return False
    # The variance and the epsilon that is added to it make 1.
    row = np.ones_like(scale[1].scale)
    parameters = [scale[1].scale, shift[1].shift, 0 * row, row - _EPSILON]
    dtype, stem = graph.type(scaled).dtype, f"{add.output[0]}/normalization"
    names = [graph.emit_constant(array.astype(dtype), stem=stem) for array in parameters]
    graph.rewrite(add, "BatchNormalization", [scale[0], *names], epsilon=_EPSILON)
    graph.remove(mul)
    return True


class _ChannelOrder:
    """Whether values have their channels on axis 1, as the ops before them show; each value is looked at once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[str, bool] = {}

    def is_first(self, value: str) -> bool:
        """Return whether ``value`` comes, past ops that leave the axes alone, from one with its channels on axis 1."""
        passed = []
        while value not in self._known:
            passed.append(value)
            node = self._graph.producer(value)
            if node is None or operator(node) not in _TRANSPARENT:
                self._known[value] = node is not None and bool(op_row(operator(node)).facts & Fact.SPATIAL_FIRST)
                break
            value = next((name for name in node.input if self._graph.producer(name) is not None), "")
        self._known.update(dict.fromkeys(passed, self._known[value]))
        return self._known[value]


_TRANSPARENT = ELEMENTWISE_OPS | {"Concat", "Pad"}
