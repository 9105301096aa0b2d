"""Every gradient rule against finite differences in float64, and in ONNX Runtime against the float64 result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose, op_lp_pool
from op_cases import CASES, OpCase
from op_support import CUDA_AND_TENSORRT_OPS, TARGETS, drawn_values, gradient_graph, op_graph

from fastcam.errors import ArgumentError, UnsupportedOpError
from fastcam.exporting.gradients.autodiff import backpropagate
from fastcam.exporting.gradients.table import VJPS, Step, Vjp, defvjp
from fastcam.graph import Graph, TensorType

# Their `_run` methods take other arguments than their base class declares, and so do those below.
_ConvTranspose: Any = op_conv_transpose.ConvTranspose
_LpPool: Any = op_lp_pool.LpPool


class Erf(OpRun):
    """Erf in the input's precision: onnx.reference rounds it to float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (_erf(x),)


class Gelu(OpRun):
    """Gelu in the input's precision, for the same reason; formulas of the ONNX specification."""

    op_domain = ""

    def _run(self, x: Array, approximate: str) -> tuple[Array]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + _erf(x / np.sqrt(2))),)


class ConvTranspose(_ConvTranspose):
    """ConvTranspose with groups: onnx.reference does not split the kernel into groups."""

    op_domain = ""

    def _run(self, x: Array, w: Array, b: Array | None = None, group: int = 1, **attributes: Any) -> tuple[Array]:
        base: Any = super()
        parts = zip(np.split(x, group, axis=1), np.split(w, group), strict=True)
        y = np.concatenate([base._run(*part, group=1, **attributes)[0] for part in parts], axis=1)
        return (y if b is None else y + b.reshape(-1, *[1] * (x.ndim - 2)),)


class LpPool(_LpPool):
    """LpPool with padding: onnx.reference scales the windows at the border as if they were full."""

    op_domain = ""

    def _run(self, x: Array, **attributes: Any) -> tuple[Array]:
        base: Any = super()
        return tuple(base._run(x, **{**attributes, "count_include_pad": 1}))


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[x.dtype])(x))


_EXACT_OPS = [ConvTranspose, Erf, Gelu, LpPool]
_STEP = 1e-4


def _evaluate(graph: Graph) -> Callable[[dict[str, Array]], list[Array]]:
    """Return the graph as a function in onnx.reference."""
    evaluator = ReferenceEvaluator(graph.to_model(), new_ops=_EXACT_OPS)
    return lambda inputs: [np.asarray(output) for output in evaluator.run(None, inputs)]


def _finite_differences(case: OpCase, values: dict[str, Any], upstream: dict[str, Array], variable: str) -> Array:
    """Return d sum(upstream[k] * y) / d variable for every k, by central differences in float64."""
    forward = _evaluate(op_graph(case, np.float64))
    base = values[variable]
    result: Array = np.zeros((TARGETS, *base.shape))
    for position in np.ndindex(*base.shape):
        shifted = []
        for sign in (1, -1):
            moved: Array = base.copy()
            moved[position] += sign * _STEP
            shifted.append(forward({**values, variable: moved}))
        for gradient, above, below in zip(upstream.values(), *shifted, strict=True):
            slope = (above - below) / (2 * _STEP)
            result[(slice(None), *position)] += (gradient * slope).reshape(TARGETS, -1).sum(axis=1)
    return result


def _check(case: OpCase, rng: np.random.Generator) -> None:
    values = drawn_values(case, rng)
    upstream = {
        f"g{index}": rng.normal(size=(TARGETS, *y.shape))
        for index, y in zip(case.read, _evaluate(op_graph(case, np.float64))(values), strict=True)
    }
    slopes = [_finite_differences(case, values, upstream, f"x{index}") for index in case.variables]
    exact = _evaluate(gradient_graph(case, np.float64))({**values, **upstream})
    for gradient, expected in zip(exact[len(upstream) :], slopes, strict=True):
        # Central differences: truncation of order step**2 = 1e-8 times the third derivative, rounding 1e-16 / step.
        assert relative_error(gradient, expected) < 1e-6

    graph = gradient_graph(case, np.float32)
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString())
    inputs = {name: array.astype(graph.inputs[name].dtype) for name, array in {**values, **upstream}.items()}
    for single, expected in zip(session.run(None, inputs), exact, strict=True):
        assert relative_error(single, expected) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_finite_differences(case: OpCase, rng: np.random.Generator) -> None:
    _check(case, rng)


# A staircase has no finite differences; torch's fake quantisation is the oracle (oracles/test_fake_quantization.py).
_STRAIGHT_THROUGH = {"QuantizeLinear", "DequantizeLinear"}


