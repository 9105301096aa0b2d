"""Gradient rules of element-wise ops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from ..table import Step, defvjp
from .common import one_for_zero

# Element-wise, one input
defvjp("Identity", lambda s: s.gradient)


defvjp("Dropout", lambda s: s.gradient)


defvjp("Relu", lambda s: s.only_where(s.emit("Greater", s.y, s.constant(0))))


defvjp("Sigmoid", lambda s: s.times(s.emit("Mul", s.y, s.emit("Sub", s.constant(1), s.y))))


defvjp("Tanh", lambda s: s.times(s.emit("Sub", s.constant(1), s.emit("Mul", s.y, s.y))))


defvjp("Neg", lambda s: s.emit("Neg", s.gradient))


defvjp("Exp", lambda s: s.times(s.y))


defvjp("Log", lambda s: s.emit("Div", s.gradient, s.x[0]))


# Step functions: the slope is 0 wherever it exists.
for _op in ("Ceil", "Floor", "Round", "Sign"):
    defvjp(_op, lambda s: s.times(s.constant(0)))


defvjp("Abs", lambda s: s.times(s.emit("Sign", s.x[0])))


def _sqrt(s: Step) -> str:
    """At 0 the slope is infinite; 0 makes that of a standard deviation or norm finite, as torch and TensorFlow do."""
    slope = s.emit("Div", s.gradient, s.emit("Mul", s.constant(2), one_for_zero(s, s.y)))
    return s.emit("Where", s.emit("Equal", s.y, s.constant(0)), s.constant(0), slope)


defvjp("Sqrt", _sqrt)


defvjp("Reciprocal", lambda s: s.emit("Neg", s.times(s.emit("Mul", s.y, s.y))))


defvjp("Softplus", lambda s: s.times(s.emit("Sigmoid", s.x[0])))


def _clip(s: Step) -> str:
    """Strictly inside the bounds, like ReLU6 in TensorFlow and PyTorch."""
    comparisons = zip(("Greater", "Less"), s.x[1:3], strict=False)
    conditions = [s.emit(comparison, s.y, bound) for comparison, bound in comparisons if bound]
    if not conditions:
        return s.gradient
    return s.only_where(conditions[0] if len(conditions) == 1 else s.emit("And", *conditions))


def _left_slope(s: Step, slope: str) -> str:
    """Slope 1 for positive inputs, ``slope`` for the others."""
    return s.emit("Where", s.emit("Greater", s.x[0], s.constant(0)), s.gradient, s.times(slope))


def _leaky_relu(s: Step) -> str:
    return _left_slope(s, s.constant(s.attribute("alpha", 0.01)))


def _thresholded_relu(s: Step) -> str:
    return s.only_where(s.emit("Greater", s.x[0], s.constant(s.attribute("alpha", 1.0))))


def _elu(s: Step) -> str:
    """Left of 0, y = alpha * (e^x - 1) has the slope y + alpha."""
    return _left_slope(s, s.emit("Add", s.y, s.constant(s.attribute("alpha", 1.0))))


def _celu(s: Step) -> str:
    """Left of 0, y = alpha * (e^(x/alpha) - 1) has the slope y/alpha + 1."""
    return _left_slope(s, s.emit("Add", s.emit("Div", s.y, s.constant(s.attribute("alpha", 1.0))), s.constant(1)))


def _selu(s: Step) -> str:
    """Gamma times the Elu of Klambauer et al. 2017; the defaults are theirs, as ONNX rounds them."""
    alpha, gamma = s.attribute("alpha", 1.67326319217681884765625), s.attribute("gamma", 1.05070102214813232421875)
    left = s.emit("Add", s.y, s.constant(alpha * gamma))
    return s.times(s.emit("Where", s.emit("Greater", s.x[0], s.constant(0)), s.constant(gamma), left))


def _softsign(s: Step) -> str:
    """1 / (1 + |x|)^2."""
    denominator = s.emit("Add", s.constant(1), s.emit("Abs", s.x[0]))
    return s.emit("Div", s.gradient, s.emit("Mul", denominator, denominator))


def _bell(s: Step, scale: float, width: float) -> str:
    """Scale * e^(-width x^2)."""
    square = s.emit("Mul", s.x[0], s.x[0])
    return s.emit("Mul", s.constant(scale), s.emit("Exp", s.emit("Mul", s.constant(-width), square)))


def _gelu(s: Step) -> str:
    return s.times(_GELU_SLOPES[s.attribute("approximate", "none")](s))


def _gelu_slope(s: Step) -> str:
    """Phi(x) + x * phi(x), with the normal distribution's Phi and its density phi."""
    error = s.emit("Erf", s.emit("Mul", s.x[0], s.constant(math.sqrt(0.5))))
    distribution = s.emit("Mul", s.constant(0.5), s.emit("Add", s.constant(1), error))
    return s.emit("Add", distribution, s.emit("Mul", s.x[0], _bell(s, 1 / math.sqrt(2 * math.pi), 0.5)))


