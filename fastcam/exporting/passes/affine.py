"""Affine maps with one number per channel, which several passes look for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from ...arrays import Array
from ...graph import Graph


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift, each with one number per channel."""

    scale: Array
    shift: Array


def multiplication(graph: Graph, node: onnx.NodeProto) -> tuple[str, Affine] | None:
    """Return what a Mul scales per channel and the factors, or None if it does not scale per channel."""
    value, constant = value_and_constant(graph, node)
    scale = per_channel(graph, value, constant)
    return None if scale is None else (value, Affine(scale, np.zeros_like(scale)))


def addition(graph: Graph, node: onnx.NodeProto) -> tuple[str, Affine] | None:
    """Return what an Add shifts per channel and the offsets, or None if it does not shift per channel."""
    value, constant = value_and_constant(graph, node)
    shift = per_channel(graph, value, constant)
    return None if shift is None else (value, Affine(np.ones_like(shift), shift))


def value_and_constant(graph: Graph, node: onnx.NodeProto) -> tuple[str, str]:
    """Return a commutative node's inputs, the constant one last."""
    left, right = node.input
    return (right, left) if left in graph.constants else (left, right)


def per_channel(graph: Graph, value: str, constant: str) -> Array | None:
    """Return a constant as one float64 number per channel of the rank-4 ``value``, or None if it is not one."""
    array = graph.constants.get(constant)
    if array is None or array.ndim > 4 or graph.rank(value) != 4:
        return None
    channels = graph.shape(value)[1]
    full = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if not isinstance(channels, int) or full.shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    return np.broadcast_to(full.astype(np.float64).reshape(-1), (channels,))