def test_every_rule_has_a_case() -> None:
    rules = {op: vjp for op, vjp in VJPS.items() if op not in _STRAIGHT_THROUGH}
    assert {case.op for case in CASES} == set(rules)
    covered = {(case.op, index) for case in CASES for index in case.variables}
    missing = {
        (op, index) for op, vjp in rules.items() for index, rule in enumerate(vjp.rules) if rule is not None
    } - covered
    assert not missing


# Ops of common classifiers: each must have a tested rule, with a dynamic batch.
_EXPECTED = """
    Abs Add AveragePool BatchNormalization Cast Celu Clip Concat Conv ConvTranspose DepthToSpace Div Dropout Einsum Elu
    Erf Exp Expand Flatten Gather Gelu Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish
    Identity InstanceNormalization LRN LayerNormalization LeakyRelu Log LogSoftmax LpPool MatMul Max MaxPool Mean Min
    Mish Mul Neg PRelu Pad Pow Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize Selu Sigmoid Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Unsqueeze Where
""".split()


@pytest.mark.parametrize("op", _EXPECTED)
def test_every_op_of_classifiers_is_tested_with_an_open_batch(op: str) -> None:
    assert any(case.batched for case in CASES if case.op == op)


@pytest.mark.parametrize("op", "Add Sub Mul Div Pow Min Max Sum Mean Where MatMul".split())
def test_broadcasting_is_tested_in_both_operands(op: str) -> None:
    stretched = set()
    for case in CASES:
        if case.op == op:
            shapes = [item if isinstance(item, tuple) else np.asarray(item).shape for item in case.inputs]
            outer = [shape[: len(shape) - (2 if op == "MatMul" else 0)] for shape in shapes]
            whole = np.broadcast_shapes(*outer)
            stretched |= {index for index in case.variables if outer[index] != whole}
    # Where's first input is not a number; onnx.reference sums Mean in the shape of its first input.
    assert stretched >= ({1, 2} if op in ("Where", "Mean") else {0, 1})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_emits_only_ops_that_run_on_the_gpu(case: OpCase) -> None:
    graph = gradient_graph(case, np.float32)
    assert {node.op_type for node in graph.nodes if node.name != "node"} <= CUDA_AND_TENSORRT_OPS


def _as_if(op: str, **attributes: Any) -> Vjp:
    """Return the op's rule, applied to the node with other attributes."""
    rule = VJPS[op].rules[0]
    assert rule is not None
    return Vjp((lambda s: rule(replace(s, node=_altered(s.node, attributes))),))


def _altered(node: onnx.NodeProto, attributes: dict[str, Any]) -> onnx.NodeProto:
    clone = onnx.NodeProto()
    clone.CopyFrom(node)
    kept = [item for item in node.attribute if item.name not in attributes]
    del clone.attribute[:]
    clone.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])
    return clone


_WRONG_RULES: dict[str, tuple[str, Vjp]] = {
    "relu-passes-everything": ("relu", Vjp((lambda s: s.gradient,))),
    "sub-loses-its-sign": ("sub-broadcast-right", Vjp((lambda s: s.gradient, lambda s: s.gradient), broadcasts=True)),
    "mul-swaps-its-factors": ("mul-gate", Vjp((lambda s: s.times(s.x[0]), lambda s: s.times(s.x[1])), broadcasts=True)),
    "leaky-relu-is-flat": ("leaky-relu", VJPS["Relu"]),
    "average-becomes-sum": ("reduce-mean-kept", VJPS["ReduceSum"]),
    "pow-forgets-its-exponent": ("pow-cube", Vjp((lambda s: s.times(s.x[0]), None), broadcasts=True)),
    "max-takes-the-minimum": (
        "max-three",
        Vjp((), lambda s, index: s.only_where(s.emit("Not", s.emit("Equal", s.x[index], s.y))), broadcasts=True),
    ),
    "where-swaps-its-sides": (
        "where-right",
        Vjp((None, VJPS["Where"].rules[2], VJPS["Where"].rules[1]), broadcasts=True),
    ),
    "gelu-is-swish": ("gelu", VJPS["Sigmoid"]),
    "selu-is-elu": ("selu", VJPS["Elu"]),
    "celu-is-elu": ("celu", VJPS["Elu"]),
    "mean-becomes-sum": ("mean-three", VJPS["Sum"]),
    "softmax-without-coupling": ("softmax", VJPS["Sigmoid"]),
    "log-softmax-as-softmax": ("log-softmax", VJPS["Softmax"]),
    "layer-norm-only-scales": ("layer-normalization", Vjp((lambda s: s.times(s.x[1]),))),
    "group-norm-as-identity": ("group-normalization", VJPS["Identity"]),
    "lrn-as-identity": ("lrn", VJPS["Identity"]),
    "lp-pool-as-average": ("lp-pool", VJPS["AveragePool"]),
    "l2-as-sum": ("reduce-l2", VJPS["ReduceSum"]),
    "l1-as-sum": ("reduce-l1", VJPS["ReduceSum"]),
    "minimum-as-sum": ("reduce-min", VJPS["ReduceSum"]),
    "square-as-norm": ("reduce-sum-square", VJPS["ReduceL2"]),
    "log-sum-as-sum": ("reduce-log-sum", VJPS["ReduceSum"]),
    "log-sum-exp-as-log-sum": ("reduce-log-sum-exp", VJPS["ReduceLogSum"]),
    "max-goes-everywhere": ("reduce-max", VJPS["ReduceSum"]),
    "expand-forgets-to-sum": ("expand", Vjp((lambda s: s.gradient, None))),
    "depth-to-space-in-the-other-order": ("depth-to-space-crd", _as_if("DepthToSpace", mode="DCR")),
    "resize-rounds-up": ("resize-nearest-default", _as_if("Resize", nearest_mode="ceil")),
    "resize-by-corners": ("resize-linear", _as_if("Resize", coordinate_transformation_mode="align_corners")),
    "transposed-convolution-without-groups": ("conv-transpose-groups", _as_if("ConvTranspose", group=1)),
    "split-joins-another-axis": ("split-evenly", _as_if("Split", axis=0)),
    "gather-of-another-axis": ("gather-default-axis", _as_if("Gather", axis=1)),
    "transpose-goes-forward": (
        "transpose",
        Vjp((lambda s: s.emit("Transpose", s.gradient, perm=[0, *(1 + a for a in s.attribute("perm"))]),)),
    ),
}


