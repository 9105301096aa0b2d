"""Ops that ONNX Runtime's optimiser fuses, expanded into standard ONNX ops.

Sources: the contrib operator documentation of ONNX Runtime; GELU and its approximations by Hendrycks and Gimpel 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ...errors import ModelError
from ...graph import attribute

_DOMAIN = "com.microsoft"
_LAYOUT_DOMAIN = "com.microsoft.nchwc"

_WAY_OUT = (
    "ONNX Runtime's optimiser made it: give the file that was optimised, or save the optimised one with "
    "graph_optimization_level ORT_ENABLE_BASIC"
)


def unfused(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return standard ONNX nodes that compute what ``node`` does; the node itself if it is standard or unknown.

    Raises
    ------
    ModelError
        For an op that only ONNX Runtime's optimiser creates and that cannot be expanded.
    """
    if node.domain == _LAYOUT_DOMAIN:
        raise ModelError(f"op {node.op_type!r} of domain {node.domain!r} (node {node.name!r}): {_WAY_OUT}")
    rewrite = _REWRITES.get(node.op_type) if node.domain == _DOMAIN else None
    return [node] if rewrite is None else list(rewrite(node))


def fused_op_reason(node: onnx.NodeProto) -> str:
    """Return what to do about an op that is not a standard one."""
    if node.domain.startswith(_DOMAIN):
        return _WAY_OUT
    return "export the model again with standard ONNX ops in its place, or request support for it in fastcam"


def _name(node: onnx.NodeProto, part: str) -> str:
    return f"{node.output[0]}/{part}"


def _constant(node: onnx.NodeProto, part: str, value: float) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.array(value, np.float32))
    return helper.make_node("Constant", [], [_name(node, part)], name=_name(node, part), value=tensor)


def _node(node: onnx.NodeProto, op: str, inputs: list[str], part: str = "", **attributes: Any) -> onnx.NodeProto:
    """Return a node that makes an inner value, or, without a ``part``, the output of ``node``."""
    output = _name(node, part) if part else node.output[0]
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def _kept(node: onnx.NodeProto, *dropped: str) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute if item.name not in dropped}


def _activation(node: onnx.NodeProto, value: str) -> Iterator[onnx.NodeProto]:
    """Apply the activation that a fused op names, with its parameters, to a value."""
    op = attribute(node, "activation", "")
    parameters = [float(number) for number in attribute(node, "activation_params", [])]
    if op == "Clip":
        limits = [_constant(node, part, limit) for part, limit in zip(("low", "high"), parameters, strict=True)]
        yield from limits
        yield _node(node, op, [value, *(limit.output[0] for limit in limits)])
        return
    names = {"LeakyRelu": ["alpha"], "HardSigmoid": ["alpha", "beta"]}.get(op, [])
    alpha = attribute(node, "leaky_relu_alpha")
    found = dict(zip(names, parameters, strict=False)) or ({"alpha": alpha} if alpha is not None and names else {})
    yield _node(node, op or "Identity", [value], "", **found)


def _conv(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    inputs = [*node.input, "", "", ""][:4]
    weights = [name for name in inputs[:3] if name]
    yield _node(node, "Conv", weights, "conv", **_kept(node, "activation", "activation_params"))
    value = _name(node, "conv")
    if inputs[3]:
        yield _node(node, "Add", [value, inputs[3]], "sum")
        value = _name(node, "sum")
    yield from _activation(node, value)


def _gemm(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    dropped = ("activation", "activation_params", "activation_alpha", "leaky_relu_alpha")
    yield _node(node, "Gemm", list(node.input), "gemm", **_kept(node, *dropped))
    yield from _activation(node, _name(node, "gemm"))


def _matmul(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    if any(attribute(node, name, 0) for name in ("transA", "transB", "transBatchA", "transBatchB")):
        raise ModelError(f"op {node.op_type!r} of domain {node.domain!r} with transposed inputs: {_WAY_OUT}")
    yield _node(node, "MatMul", list(node.input), "product")
    factor = _constant(node, "alpha", attribute(node, "alpha", 1.0))
    yield from (factor, _node(node, "Mul", [_name(node, "product"), factor.output[0]]))


def _skip_layer_norm(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    x, skip, scale, shift, bias = [*node.input, "", "", ""][:5]
    total = node.output[3] if len(node.output) > 3 and node.output[3] else _name(node, "sum")
    if bias:
        yield _node(node, "Add", [skip, bias], "skip")
        skip = _name(node, "skip")
    yield helper.make_node("Add", [x, skip], [total], name=total)
    inputs = [total, scale, *([shift] if shift else [])]
    yield _node(node, "LayerNormalization", inputs, axis=-1, epsilon=attribute(node, "epsilon", 1e-12))


def _biased(node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], str]:
    if len(node.input) < 2 or not node.input[1]:
        return [], node.input[0]
    return [_node(node, "Add", list(node.input[:2]), "biased")], _name(node, "biased")


def _gelu(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """x/2 * (1 + erf(x / sqrt 2))."""
    biased, x = _biased(node)
    yield from biased
    yield from (_constant(node, part, value) for part, value in (("root", math.sqrt(2)), ("one", 1), ("half", 0.5)))
    yield _node(node, "Div", [x, _name(node, "root")], "scaled")
    yield _node(node, "Erf", [_name(node, "scaled")], "erf")
    yield from _half_of_one_plus(node, x, _name(node, "erf"))


def _fast_gelu(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """x/2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    biased, x = _biased(node)
    yield from biased
    values = {"three": 3, "cubic": 0.044715, "factor": math.sqrt(2 / math.pi), "one": 1, "half": 0.5}
    yield from (_constant(node, part, value) for part, value in values.items())
    yield _node(node, "Pow", [x, _name(node, "three")], "cube")
    yield _node(node, "Mul", [_name(node, "cube"), _name(node, "cubic")], "bent")
    yield _node(node, "Add", [x, _name(node, "bent")], "argument")
    yield _node(node, "Mul", [_name(node, "argument"), _name(node, "factor")], "scaled")
    yield _node(node, "Tanh", [_name(node, "scaled")], "tanh")
    yield from _half_of_one_plus(node, x, _name(node, "tanh"))


def _half_of_one_plus(node: onnx.NodeProto, x: str, value: str) -> Iterator[onnx.NodeProto]:
    yield _node(node, "Add", [value, _name(node, "one")], "raised")
    yield _node(node, "Mul", [x, _name(node, "raised")], "gated")
    yield _node(node, "Mul", [_name(node, "gated"), _name(node, "half")])


def _quick_gelu(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    yield _constant(node, "alpha", attribute(node, "alpha", 1.702))
    yield _node(node, "Mul", [node.input[0], _name(node, "alpha")], "scaled")
    yield _node(node, "Sigmoid", [_name(node, "scaled")], "gate")
    yield _node(node, "Mul", [node.input[0], _name(node, "gate")])


_REWRITES: dict[str, Callable[[onnx.NodeProto], Iterator[onnx.NodeProto]]] = {
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "SkipLayerNormalization": _skip_layer_norm,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
}
