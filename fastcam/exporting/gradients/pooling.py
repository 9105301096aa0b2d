"""The mean over the map of a gradient, found without the full gradient where that is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx

from ...graph import Dim, Graph, attribute, operator, static_dims
from .autodiff import backpropagate, dense_layer
from .pushes import PUSHES, Axes


@dataclass(frozen=True)
class Pooling:
    """How to get the mean over the map of a value's gradient.

    Attributes
    ----------
    source : str
        The value whose gradient it is computed from.
    finish : callable
        From the gradient of ``source`` to the mean, (K,N,C); appends nodes.
    """

    source: str
    finish: Callable[[str], str]


def plan_pooling(graph: Graph, gradients: Mapping[str, str], value: str) -> Pooling:
    """Find the cheapest way to the mean over the map of the gradient of ``value``.

    Grad-CAM needs no more than alpha (Selvaraju et al. 2017, eq. 1). The sum over the map is pushed forward through
    the first ops of the head as long as that is exact (`pushes.PUSHES`), and folded into the weights of a dense layer
    that reads the flattened map: for VGG16 a 512x4096 product then replaces a 25088x4096 one.

    Parameters
    ----------
    graph, gradients
        As in `backpropagate`.
    value : str
        A value (N,C,h,w).
    """
    pixels = math.prod(static_dims(graph, value, (2, 3)))
    reached, layout = _push_sum(graph, value, gradients)
    dense = _flattened_reader(graph, reached, gradients)
    if dense is not None:
        return Pooling(dense.output[0], partial(_through_folded_weights, graph, reached, layout, dense, pixels))
    dtype = graph.type(value).dtype
    return Pooling(reached, partial(_mean_over_map, graph, reached, layout, pixels, dtype))


def pooled_gradients(
    graph: Graph, gradients: Mapping[str, str], values: Sequence[str], full: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Append the nodes that give the mean over the map of the gradients of ``values``, in one reverse pass.

    Parameters
    ----------
    graph, gradients
        As in `backpropagate`.
    values : sequence of str
        Values (N,C,h,w).
    full : sequence of str, optional
        Values whose full gradients are wanted as well.

    Returns
    -------
    pooled : list of str
        (K,N,C) for each of ``values``.
    whole : list of str
        (K,N,C,h,w) for each of ``full``.
    """
    plans = [plan_pooling(graph, gradients, value) for value in values]
    found = backpropagate(graph, gradients, [*(plan.source for plan in plans), *full])
    pooled = [plan.finish(gradient) for plan, gradient in zip(plans, found, strict=False)]
    return pooled, found[len(plans) :]


def _mean_over_map(graph: Graph, value: str, layout: Axes, pixels: int, dtype: np.dtype[Any], gradient: str) -> str:
    """Return the sum over the remaining map, divided by the number of pixels of the original one."""
    spatial = [1 + layout.index(axis) for axis in "HW" if axis in layout]
    if spatial:
        op = "Squeeze" if _map_size(graph, value, layout) == 1 else "ReduceSum"
        attributes = {} if op == "Squeeze" else {"keepdims": 0}
        axes = graph.emit_constant(np.array(spatial, np.int64))
        gradient = graph.emit(op, gradient, axes, stem="gradient/pooled_sum", **attributes)
    return graph.emit("Mul", gradient, graph.emit_constant(np.asarray(1 / pixels, dtype)), stem="gradient/pooled")


def _push_sum(graph: Graph, value: str, gradients: Mapping[str, str]) -> tuple[str, Axes]:
    """Return the last value whose gradient has the same sum over the map as that of ``value``, and its axes."""
    layout: Axes = "NCHW"
    while (node := _only_reader(graph, value, gradients)) is not None:
        push = PUSHES.get(operator(node))
        pushed = push(graph, node, layout) if push else None
        # Each row must remain one image, or the sums would mix images.
        if pushed is None or not pushed.startswith("N"):
            break
        value, layout = node.output[0], pushed
    return value, layout


def _map_size(graph: Graph, value: str, layout: Axes) -> int:
    return math.prod(static_dims(graph, value, [layout.index("H"), layout.index("W")]))


def _flattened_reader(graph: Graph, value: str, gradients: Mapping[str, str]) -> onnx.NodeProto | None:
    """Return the dense layer that is the only reader of ``value`` flattened to one row per image, or None."""
    flatten = _only_reader(graph, value, gradients)
    if flatten is None or operator(flatten) not in ("Flatten", "Reshape") or not _flattens(graph, flatten):
        return None
    dense = _only_reader(graph, flatten.output[0], gradients)
    if dense is None or dense_layer(graph, dense.output[0]) is None or dense.input[0] != flatten.output[0]:
        return None
    return dense


def _only_reader(graph: Graph, value: str, gradients: Mapping[str, str]) -> onnx.NodeProto | None:
    readers = graph.readers(value)
    return readers[0] if len(readers) == 1 and value not in gradients else None


def _flattens(graph: Graph, node: onnx.NodeProto) -> bool:
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return len(after) == 2 and _row_size(before) is not None and _row_size(before) == _row_size(after)


def _row_size(shape: tuple[Dim, ...]) -> int | None:
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(shape) - 1 else None


def _through_folded_weights(
    graph: Graph, value: str, layout: Axes, dense: onnx.NodeProto, pixels: int, gradient: str
) -> str:
    """Return G S with S[u,k] = mean over the map of the dense layer's weights that read channel k."""
    weight = graph.constants[dense.input[1]]
    by_row = weight if not attribute(dense, "transB", 0) else weight.T
    sizes = static_dims(graph, value, range(1, len(layout)))
    spatial = tuple(layout.index(axis) - 1 for axis in "HW")
    folded = by_row.reshape(*sizes, -1).sum(axis=spatial, dtype=np.float64) / pixels
    matrix = graph.emit_constant(np.ascontiguousarray(folded.T.astype(weight.dtype)), stem="gradient/folded_weights")
    return graph.emit("MatMul", gradient, matrix, stem="gradient/pooled")