def _gelu_tanh_slope(s: Step) -> str:
    """With t = tanh(c x (1 + a x^2)): (1 + t)/2 + x/2 * (1 - t^2) * c (1 + 3 a x^2)."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = s.emit("Mul", s.x[0], s.x[0])

    def polynomial(factor: float) -> str:
        inner = s.emit("Add", s.constant(scale), s.emit("Mul", s.constant(factor * scale), square))
        return s.emit("Mul", s.x[0], inner)

    tanh = s.emit("Tanh", polynomial(cubic))
    bend = s.emit("Mul", polynomial(3 * cubic), s.emit("Sub", s.constant(1), s.emit("Mul", tanh, tanh)))
    return s.emit("Mul", s.constant(0.5), s.emit("Add", s.emit("Add", s.constant(1), tanh), bend))


_GELU_SLOPES: dict[str, Callable[[Step], str]] = {"none": _gelu_slope, "tanh": _gelu_tanh_slope}


def _mish(s: Step) -> str:
    """With t = tanh(softplus(x)), y = x t: t + x (1 - t^2) sigmoid(x)."""
    tanh = s.emit("Tanh", s.emit("Softplus", s.x[0]))
    bend = s.emit("Mul", s.emit("Sub", s.constant(1), s.emit("Mul", tanh, tanh)), s.emit("Sigmoid", s.x[0]))
    return s.times(s.emit("Add", tanh, s.emit("Mul", s.x[0], bend)))


def _cast(s: Step) -> str:
    return s.emit("Cast", s.gradient, to=onnx.helper.np_dtype_to_tensor_dtype(s.graph.type(s.x[0]).dtype))


def _hard_sigmoid(s: Step) -> str:
    inside = s.emit("And", s.emit("Greater", s.y, s.constant(0)), s.emit("Less", s.y, s.constant(1)))
    return s.emit("Where", inside, s.times(s.constant(s.attribute("alpha", 0.2))), s.constant(0))


def _hard_swish(s: Step) -> str:
    """X * clip(x/6 + 1/2, 0, 1): slope x/3 + 1/2 between -3 and 3, 1 above, 0 below."""
    slope = s.emit("Add", s.emit("Div", s.x[0], s.constant(3)), s.constant(0.5))
    below, above = s.emit("Less", s.x[0], s.constant(3)), s.emit("Greater", s.x[0], s.constant(-3))
    lower = s.emit("Where", above, s.times(slope), s.constant(0))
    return s.emit("Where", below, lower, s.gradient)


def _quantize(s: Step) -> str:
    """Straight-through: a rounded number passes its gradient through, a saturated one has none.

    Rounding has slope 0 almost everywhere, which would explain nothing; in the original float network only the
    clipping has a slope (Bengio et al. 2013, Jacob et al. 2018, section 3). The gradient of a quantised number
    is that of the real number it represents.
    """
    kind = s.graph.type(s.y).dtype
    limits, scale, zero = np.iinfo(kind), s.fixed(s.x[1]), s.fixed_or(2, np.zeros(1, kind)).astype(np.float64)
    shape = [1] * s.rank(s.x[0]) if scale.size > 1 else []
    if shape:
        shape[s.attribute("axis", 1)] = scale.size
    bounds = [((limit - zero) * scale).astype(scale.dtype).reshape(shape) for limit in (limits.min, limits.max)]
    lowest, highest = (s.graph.emit_constant(bound, stem="gradient/bound") for bound in bounds)
    # The bounds count as inside: what a ReLU of the float network clipped to 0 lies exactly on one.
    inside = s.emit("And", s.emit("GreaterOrEqual", s.x[0], lowest), s.emit("LessOrEqual", s.x[0], highest))
    return s.emit("Where", inside, s.gradient, s.graph.emit_constant(np.zeros((), scale.dtype)))


def _dequantize(s: Step) -> str:
    quantized = s.graph.producer(s.x[0])
    if quantized is None or quantized.op_type != "QuantizeLinear":
        s.refuse("what it reads was not quantised by QuantizeLinear")
    if not np.array_equal(s.fixed(quantized.input[1]), s.fixed(s.x[1])):
        s.refuse("its scale is not that of the QuantizeLinear before it")
    return s.gradient


defvjp("QuantizeLinear", _quantize, None, None)


defvjp("DequantizeLinear", _dequantize, None, None)


defvjp("Clip", _clip, None, None)


defvjp("LeakyRelu", _leaky_relu)


defvjp("ThresholdedRelu", _thresholded_relu)


defvjp("Elu", _elu)


defvjp("Celu", _celu)


defvjp("Selu", _selu)


defvjp("Softsign", _softsign)


defvjp("Erf", lambda s: s.times(_bell(s, 2 / math.sqrt(math.pi), 1)))


defvjp("Gelu", _gelu)


defvjp("Mish", _mish)


defvjp("Cast", _cast)


defvjp("HardSigmoid", _hard_sigmoid)


defvjp("HardSwish", _hard_swish)


# Element-wise, two or more inputs
def _div_divisor(s: Step) -> str:
    return s.emit("Neg", s.emit("Div", s.times(s.y), s.x[1]))


def _pow_base(s: Step) -> str:
    """A * x^(a-1); 0 for a = 0 even at x = 0, where the formula has no value."""
    exponent = _exponent(s)
    if exponent in s.graph.constants and (s.graph.constants[exponent] == 2).all():
        return s.times(s.emit("Mul", exponent, s.x[0]))
    slope = s.emit("Mul", exponent, s.emit("Pow", s.x[0], s.emit("Sub", exponent, s.constant(1))))
    return s.emit("Where", s.emit("Equal", exponent, s.constant(0)), s.constant(0), s.times(slope))


def _pow_exponent(s: Step) -> str:
    """Y * log(x); 0 where the base is 0, as in PyTorch."""
    zero = s.emit("Equal", s.x[0], s.constant(0))
    slope = s.emit("Mul", s.y, s.emit("Log", s.emit("Where", zero, s.constant(1), s.x[0])))
    return s.times(slope)


def _exponent(s: Step) -> str:
    """Return the exponent in the base's type: ONNX allows a different one."""
    kind = s.graph.type(s.y).dtype
    if s.x[1] in s.graph.constants:
        return s.constant(s.graph.constants[s.x[1]])
    if s.graph.type(s.x[1]).dtype == kind:
        return s.x[1]
    return s.emit("Cast", s.x[1], to=onnx.helper.np_dtype_to_tensor_dtype(kind))


