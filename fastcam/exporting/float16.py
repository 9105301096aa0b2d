"""Networks that compute in float16, explained in float32.

Two steps, before and after the reverse pass:

1. `round_weights` gives the weights the values that float16 can hold. What the reverse pass folds out of them is then
   the gradient of the network that will run, not of the one before rounding.
2. `halve` lets the forward part compute in float16 and leaves the gradient part in float32, with casts between.

A node of the forward part stays in float32 where float16 would lose too much: by its op, or by a constant it reads.
What comes after it does so, too, up to the next product or to where a value in float16 joins: a variance of 1e5 does
not pass through float16 on its way to the root, nor pixels on their way to the first convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..errors import ModelError
from ..graph import Array, Graph, needed_nodes, operator
from ..notes import Note

# Relative L2 error of a constant in float16. Rounding alone leaves 2**-11 at most; more means that the values are below
# 2**-14, where float16 runs out of digits: an epsilon of 1e-12 would become 0.
_LARGEST_ERROR = 2.0**-10

_SUMS = "sums many numbers, whose partial sums outgrow float16's 11 bits or its range"
_EXPONENTS = "leaves float16's range for small arguments: exp(12) is beyond 65504, 257 squared too"
_SQUARES = "squares its input inside, and 257 squared is beyond 65504"
_QUOTIENTS = "makes an infinity of what float16 rounds to 0, below 3e-8"
_TYPED = "names the type of its result, or converts it"

# Ops of the forward part that stay in float32, and why.
FLOAT32_OPS = {
    "AveragePool": _SUMS,
    "GlobalAveragePool": _SUMS,
    "CumSum": _SUMS,
    "Mean": _SUMS,
    "ReduceMean": _SUMS,
    "ReduceSum": _SUMS,
    "ReduceL1": _SUMS,
    "ReduceProd": _SUMS,
    "ReduceLogSum": _SUMS,
    "ReduceLogSumExp": _EXPONENTS,
    "Softmax": _EXPONENTS,
    "LogSoftmax": _EXPONENTS,
    "Exp": _EXPONENTS,
    "Log": _EXPONENTS,
    "Softplus": _EXPONENTS,
    "Pow": _EXPONENTS,
    "Div": _QUOTIENTS,
    "Reciprocal": _QUOTIENTS,
    "Sqrt": _QUOTIENTS,
    "ReduceL2": _SQUARES,
    "ReduceSumSquare": _SQUARES,
    "LpNormalization": _SQUARES,
    "LpPool": _SQUARES,
    "GlobalLpPool": _SQUARES,
    "LRN": _SQUARES,
    "LayerNormalization": _SQUARES,
    "InstanceNormalization": _SQUARES,
    "GroupNormalization": _SQUARES,
    "MeanVarianceNormalization": _SQUARES,
    "Cast": _TYPED,
    "CastLike": _TYPED,
    "EyeLike": _TYPED,
}

# Ops that are worth a cast to float16: tensor cores compute them.
_PRODUCTS = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
# Inputs that ONNX wants in float32 whatever the op computes in.
_FLOAT32_INPUTS = {"Resize": (1, 2)}
# Constants that a note names.
_LISTED = 3
_QUANTIZED_OPS = ("QuantizeLinear", "DequantizeLinear")


def round_weights(graph: Graph) -> list[Note]:
    """Round the constants that `halve` will store in float16, and tell what it will leave in float32.

    Parameters
    ----------
    graph : Graph
        The forward part, types inferred; its constants are replaced by rounded ones, float32 still.

    Returns
    -------
    list of Note
        One, where float16 cannot hold some constants.

    Raises
    ------
    ModelError
        The network is quantised.
    """
    for node in graph.nodes:
        if operator(node) in _QUANTIZED_OPS:
            raise ModelError(
                f'precision="fp16" does not go with quantisation (node {node.name or node.output[0]!r}): export the '
                'quantised model with precision="fp32", or the float model that it was made from with "fp16"'
            )
    unfit = _unfit_constants(graph, graph.nodes)
    for name in _half_constants(graph, graph.nodes, unfit):
        graph.constants[name] = graph.constants[name].astype(np.float16).astype(np.float32)
    if not unfit:
        return []
    listed = ", ".join(map(repr, sorted(unfit)[:_LISTED])) + (" ..." if len(unfit) > _LISTED else "")
    text = f"Beyond float16, or too small for it: {listed}; what reads {len(unfit)} such constants stays in float32."
    return [Note("float16", text)]


def halve(graph: Graph, forward: Sequence[str]) -> None:
    """Let the forward part compute in float16.

    Inputs and outputs of the graph keep their types. A constant that both parts read is stored once, in float16, and
    cast up for the gradient part.

    Parameters
    ----------
    graph : Graph
        Types inferred, weights rounded by `round_weights`; changed in place.
    forward : sequence of str
        Values whose producing nodes are the forward part: the scores and the explained activations.
    """
    nodes = needed_nodes(graph, forward)
    unfit = _unfit_constants(graph, nodes)
    halved = {id(node): node for node in _halved_nodes(graph, nodes, unfit)}
    made = dict.fromkeys(name for node in halved.values() for name in node.output if _is_float32(graph, name))
    read = dict.fromkeys(name for node in halved.values() for name in _half_inputs(graph, node))
    both = {name for node in graph.nodes if id(node) not in halved for name in node.input}.union(
        graph.outputs, *(_float32_inputs(node) for node in halved.values())
    )
    half_of = {name: _half(graph, name, made=name in made, both=name in both) for name in {**made, **read}}
    for node in halved.values():
        kept = _FLOAT32_INPUTS.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if index not in kept:
                node.input[index] = half_of.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = half_of.get(name, name)
    # What was known of the values would be taken for their declaration.
    graph.types = {}
    graph.prune()
    graph.infer_types()


def _half(graph: Graph, name: str, *, made: bool, both: bool) -> str:
    """Return what the float16 of a value is called, with casts where it is read in float32, too, or made in it."""
    constant = graph.constants.get(name)
    if constant is None and not made:
        return graph.emit("Cast", name, to=TensorProto.FLOAT16, stem=f"{name}/half")
    half = graph.unused_name(f"{name}/half") if both else name
    if constant is not None:
        del graph.constants[name]
        graph.constants[half] = constant.astype(np.float16)
    if both:
        graph.nodes.append(helper.make_node("Cast", [half], [name], name=f"{name}/float", to=TensorProto.FLOAT))
    return half


def _halved_nodes(graph: Graph, nodes: Iterable[onnx.NodeProto], unfit: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes, of some in topological order, that compute in float16."""
    halved: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in nodes:
        joined = operator(node) in _PRODUCTS or not made.isdisjoint(node.input)
        if joined and _may_be_halved(graph, node, unfit):
            halved.append(node)
            made.update(name for name in node.output if _is_float32(graph, name))
    return halved


