"""Fold affine ops and pads into convolutions, and join what runtimes compute in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper

from ...graph import Array, Graph, attribute, operator
from ..ops import ELEMENTWISE


def fold_into_convolutions(graph: Graph) -> None:
    """Fold per-channel affine ops that follow a Conv, and nothing else follows it, into the Conv's weights."""
    for node in list(graph.nodes):
        affine = _AFFINE.get(operator(node))
        # Each round may append constants and retire a node, so the view of the graph is taken anew.
        folded = affine and affine(graph, node)
        if folded:
            _absorb(graph, *folded, follower=node)


def fold_pads(graph: Graph) -> None:
    """Let every Conv that reads a picture padded with zeros pad it itself."""
    producers = graph.producers()
    for conv in graph.nodes:
        pad = producers.get(conv.input[0]) if operator(conv) == "Conv" else None
        pads = _zeros_around(graph, pad) if pad is not None and operator(pad) == "Pad" else None
        if pad is None or pads is None or attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        own = attribute(conv, "pads", [0] * len(pads))
        kept = [item for item in conv.attribute if item.name not in ("pads", "auto_pad")]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute("pads", [a + b for a, b in zip(own, pads, strict=True)])])
        conv.input[0] = pad.input[0]


def _zeros_around(graph: Graph, pad: onnx.NodeProto) -> list[int] | None:
    """Return the pads of the spatial axes as a Conv has them; None where anything else is padded, or not with zeros."""
    pads = graph.constants.get(pad.input[1])
    value = graph.constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    axes_given = len(pad.input) > 3 and pad.input[3]
    if attribute(pad, "mode", "constant") != "constant" or axes_given or pads is None or value is None or value.any():
        return None
    ends = pads.reshape(2, -1)
    return [int(size) for size in ends[:, 2:].reshape(-1)] if not ends[:, :2].any() and (ends >= 0).all() else None


def join_scale_and_shift(graph: Graph) -> None:
    """Turn Mul and Add of one number a channel, as a BatchNormalization before its block leaves them, into that again.

    Runtimes do it in one pass over the map, with the activation that follows.
    """
    producers, consumers = graph.producers(), graph.consumers()
    for add in [node for node in graph.nodes if operator(node) == "Add"]:
        scaled, _ = _value_and_constant(graph, add)
        mul = producers.get(scaled)
        if mul is None or operator(mul) != "Mul" or scaled in graph.outputs or len(consumers[scaled]) != 1:
            continue
        shift, scale = _addition(graph, add), _multiplication(graph, mul)
        if shift is None or scale is None or not _has_channels_first(scale[0], producers):
            continue
        # The variance and the epsilon that is added to it make 1.
        row = np.ones_like(scale[1].scale)
        parameters = [scale[1].scale, shift[1].shift, 0 * row, row - _EPSILON]
        dtype, stem = graph.type(scaled).dtype, f"{add.output[0]}/normalization"
        names = [graph.emit_constant(array.astype(dtype), stem=stem) for array in parameters]
        normalization = helper.make_node(
            "BatchNormalization", [scale[0], *names], list(add.output), name=add.name, epsilon=_EPSILON
        )
        graph.nodes[node_position(graph, add)] = normalization
        del graph.nodes[node_position(graph, mul)]
        producers[add.output[0]] = normalization


_EPSILON = 1e-5