def _first_extreme(s: Step, index: int) -> str:
    """Where inputs tie, the first one gets the gradient."""
    chosen = s.emit("Equal", s.x[index], s.y)
    for earlier in s.x[:index]:
        chosen = s.emit("And", chosen, s.emit("Not", s.emit("Equal", earlier, s.y)))
    return s.only_where(chosen)


def _mean(s: Step, index: int) -> str:
    return s.times(s.constant(1 / len(s.x)))


def _prelu_slope(s: Step) -> str:
    positive = s.emit("Greater", s.x[0], s.constant(0))
    return s.emit("Where", positive, s.constant(0), s.times(s.x[0]))


def _where_not(s: Step) -> str:
    return s.emit("Where", s.x[0], s.constant(0), s.gradient)


defvjp("Add", lambda s: s.gradient, lambda s: s.gradient, broadcasts=True)


defvjp("Sub", lambda s: s.gradient, lambda s: s.emit("Neg", s.gradient), broadcasts=True)


defvjp("Mul", lambda s: s.times(s.x[1]), lambda s: s.times(s.x[0]), broadcasts=True)


defvjp("Div", lambda s: s.emit("Div", s.gradient, s.x[1]), _div_divisor, broadcasts=True)


defvjp("Pow", _pow_base, _pow_exponent, broadcasts=True)


defvjp("PRelu", lambda s: _left_slope(s, s.x[1]), _prelu_slope, broadcasts=True)


defvjp("Where", None, lambda s: s.only_where(s.x[0]), _where_not, broadcasts=True)


defvjp("Sum", variadic=lambda s, index: s.gradient, broadcasts=True)


defvjp("Mean", variadic=_mean, broadcasts=True)


defvjp("Max", variadic=_first_extreme, broadcasts=True)


defvjp("Min", variadic=_first_extreme, broadcasts=True)