def _may_be_halved(graph: Graph, node: onnx.NodeProto, unfit: set[str]) -> bool:
    inputs = _half_inputs(graph, node)
    known = operator(node) == node.op_type and all(_dtype(graph, name) for name in (*node.input, *node.output) if name)
    squares = node.op_type == "Mul" and node.input[0] == node.input[1]
    if not inputs or not known or squares or node.op_type in FLOAT32_OPS:
        return False
    return unfit.isdisjoint(inputs) and _takes_half(node.op_type, graph.opset)


@cache
def _takes_half(op: str, opset: int) -> bool:
    """Tell whether ONNX lets an op compute in float16 wherever it may compute in float32."""
    allowed = [constraint.allowed_type_strs for constraint in onnx.defs.get_schema(op, opset).type_constraints]
    return all("tensor(float16)" in types for types in allowed if "tensor(float)" in types)


def _half_inputs(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the inputs that are float32, and float16 where the node computes in that."""
    kept = _FLOAT32_INPUTS.get(operator(node), ())
    return [name for index, name in enumerate(node.input) if index not in kept and _is_float32(graph, name)]


def _float32_inputs(node: onnx.NodeProto) -> list[str]:
    return [node.input[index] for index in _FLOAT32_INPUTS.get(node.op_type, ()) if index < len(node.input)]


def _is_float32(graph: Graph, name: str) -> bool:
    return _dtype(graph, name) == np.float32


def _dtype(graph: Graph, name: str) -> np.dtype[Any] | None:
    """Return the element type of a value, None where inference could not tell."""
    return graph.type(name).dtype if graph.rank(name) is not None else None


def _half_constants(graph: Graph, nodes: Iterable[onnx.NodeProto], unfit: set[str]) -> list[str]:
    found = (name for node in _halved_nodes(graph, nodes, unfit) for name in _half_inputs(graph, node))
    return [name for name in dict.fromkeys(found) if name in graph.constants]


def _unfit_constants(graph: Graph, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the constants that float16 cannot hold, of nodes that would compute in it."""
    return {name for name in _half_constants(graph, nodes, set()) if not _fits(graph.constants[name])}


def _fits(array: Array) -> bool:
    """Tell whether float16 holds an array: nothing overflows, and the values are not too small for its digits."""
    with np.errstate(over="ignore", invalid="ignore"):
        half = array.astype(np.float16)
        error = half.astype(np.float32)
        error -= array
        overflows = bool((np.isinf(half) & np.isfinite(array)).any())
        # What is infinite already leaves NaN here, and is no loss.
        lossy = bool(np.linalg.norm(error.ravel()) > _LARGEST_ERROR * np.linalg.norm(array.ravel()))
    return not overflows and not lossy