@pytest.mark.parametrize("fault", _WRONG_RULES)
def test_planted_wrong_rule_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    name, wrong = _WRONG_RULES[fault]
    case = next(case for case in CASES if case.name == name)
    monkeypatch.setitem(VJPS, case.op, wrong)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        _check(case, rng)


def _gradients_at(op: str, *values: Any, upstream: Any = 1, constants: tuple[Any, ...] = (), **attributes: Any) -> Any:
    """Return an op's gradients at chosen values, one target, in ONNX Runtime."""
    arrays = [np.asarray(value, np.float32) for value in values]
    case = OpCase("", op, (*(array.shape for array in arrays), *constants), attributes, batched=False)
    graph = gradient_graph(case, np.float32)
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString())
    inputs = {f"x{index}": array for index, array in enumerate(arrays)}
    shape = [int(size) for size in graph.shape("y0") if isinstance(size, int)]
    inputs["g0"] = np.broadcast_to(np.asarray(upstream, np.float32), (1, *shape))
    return [gradient[0].tolist() for gradient in session.run(None, inputs)[1:]]


def test_max_pool_gives_a_tie_to_the_first_maximum() -> None:
    tied = [[[[0, 0, 1, 3], [0, 0, 3, 3]]]]
    (gradient,) = _gradients_at("MaxPool", tied, upstream=[5, 7], kernel_shape=[2, 2], strides=[2, 2])
    assert gradient == [[[[5, 0, 0, 7], [0, 0, 0, 0]]]]


