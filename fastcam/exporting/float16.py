"""Networks that compute in float16, explained in float32.

Two steps, before and after the reverse pass:

1. `round_weights` rounds the weights to float16. The reverse pass, which folds some of them, then gives the gradient of
   the network that will run, not of the one before rounding.
2. `halve` makes the forward part compute in float16 and leaves the gradient part in float32, with casts in between.

A node of the forward part stays in float32 where float16 would lose too much: by its op, or by a constant it reads.
So do the nodes after it, up to the next product or to where a float16 value joins: a variance of 1e5 does not
pass through float16 before its root is taken, nor do pixels before the first convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..arrays import Array
from ..errors import ModelError
from ..graph import Graph, needed_nodes, operator
from ..notes import Note
from .ops import OPS, QUANTIZATION_OPS, Fact, ops_with

# Relative L2 error of a constant in float16. Rounding alone leaves 2**-11 at most; more means that the values are below
# 2**-14, where float16 runs out of digits: an epsilon of 1e-12 would become 0.
_LARGEST_ERROR = 2.0**-10

# Ops of the forward part that stay in float32, and why.
FLOAT32_OPS = {name: op.float32 for name, op in OPS.items() if op.float32}
# Ops that are worth a cast to float16: tensor cores compute them.
_PRODUCTS = ops_with(Fact.PRODUCT)
# Inputs that ONNX requires in float32 regardless of the op's type.
_FLOAT32_INPUTS = {"Resize": (1, 2)}
# Number of constants that a note names.
_LISTED = 3


def round_weights(graph: Graph) -> list[Note]:
    """Round the constants that `halve` will store in float16, and report what it will leave in float32.

    Parameters
    ----------
    graph : Graph
        The forward part, types inferred; its constants are replaced by rounded ones, still float32.

    Returns
    -------
    list of Note
        One note if float16 cannot hold some constants.

    Raises
    ------
    ModelError
        The network is quantised.
    """
    for node in graph.nodes:
        if operator(node) in QUANTIZATION_OPS:
            raise ModelError(
                f'precision="fp16" cannot be combined with quantisation (node {node.name or node.output[0]!r}): export '
                'the quantised model with precision="fp32", or the original float model with "fp16"'
            )
    unfit = _unfit_constants(graph, graph.nodes)
    for name in _half_constants(graph, graph.nodes, unfit):
        graph.constants[name] = graph.constants[name].astype(np.float16).astype(np.float32)
    if not unfit:
        return []
    listed = ", ".join(map(repr, sorted(unfit)[:_LISTED])) + (" ..." if len(unfit) > _LISTED else "")
    text = f"Float16 cannot hold {listed}: ops that read such constants ({len(unfit)}) stay in float32."
    return [Note("float16", text)]


def halve(graph: Graph, forward: Sequence[str]) -> None:
    """Make the forward part compute in float16.

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
        inputs = (name if index in kept else half_of.get(name, name) for index, name in enumerate(node.input))
        graph.set_inputs(node, list(inputs))
        for index, name in enumerate(node.output):
            graph.set_output(node, index, half_of.get(name, name))
    # The known types of the values would be mistaken for their declaration.
    graph.types = {}
    graph.prune()
    graph.infer_types()


def _half(graph: Graph, name: str, *, made: bool, both: bool) -> str:
    """Return the name of a value's float16 form, adding casts where it is read or computed in float32."""
    constant = graph.constants.get(name)
    if constant is None and not made:
        return graph.emit("Cast", name, to=TensorProto.FLOAT16, stem=f"{name}/half")
    half = graph.unused_name(f"{name}/half") if both else name
    if constant is not None:
        del graph.constants[name]
        graph.constants[half] = constant.astype(np.float16)
    if both:
        graph.append(helper.make_node("Cast", [half], [name], name=f"{name}/float", to=TensorProto.FLOAT))
    return half


def _halved_nodes(graph: Graph, nodes: Iterable[onnx.NodeProto], unfit: set[str]) -> list[onnx.NodeProto]:
    """Return those of the nodes, in topological order, that compute in float16."""
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
    known = operator(node) == node.op_type and all(graph.dtype(name) for name in (*node.input, *node.output) if name)
    squares = node.op_type == "Mul" and node.input[0] == node.input[1]
    if not inputs or not known or squares or node.op_type in FLOAT32_OPS:
        return False
    return unfit.isdisjoint(inputs) and _takes_half(node.op_type, graph.opset)


@cache
def _takes_half(op: str, opset: int) -> bool:
    """Return whether ONNX lets an op compute in float16 wherever it may compute in float32."""
    allowed = [constraint.allowed_type_strs for constraint in onnx.defs.get_schema(op, opset).type_constraints]
    return all("tensor(float16)" in types for types in allowed if "tensor(float)" in types)


def _half_inputs(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """Return the inputs that are float32, or float16 when the node computes in float16."""
    kept = _FLOAT32_INPUTS.get(operator(node), ())
    return [name for index, name in enumerate(node.input) if index not in kept and _is_float32(graph, name)]


def _float32_inputs(node: onnx.NodeProto) -> list[str]:
    return [node.input[index] for index in _FLOAT32_INPUTS.get(node.op_type, ()) if index < len(node.input)]


def _is_float32(graph: Graph, name: str) -> bool:
    return graph.dtype(name) == np.float32


def _half_constants(graph: Graph, nodes: Iterable[onnx.NodeProto], unfit: set[str]) -> list[str]:
    found = (name for node in _halved_nodes(graph, nodes, unfit) for name in _half_inputs(graph, node))
    return [name for name in dict.fromkeys(found) if name in graph.constants]


def _unfit_constants(graph: Graph, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the constants that float16 cannot hold, of nodes that would compute in it."""
    return {name for name in _half_constants(graph, nodes, set()) if not _fits(graph.constants[name])}


def _fits(array: Array) -> bool:
    """Return whether float16 holds an array: nothing overflows, and the values are not too small for its digits."""
    with np.errstate(over="ignore", invalid="ignore"):
        half = array.astype(np.float16)
        error = half.astype(np.float32)
        error -= array
        overflows = bool((np.isinf(half) & np.isfinite(array)).any())
        # Values that are already infinite give NaN here and lose nothing.
        lossy = bool(np.linalg.norm(error.ravel()) > _LARGEST_ERROR * np.linalg.norm(array.ravel()))
    return not overflows and not lossy
