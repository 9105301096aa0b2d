"""Ops that GPUs run: kernels of ONNX Runtime's CUDA provider and ops of TensorRT's ONNX parser, with their types.

Any other op runs on the CPU, with copies in both directions in every run, and prevents TensorRT from running the
whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx

from fastcam.exporting.ops import OPS
from fastcam.graph import Graph, attribute, operator

# Element types in one letter each: f float32, h float16, i int32 or int64, b bool, q int8 or uint8.
_LETTERS = {"float32": "f", "float16": "h", "int32": "i", "int64": "i", "bool": "b", "int8": "q", "uint8": "q"}


CUDA_KERNELS = {name: frozenset(op.cuda) for name, op in OPS.items() if op.cuda}
TENSORRT_OPS = {name: frozenset(op.tensorrt) for name, op in OPS.items() if op.tensorrt}

# Ops of source models that stay in the forward part although one of the lists lacks them, and the consequence.
EXCEPTIONS = {
    "Celu": "ONNX Runtime decomposes it into ops that CUDA has",
    "Mish": "ONNX Runtime decomposes it into ops that CUDA has",
    "GroupNormalization": "ONNX Runtime decomposes it into ops that CUDA has",
    "Mean": "on the CPU under CUDA; TensorRT has it",
    "LpPool": "on the CPU under CUDA; TensorRT has it",
    "QuantizeLinear": "as the source was quantised: TensorRT wants zero points of 0",
    "DequantizeLinear": "as the source was quantised: TensorRT wants zero points of 0, CUDA no biases of 32 bits",
}

# The input whose type selects the kernel, if it is not the first.
_CHOOSING_INPUT = {"Where": 1}
# Inputs that TensorRT requires to be constants.
_CONSTANT_INPUTS = {
    **dict.fromkeys(
        ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceL1", "ReduceL2", "Squeeze", "Unsqueeze", "TopK"),
        (1,),
    ),
    "Slice": (3,),
    "CumSum": (1,),
    "OneHot": (1,),
}


def reasons_against_gpus(graph: Graph) -> list[str]:
    """Return why CUDA or TensorRT would leave nodes to the CPU, one line per node and reason, except `EXCEPTIONS`."""
    found = []
    for node in graph.nodes:
        if operator(node) in EXCEPTIONS:
            continue
        kind = _type_of(graph, node)
        for place, table in (("CUDA", CUDA_KERNELS), ("TensorRT", TENSORRT_OPS)):
            if kind not in table.get(operator(node), ()):
                found.append(f"{place}: {node.op_type} of {kind!r} ({node.name})")
        found.extend(f"TensorRT: {node.op_type} with {reason} ({node.name})" for reason in _restrictions(graph, node))
    return found


def _type_of(graph: Graph, node: onnx.NodeProto) -> str:
    if node.op_type == "ConstantOfShape":
        return _LETTERS[graph.type(node.output[0]).dtype.name]
    return _LETTERS.get(graph.type(node.input[_CHOOSING_INPUT.get(node.op_type, 0)]).dtype.name, "?")


def _restrictions(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    computed = [
        node.input[index]
        for index in _CONSTANT_INPUTS.get(node.op_type, ())
        if index < len(node.input) and node.input[index] and node.input[index] not in graph.constants
    ]
    if computed:
        yield f"the computed {computed}"
    restriction = _RESTRICTIONS.get(node.op_type)
    reason = restriction(graph, node) if restriction else None
    if reason:
        yield reason


def _of_einsum(graph: Graph, node: onnx.NodeProto) -> str | None:
    equation = attribute(node, "equation").replace(" ", "")
    terms, _, result = equation.partition("->")
    twice = [term for term in (*terms.split(","), result) if len(set(term)) != len(term)]
    if "." in equation or twice:
        return f"the equation {equation}"
    sizes: dict[str, set[int]] = {}
    for term, name in zip(terms.split(","), node.input, strict=True):
        for letter, size in zip(term, graph.shape(name), strict=True):
            if isinstance(size, int):
                sizes.setdefault(letter, set()).add(size)
    return f"broadcast in {equation}" if any(len(found) > 1 for found in sizes.values()) else None


def _of_scatter(graph: Graph, node: onnx.NodeProto) -> str | None:
    reduction = attribute(node, "reduction", "none")
    return None if reduction == "none" else f"reduction {reduction}"


def _of_pool(graph: Graph, node: onnx.NodeProto) -> str | None:
    if len(node.output) > 1 and node.output[1]:
        return "indices"
    return None if len(graph.shape(node.input[0])) in (4, 5) else "another rank than 4 or 5"


_RESTRICTIONS: dict[str, Callable[[Graph, onnx.NodeProto], str | None]] = {
    "Einsum": _of_einsum,
    "MaxPool": _of_pool,
    "AveragePool": _of_pool,
    "ScatterND": _of_scatter,
    "ScatterElements": _of_scatter,
    "Resize": lambda graph, node: "cubic" if attribute(node, "mode", "nearest") == "cubic" else None,
}
