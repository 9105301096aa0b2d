"""Ops that the sum of a gradient over the map passes through unchanged: the table behind `pooling`.

The gradient of a MaxPool window goes to one of its inputs, however the windows overlap or are padded; that of an
average is distributed in shares that add up to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx

from ...graph import Graph, attribute

# The axes of a value, a permutation of "NCHW" or, without its map, of "NC".
Axes: TypeAlias = str
# Returns the layout behind a node, or None if the sum has to be taken before it.
PushRule: TypeAlias = "Callable[[Graph, onnx.NodeProto, Axes], Axes | None]"


def _keeps_layout(graph: Graph, node: onnx.NodeProto, layout: Axes) -> Axes | None:
    return layout


def _pooling_keeps_layout(graph: Graph, node: onnx.NodeProto, layout: Axes) -> Axes | None:
    return layout if layout == "NCHW" else None


def _average_keeps_sum(graph: Graph, node: onnx.NodeProto, layout: Axes) -> Axes | None:
    """Every window distributes its gradient completely, unless a share of it falls on padding."""
    counts_padding = attribute(node, "count_include_pad", 0)
    padded = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")
    return None if counts_padding and padded else _pooling_keeps_layout(graph, node, layout)


def _mean_over_map(graph: Graph, node: onnx.NodeProto, layout: Axes) -> Axes | None:
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if axes is None or {layout[int(axis)] for axis in axes} != {"H", "W"}:
        return None
    return layout if attribute(node, "keepdims", 1) else layout.replace("H", "").replace("W", "")


def _permuted(graph: Graph, node: onnx.NodeProto, layout: Axes) -> Axes | None:
    return "".join(layout[axis] for axis in attribute(node, "perm", list(range(len(layout)))[::-1]))


def _single_pixel_dropped(graph: Graph, node: onnx.NodeProto, layout: Axes) -> Axes | None:
    """(N,C,1,1) to (N,C)."""
    sizes = dict(zip(layout, graph.shape(node.input[0]), strict=True))
    if (sizes.get("H", 1), sizes.get("W", 1)) != (1, 1) or graph.rank(node.output[0]) != 2:
        return None
    return "NC" if graph.shape(node.output[0])[1] == sizes["C"] else None


PUSHES: dict[str, PushRule] = {
    "Identity": _keeps_layout,
    "Dropout": _keeps_layout,
    "MaxPool": _pooling_keeps_layout,
    "AveragePool": _average_keeps_sum,
    "GlobalAveragePool": _pooling_keeps_layout,
    "GlobalMaxPool": _pooling_keeps_layout,
    "ReduceMean": _mean_over_map,
    "Transpose": _permuted,
    "Flatten": _single_pixel_dropped,
    "Reshape": _single_pixel_dropped,
    "Squeeze": _single_pixel_dropped,
}
