"""Fold affine ops into convolutions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from ...graph import Graph, attribute, operator
from .affine import Affine, addition, multiplication


def fold_into_convolutions(graph: Graph) -> bool:
    """affine(Conv(x)) -> Conv(x) with other weights, for a per-channel affine op that is the only reader of the Conv.

    Returns
    -------
    bool
        Whether anything changed.
    """
    changed = False
    for node in graph.nodes:
        affine = _AFFINE.get(operator(node))
        found = affine(graph, node) if affine else None
        if found:
            changed |= _absorb(graph, *found, follower=node)
    return changed


def _batch_normalization(graph: Graph, node: onnx.NodeProto) -> tuple[str, Affine] | None:
    parameters = [graph.constants.get(name) for name in node.input[1:5]]
    if attribute(node, "training_mode", 0) or any(item is None for item in parameters):
        return None
    gamma, beta, mean, variance = (np.asarray(item, np.float64) for item in parameters)
    if np.any(variance + attribute(node, "epsilon", 1e-5) <= 0):
        return None
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return node.input[0], Affine(scale, beta - mean * scale)


_AFFINE: dict[str, Callable[[Graph, onnx.NodeProto], tuple[str, Affine] | None]] = {
    "BatchNormalization": _batch_normalization,
    "Mul": multiplication,
    "Add": addition,
}


def _absorb(graph: Graph, value: str, affine: Affine, *, follower: onnx.NodeProto) -> bool:
    """Fold ``follower``, which applies ``affine`` to ``value``, into the Conv that makes ``value``, if one does."""
    conv = graph.producer(value)
    if conv is None or operator(conv) != "Conv" or graph.only_reader(value) is None:
        return False
    weights = [graph.constants.get(name) for name in conv.input[1:] if name]
    if any(item is None for item in weights):
        return False
    kernel = np.asarray(weights[0])
    bias = np.asarray(weights[1], np.float64) if len(weights) > 1 else np.zeros(kernel.shape[0])
    scale = affine.scale.reshape(-1, *[1] * (kernel.ndim - 1))
    folded = [(kernel * scale).astype(kernel.dtype), (bias * affine.scale + affine.shift).astype(kernel.dtype)]
    names = [graph.unused_name(f"{follower.output[0]}/{part}") for part in ("kernel", "bias")]
    graph.constants.update(zip(names, folded, strict=True))
    graph.set_inputs(conv, [conv.input[0], *names])
    graph.remove(follower)
    graph.set_output(conv, 0, follower.output[0])
    return True