def test_global_max_pool_gives_a_tie_to_the_first_maximum() -> None:
    (gradient,) = _gradients_at("GlobalMaxPool", [[[[0, 2, 1], [2, 2, 0]], [[-1, -1, -1], [-1, -1, -1]]]])
    assert gradient == [[[[0, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]]]


def test_reduce_max_gives_a_tie_to_the_first_maximum_of_its_axes() -> None:
    tied = [[[1, 3], [0, 4]], [[3, 3], [4, 4]]]
    (gradient,) = _gradients_at("ReduceMax", tied, constants=(np.array([2, 0]),), keepdims=0)
    assert gradient == [[[0, 1], [0, 1]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_the_first_of_tied_inputs_gets_the_gradient(op: str) -> None:
    assert _gradients_at(op, [1, 2], [1, 2], [1, 2]) == [[1, 1], [0, 0], [0, 0]]


def test_relu_and_relu6_are_flat_at_their_kinks() -> None:
    assert _gradients_at("Clip", [0, 3, 6], constants=(np.float64(0), np.float64(6))) == [[0, 1, 0]]
    assert _gradients_at("Relu", [0, 1]) == [[0, 1]]


def test_what_has_no_slope_at_zero_is_flat_there() -> None:
    assert _gradients_at("Abs", [0, -2]) == [[0, -1]]
    assert _gradients_at("Sqrt", [0, 4]) == [[0, 0.25]]
    assert _gradients_at("ReduceL1", [[0, -2]], constants=(np.array([1]),)) == [[[0, -1]]]
    assert _gradients_at("ReduceL2", [[0, 0], [3, 4]], upstream=5, constants=(np.array([1]),)) == [[[0, 0], [3, 4]]]
    zero_and_one = [[[[0, 0, 1, 0]]]]
    assert _gradients_at("LpPool", zero_and_one, kernel_shape=[1, 2], strides=[1, 2]) == [zero_and_one]


def test_powers_of_zero_have_finite_gradients() -> None:
    assert _gradients_at("Pow", [0, 0, 0, 2], [0, 1, 2, 3])[0] == [0, 1, 0, 12]
    assert _gradients_at("Pow", [0, 1], [2, 5])[1] == [0, 0]


_REFUSED: dict[str, tuple[str, list[Any], dict[str, Any], str]] = {
    "gemm that transposes its input": ("Gemm", [(5, 3), (5, 4)], {"transA": 1}, "transposed"),
    "batch norm in training": (
        "BatchNormalization",
        [(2, 3, 4, 4), (3,), (3,), (3,), (3,)],
        {"training_mode": 1},
        "training",
    ),
    "column-major pooling": ("MaxPool", [(2, 3, 4, 4)], {"kernel_shape": [2, 2], "storage_order": 1}, "row-major"),
    "pad that crops": ("Pad", [(2, 3, 4, 4), -np.ones(8, np.int64)], {}, "crops"),
    "cubic resize": (
        "Resize",
        [(2, 3, 4, 4), (0,), np.array([1, 1, 2, 2], np.float32)],
        {"mode": "cubic"},
        "mode 'cubic'",
    ),
    "smoothing resize": (
        "Resize",
        [(2, 3, 4, 4), (0,), np.array([1, 1, 0.5, 0.5], np.float32)],
        {"mode": "linear", "antialias": 1},
        "antialias 1",
    ),
    "long output padding": (
        "ConvTranspose",
        [(2, 3, 4, 4), (3, 2, 3, 3)],
        {"dilations": [2, 2], "output_padding": [1, 1]},
        "output_padding",
    ),
    "diagonal": ("Einsum", [(2, 3, 3)], {"equation": "nii->ni"}, "diagonal"),
    "ellipsis": ("Einsum", [(2, 3, 4)], {"equation": "...i->..."}, "ellipsis"),
    "broadcasting einsum": ("Einsum", [(2, 1), (2, 3)], {"equation": "ni,ni->n"}, "broadcasts"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_a_variant_without_a_rule_is_refused_with_its_reason(name: str) -> None:
    op, shapes, attributes, reason = _REFUSED[name]
    net = NetworkBuilder(shapes[0])
    inputs = [net.input]
    for shape in shapes[1:]:
        if isinstance(shape, str):
            inputs.append(net.add("Relu", net.constant(np.ones((5, 4), np.float32))))
        else:
            inputs.append(net.constant(shape if isinstance(shape, np.ndarray) else np.ones(shape, np.float32)))
    graph = net.build(net.add(op, *inputs, name="y", **attributes))
    with pytest.raises(UnsupportedOpError, match=reason) as caught:
        backpropagate(graph, {"y": "g"}, [net.input])[0]
    assert op in str(caught.value)
    assert "defvjp" in str(caught.value)


def test_group_normalization_that_scales_channels_is_refused() -> None:
    net = NetworkBuilder((2, 4, 3, 3))
    net.graph.opset = 21
    weights = [net.constant(np.ones(4, np.float32)) for _ in range(2)]
    graph = net.build(net.add("GroupNormalization", net.input, *weights, num_groups=2, name="y"))
    with pytest.raises(UnsupportedOpError, match="opset 20"):
        backpropagate(graph, {"y": "g"}, [net.input])[0]


def test_defvjp_adds_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcam.exporting.gradients.table.VJPS", VJPS)
    monkeypatch.delitem(VJPS, "Abs", raising=False)

    def gradient_of_abs(step: Step) -> str:
        return step.times(step.emit("Sign", step.x[0]))

    try:
        defvjp("Abs", gradient_of_abs)
        net = NetworkBuilder((2, 3), np.float64)
        graph = net.build(net.add("Abs", net.input, name="y"))
        graph.inputs["g"] = TensorType(np.dtype(np.float64), (1, 2, 3))
        graph.outputs = [backpropagate(graph, {"y": "g"}, [net.input])[0]]
        image = np.array([[-1.0, 2, -3], [4, -5, 6]])
        (gradient,) = ReferenceEvaluator(graph.to_model()).run(None, {"image": image, "g": 2 * np.ones((1, 2, 3))})
        np.testing.assert_array_equal(gradient[0], [[-2, 2, -2], [2, -2, 2]])
    finally:
        del VJPS["Abs"]


def test_defvjp_without_a_rule_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Nothing"):
        defvjp("Nothing")
