"""Rewrites that leave a model's function alone and its graph clean.

In this order:

1. Fold every node whose inputs are all constants.
2. Give Reshape a constant target where the shape is known, which frees the shape arithmetic behind it.
3. Drop nodes that do nothing at inference: Identity, Dropout, a Cast to the same type.
4. Fold what follows a Conv and is affine per channel (BatchNormalization, Mul, Add) into its kernel and bias.
5. Turn MatMul + bias into Gemm.
6. Prune.

Each pass returns nothing and may be run again; a value in ``keep`` survives under its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection

import numpy as np
import onnx
from onnx import helper

from .errors import ModelError
from .graph import Array, Dim, Graph, attribute


def simplify(graph: Graph, keep: Collection[str] = ()) -> None:
    """Clean ``graph`` in place.

    Parameters
    ----------
    graph : Graph
    keep : collection of str
        Values that must still be computed, under the same name (a layer that the user asked for).
    """
    outputs = graph.outputs
    graph.outputs = list(dict.fromkeys([*outputs, *keep]))
    fold_constants(graph)
    graph.infer_types()
    settle_reshapes(graph)
    drop_no_ops(graph)
    fold_into_convolutions(graph)
    join_matmul_and_bias(graph)
    graph.outputs = outputs
    graph.prune()
    graph.infer_types()


def fold_constants(graph: Graph) -> None:
    """Evaluate the nodes that depend on constants alone.

    Raises
    ------
    ModelError
        When such a node cannot be evaluated.
    """
    remaining = []
    for node in graph.nodes:
        if all(name in graph.constants for name in node.input if name) and _is_pure(node):
            graph.constants.update(zip(node.output, _evaluate(node, graph), strict=True))
        else:
            remaining.append(node)
    graph.nodes = remaining


def settle_reshapes(graph: Graph) -> None:
    """Replace a computed Reshape target by a constant wherever at most one dimension is open."""
    for node in graph.nodes:
        if node.op_type != "Reshape" or node.input[1] in graph.constants or graph.rank(node.output[0]) is None:
            continue
        target = _reshape_target(graph.shape(node.input[0]), graph.shape(node.output[0]))
        if target is not None:
            node.input[1] = graph.emit_constant(target, stem="shape")


def _reshape_target(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> Array | None:
    """Return a constant target of Reshape: 0 keeps the batch where all else stays in the row, -1 is the open rest."""
    if all(isinstance(size, int) for size in (*before[1:], *after[1:])) and math.prod(
        size for size in before[1:] if isinstance(size, int)
    ) == math.prod(size for size in after[1:] if isinstance(size, int)):
        return np.array([0, *after[1:]], np.int64)
    if sum(not isinstance(size, int) for size in after) <= 1:
        return np.array([size if isinstance(size, int) else -1 for size in after], np.int64)
    return None


def drop_no_ops(graph: Graph) -> None:
    """Take out the nodes that hand their first input on unchanged."""
    remaining = []
    for node in graph.nodes:
        if _hands_on(node, graph) and node.output[0] not in graph.outputs:
            graph.replace_uses(node.output[0], node.input[0])
        else:
            remaining.append(node)
    graph.nodes = remaining


def fold_into_convolutions(graph: Graph) -> None:
    """Fold per-channel affine ops that follow a Conv, and nothing else follows it, into the Conv's weights."""
    for node in list(graph.nodes):
        affine = _AFFINE.get(node.op_type)
        # Each round may append constants and retire a node, so the view of the graph is taken anew.
        folded = affine and affine(graph, node)
        if folded:
            _absorb(graph, *folded, follower=node)


def join_matmul_and_bias(graph: Graph) -> None:
    """Turn MatMul of a matrix and a constant matrix, followed by the addition of a constant row, into one Gemm."""
    producers, consumers = graph.producers(), graph.consumers()
    for add in [node for node in graph.nodes if node.op_type == "Add"]:
        value, bias = _value_and_constant(graph, add)
        matmul = producers.get(value)
        if matmul is None or matmul.op_type != "MatMul" or value in graph.outputs or len(consumers[value]) != 1:
            continue
        weight = graph.constants.get(matmul.input[1])
        row = graph.constants.get(bias)
        if weight is None or weight.ndim != 2 or graph.rank(matmul.input[0]) != 2:
            continue
        if row is not None and row.shape == (weight.shape[1],):
            gemm = helper.make_node("Gemm", [matmul.input[0], matmul.input[1], bias], [add.output[0]], name=add.name)
            graph.nodes[_position(graph, add)] = gemm
            del graph.nodes[_position(graph, matmul)]


def _evaluate(node: onnx.NodeProto, graph: Graph) -> list[Array]:
    # The reference implementation reads a 100 ms table of ops on import: only models with something to fold pay it.
    from onnx.reference import ReferenceEvaluator

    inputs = {name: graph.constants[name] for name in node.input if name}
    try:
        results = ReferenceEvaluator(node, opsets={"": graph.opset}).run(None, inputs)
    except Exception as error:  # whatever NumPy makes of the node's arguments
        raise ModelError(f"node {node.name!r} ({node.op_type}) cannot be evaluated: {error}") from error
    return [np.ascontiguousarray(result) for result in results]


def _is_pure(node: onnx.NodeProto) -> bool:
    """A node that gives the same output each time, and is described by its inputs alone."""
    has_subgraph = any(item.HasField("g") or item.graphs for item in node.attribute)
    return not node.domain and not has_subgraph and not node.op_type.startswith("Random")


def _hands_on(node: onnx.NodeProto, graph: Graph) -> bool:
    if node.op_type == "Dropout":
        return len([name for name in node.output if name]) == 1 and not _trains(node, graph)
    if node.op_type == "Cast" and graph.rank(node.input[0]) is not None:
        return bool(helper.np_dtype_to_tensor_dtype(graph.type(node.input[0]).dtype) == attribute(node, "to"))
    return node.op_type == "Identity"


def _trains(node: onnx.NodeProto, graph: Graph) -> bool:
    """A Dropout whose training_mode input is, or may be, true."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    mode = graph.constants.get(node.input[2])
    return mode is None or bool(mode)


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
    if conv is None or conv.op_type != "Conv" or value in graph.outputs or len(graph.consumers()[value]) != 1:
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
    del graph.nodes[_position(graph, follower)]
    conv.output[0] = follower.output[0]


def _position(graph: Graph, node: onnx.NodeProto) -> int:
    return next(index for index, other in enumerate(graph.nodes) if other is node)
