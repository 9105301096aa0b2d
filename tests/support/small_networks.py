"""Classifiers with a fixed batch, as exporters write them, none of which mixes images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from networks import NetworkBuilder

SIDE = 8


def features(batch: int) -> tuple[NetworkBuilder, str]:
    net = NetworkBuilder((batch, 3, SIDE, SIDE))
    return net, net.add("Relu", net.conv(net.input, (4, 3, 3, 3), pads=[1, 1, 1, 1]), name="features")


def classified(net: NetworkBuilder, value: str, size: int) -> onnx.ModelProto:
    return net.build(net.add("Softmax", net.dense(value, (size, 5)), axis=1)).to_model()


def _flattened(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    return classified(net, net.add("Flatten", net.add("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])), 64)


def _reshaped_by_numbers(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    return classified(net, net.add("Reshape", value, net.constant([batch, -1])), 256)


def _squeeze_and_excitation(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    pooled = net.add("ReduceMean", value, net.constant([2, 3]), keepdims=1)
    hidden = net.add("Reshape", pooled, net.constant([batch, 4]))
    gate = net.add("Sigmoid", net.dense(hidden, (4, 4)))
    gate = net.add("Unsqueeze", gate, net.constant([2, 3]))
    scaled = net.add("Mul", value, gate)
    return classified(net, net.add("Squeeze", net.add("GlobalAveragePool", scaled), net.constant([2, 3])), 4)


def _attention(batch: int) -> onnx.ModelProto:
    """Tokens (N,T,C) in two heads (N,2,T,C/2), as exporters write them for a known batch size."""
    net, value = features(batch)
    tokens = net.add("Transpose", net.add("Reshape", value, net.constant([batch, 4, 64])), perm=[0, 2, 1])
    heads = net.add("Reshape", tokens, net.constant([batch, 64, 2, 2]))
    query = net.add("Transpose", heads, perm=[0, 2, 1, 3])
    key = net.add("Transpose", heads, perm=[0, 2, 3, 1])
    mixed = net.add("MatMul", net.add("Softmax", net.add("MatMul", query, key), axis=-1), query)
    joined = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), net.constant([batch, 64, 4]))
    return classified(net, net.add("ReduceMean", joined, net.constant([1]), keepdims=0), 4)


def _branches(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    padded = net.add("Pad", value, net.constant([0, 0, 1, 1, 0, 0, 1, 1]))
    left = net.add("AveragePool", padded, kernel_shape=[3, 3])
    right = net.add("Resize", value, "", "", net.constant([batch, 4, 8, 8]), mode="nearest")
    joined = net.add("Concat", left, net.add("Slice", right, *map(net.constant, ([1], [3], [1]))), axis=1)
    shifted = net.add("Add", joined, net.constant(np.ones((1, 6, 1, 1), np.float32)))
    return classified(net, net.add("ReduceMax", shifted, net.constant([2, 3]), keepdims=0), 6)


SOUND_NETWORKS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "flattened": _flattened,
    "reshaped_by_numbers": _reshaped_by_numbers,
    "squeeze_and_excitation": _squeeze_and_excitation,
    "attention": _attention,
    "branches": _branches,
}