def _has_channels_first(value: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Tell that ``value`` comes, past ops that leave the axes alone, from one whose map has its channels on axis 1."""
    node = producers.get(value)
    while node is not None and operator(node) in (*ELEMENTWISE, "Concat", "Pad"):
        node = next((producers[name] for name in node.input if name in producers), None)
    return node is not None and operator(node) in ("Conv", "MaxPool", "AveragePool", "BatchNormalization")


def join_matmul_and_bias(graph: Graph) -> None:
    """Turn MatMul of a matrix and a constant matrix, followed by the addition of a constant row, into one Gemm."""
    producers, consumers = graph.producers(), graph.consumers()
    for add in [node for node in graph.nodes if operator(node) == "Add"]:
        value, bias = _value_and_constant(graph, add)
        matmul = producers.get(value)
        if matmul is None or operator(matmul) != "MatMul" or value in graph.outputs or len(consumers[value]) != 1:
            continue
        weight = graph.constants.get(matmul.input[1])
        row = graph.constants.get(bias)
        if weight is None or weight.ndim != 2 or graph.rank(matmul.input[0]) != 2:
            continue
        if row is not None and row.shape == (weight.shape[1],):
            gemm = helper.make_node("Gemm", [matmul.input[0], matmul.input[1], bias], [add.output[0]], name=add.name)
            graph.nodes[node_position(graph, add)] = gemm
            del graph.nodes[node_position(graph, matmul)]


@dataclasses.dataclass(frozen=True)
class _Affine:
    """y = scale * x + shift, one number per channel."""

    scale: Array
    shift: Array


def _batch_normalization(graph: Graph, node: onnx.NodeProto) -> tuple[str, _Affine] | None:
    parameters = [graph.constants.get(name) for name in node.input[1:5]]
    if attribute(node, "training_mode", 0) or any(item is None for item in parameters):
        return None
    gamma, beta, mean, variance = (np.asarray(item, np.float64) for item in parameters)
    if np.any(variance + attribute(node, "epsilon", 1e-5) <= 0):
        return None
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return node.input[0], _Affine(scale, beta - mean * scale)


def _multiplication(graph: Graph, node: onnx.NodeProto) -> tuple[str, _Affine] | None:
    value, constant = _value_and_constant(graph, node)
    scale = _per_channel(graph, value, constant)
    return None if scale is None else (value, _Affine(scale, np.zeros_like(scale)))


def _addition(graph: Graph, node: onnx.NodeProto) -> tuple[str, _Affine] | None:
    value, constant = _value_and_constant(graph, node)
    shift = _per_channel(graph, value, constant)
    return None if shift is None else (value, _Affine(np.ones_like(shift), shift))


_AFFINE: dict[str, Callable[[Graph, onnx.NodeProto], tuple[str, _Affine] | None]] = {
    "BatchNormalization": _batch_normalization,
    "Mul": _multiplication,
    "Add": _addition,
}


def _value_and_constant(graph: Graph, node: onnx.NodeProto) -> tuple[str, str]:
    """Return a commutative node's inputs, the constant one last."""
    left, right = node.input
    return (right, left) if left in graph.constants else (left, right)


def _per_channel(graph: Graph, value: str, constant: str) -> Array | None:
    """Return a constant as one float64 number per channel of the rank-4 ``value``; None where it is not that."""
    array = graph.constants.get(constant)
    if array is None or array.ndim > 4 or graph.rank(value) != 4:
        return None
    channels = graph.shape(value)[1]
    full = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if not isinstance(channels, int) or full.shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    return np.broadcast_to(full.astype(np.float64).reshape(-1), (channels,))


def _absorb(graph: Graph, value: str, affine: _Affine, *, follower: onnx.NodeProto) -> None:
    """Fold ``follower``, which applies ``affine`` to ``value``, into the Conv that makes ``value``, if one does."""
    conv = graph.producer(value)
    if conv is None or operator(conv) != "Conv" or value in graph.outputs or len(graph.consumers()[value]) != 1:
        return
    weights = [graph.constants.get(name) for name in conv.input[1:] if name]
    if any(item is None for item in weights):
        return
    kernel = np.asarray(weights[0])
    bias = np.asarray(weights[1], np.float64) if len(weights) > 1 else np.zeros(kernel.shape[0])
    scale = affine.scale.reshape(-1, *[1] * (kernel.ndim - 1))
    folded = [(kernel * scale).astype(kernel.dtype), (bias * affine.scale + affine.shift).astype(kernel.dtype)]
    names = [graph.unused_name(f"{follower.output[0]}/{part}") for part in ("kernel", "bias")]
    graph.constants.update(zip(names, folded, strict=True))
    del conv.input[1:]
    conv.input.extend(names)
    del graph.nodes[node_position(graph, follower)]
    conv.output[0] = follower.output[0]


def node_position(graph: Graph, node: onnx.NodeProto) -> int:
    """Return the index of ``node`` among the nodes."""
    return next(index for index, other in enumerate(graph.nodes) if other is node)
