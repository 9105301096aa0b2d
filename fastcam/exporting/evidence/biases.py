"""FullGrad (Srinivas and Fleuret 2019): a score is the sum of input times gradient and of all biases times theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx

from ...arrays import Array
from ...graph import Graph, attribute, needed_nodes, operator, static_dims
from ..drawing import bilinear_matrix
from ..gradients.autodiff import backpropagate
from ..outputs import Asked


class _Bias(NamedTuple):
    """A value (N,C,h,w), and what was added to each of its channels: (C,1,1)."""

    value: str
    numbers: Array


def bias_maps(graph: Graph, asked: Asked) -> str:
    """Return the sum over the image and all maps with a bias of psi(x * gradient), (N,K,H,W) (eq. 6).

    psi is the magnitude, scaled to 0..1 over channels and pixels, resized, and summed over channels. Biases are those
    of convolutions with what is folded into them, and of batch normalisations.
    """
    channel = asked.layout.index("C")
    axes = [axis for axis in range(1, 4) if axis != channel]
    size = static_dims(graph, asked.image, axes)
    biases = list(_biases(graph, asked.logits))
    value, gradient = asked.differentiate(graph)
    values = [*dict.fromkeys(bias.value for bias in biases), asked.image]
    gradients = dict(zip(values, backpropagate(graph, {value: gradient}, values), strict=True))
    products = [graph.emit("Mul", gradients[asked.image], asked.image, stem="bias/image")]
    if channel != 1:
        products = [graph.emit("Transpose", products[0], perm=[0, 1, 4, 2, 3], stem="bias/image")]
    sizes = [(size, static_dims(graph, asked.image, [channel])[0])]
    for bias in biases:
        numbers = graph.emit_constant(np.asarray(bias.numbers, graph.type(bias.value).dtype), stem="bias/numbers")
        products.append(graph.emit("Mul", gradients[bias.value], numbers, stem="bias/product"))
        sizes.append((static_dims(graph, bias.value, [2, 3]), len(bias.numbers)))
    maps: dict[tuple[int, ...], str] = {}
    for product, (sides, channels) in zip(products, sizes, strict=True):
        one = _summed(graph, product, channels)
        maps[sides] = graph.emit("Add", maps[sides], one, stem="bias/sum") if sides in maps else one
    total = ""
    for sides, one in maps.items():
        large = _resized(graph, one, sides, size)
        total = graph.emit("Add", total, large, stem="bias/total") if total else large
    return graph.emit("Transpose", total, perm=[1, 0, 2, 3], stem="bias/maps")


def _biases(graph: Graph, logits: str) -> Iterator[_Bias]:
    for node in needed_nodes(graph, [logits]):
        numbers = _added(graph, node)
        if numbers is not None and graph.rank(node.output[0]) == 4 and numbers.any():
            yield _Bias(node.output[0], numbers.reshape(-1, 1, 1))


def _added(graph: Graph, node: onnx.NodeProto) -> Array | None:
    """Return what a node adds to each channel of a multiple of its input, (C,); None if it adds nothing constant."""
    fixed = [graph.constants.get(name) for name in node.input]
    if operator(node) in ("Conv", "ConvTranspose"):
        return fixed[2] if len(fixed) > 2 else None
    if operator(node) == "BatchNormalization":
        known = [array.astype(np.float64) for array in fixed[1:] if array is not None]
        if len(known) < 4:
            return None
        gamma, beta, mean, variance = known
        return np.asarray(beta - mean * gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5)))
    if operator(node) == "Add":
        channels = graph.shape(node.output[0])[1] if graph.rank(node.output[0]) == 4 else None
        for array in fixed:
            if array is not None and isinstance(channels, int) and _is_per_channel(array, channels):
                return array.reshape(-1)
    return None


def _is_per_channel(array: Array, channels: int) -> bool:
    return channels > 1 and array.size == channels and array.shape[-3:] == (channels, 1, 1)


def _summed(graph: Graph, product: str, channels: int) -> str:
    """Return the sum over channels of the magnitudes of (K,N,C,h,w), scaled to 0..1 for each image and target."""
    sizes = graph.emit("Abs", product, stem="bias/size")
    axes, channel = graph.emit_integers(2, 3, 4), graph.emit_integers(2)
    low, high = (
        graph.emit("Squeeze", graph.emit(op, sizes, axes, keepdims=1), channel, stem="bias/range")
        for op in ("ReduceMin", "ReduceMax")
    )
    total = graph.emit("ReduceSum", sizes, channel, keepdims=0, stem="bias/channels")
    above = graph.emit("Sub", total, graph.emit("Mul", low, graph.emit_number(channels)), stem="bias/above")
    span = graph.emit("Sub", high, low, stem="bias/span")
    # A map that is the same everywhere says nothing: zeros.
    divisor = graph.emit("Where", graph.emit("Greater", span, graph.emit_number(0)), span, graph.emit_number(math.inf))
    return graph.emit("Div", above, divisor, stem="bias/scaled")


def _resized(graph: Graph, maps: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    if before == after:
        return maps
    rows, columns = (bilinear_matrix(old, new) for old, new in zip(before, after, strict=True))
    high = graph.emit("MatMul", graph.emit_constant(rows, stem="bias/rows"), maps, stem="bias/high")
    return graph.emit("MatMul", high, graph.emit_constant(columns.T.copy(), stem="bias/columns"), stem="bias/large")
