"""The table of gradient rules: one short vector-Jacobian product (VJP) per input of an ONNX op.

A rule gets a `Step`, one node of the forward pass together with the gradient of its output, and emits the nodes that
give the gradient of one input. Every gradient carries one leading axis more than its value: K, the targets. A value of
shape (N,C,h,w) has a gradient of shape (K,N,C,h,w), so element-wise rules work by broadcasting alone and the forward
values are never repeated.

The emitted nodes are ones that ONNX Runtime's CUDA provider and TensorRT run: no MaxUnpool, Col2Im or Scatter.
Sums over broadcast axes, accumulation and the choice of path belong to the engine, `autodiff`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import onnx

from .errors import ArgumentError, UnsupportedOpError
from .graph import Array, Dim, Graph, attribute, static_dims

Rule: TypeAlias = "Callable[[Step], str]"
VariadicRule: TypeAlias = "Callable[[Step, int], str]"


@dataclass(frozen=True)
class Step:
    r"""One node of the forward pass as its gradient rule sees it.

    Attributes
    ----------
    graph : Graph
        Where the rule emits its nodes.
    node : onnx.NodeProto
    gradients : tuple of (str or None)
        Gradient of each of the node's outputs, shape (K, \*output shape); None where nothing depends on the output.
    """

    graph: Graph
    node: onnx.NodeProto
    gradients: tuple[str | None, ...]

    @property
    def gradient(self) -> str:
        r"""Gradient of the node's first output, shape (K, \*output shape); refuses the node when another has one."""
        first, *others = self.gradients
        if first is None or any(others):
            self.refuse("the gradient arrives at another output than its first")
        return first

    @property
    def x(self) -> list[str]:
        """Names of the node's inputs."""
        return list(self.node.input)

    @property
    def y(self) -> str:
        """Name of the node's output."""
        return str(self.node.output[0])

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the node."""
        return attribute(self.node, name, default)

    def shape(self, value: str) -> tuple[Dim, ...]:
        """Return the shape of a forward value."""
        return self.graph.shape(value)

    def rank(self, value: str) -> int:
        """Return the number of dimensions of a forward value."""
        return len(self.graph.shape(value))

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        return self.graph.emit(op, *inputs, stem=f"gradient/{self.node.name or self.y}/{op}", **attributes)

    def constant(self, array: npt.ArrayLike) -> str:
        """Add a constant of the element type of the node's output."""
        return self.graph.emit_constant(
            np.asarray(array, self.graph.type(self.y).dtype), stem=f"gradient/{self.node.name or self.y}/constant"
        )

    def integers(self, *numbers: int) -> str:
        """Add a constant of int64 numbers."""
        return self.graph.emit_constant(np.array(numbers, np.int64), stem="gradient/integers")

    def fixed(self, value: str) -> Array:
        """Return the array of a constant input; refuses the node when it is computed."""
        if value not in self.graph.constants:
            self.refuse(f"input {value!r} is computed; the rule needs a constant")
        return self.graph.constants[value]

    def fixed_or(self, index: int, default: npt.ArrayLike) -> Array:
        """Return the array of an optional constant input, ``default`` where it is left out."""
        given = index < len(self.x) and self.x[index]
        return self.fixed(given) if given else np.asarray(default)

    def only_where(self, condition: str) -> str:
        """Return the gradient where ``condition`` holds, 0 elsewhere."""
        return self.emit("Where", condition, self.gradient, self.constant(0))

    def times(self, factor: str) -> str:
        """Return the gradient times ``factor``."""
        return self.emit("Mul", self.gradient, factor)

    def axis(self, default: int = -1) -> int:
        """Return the attribute ``axis`` as a negative number, which means the same on a value and on its gradient."""
        axis = int(self.attribute("axis", default))
        return axis - self.rank(self.x[0]) if axis >= 0 else axis

    def refuse(self, reason: str) -> NoReturn:
        """Raise UnsupportedOpError for this node."""
        raise UnsupportedOpError(
            f"op {self.node.op_type!r} (node {self.node.name or self.y!r}) has no gradient here: {reason}. "
            "Explain a later layer, or register a rule with fastcam.defvjp."
        )


@dataclass(frozen=True)
class Vjp:
    """The rules of one op.

    Attributes
    ----------
    rules : tuple of (callable or None)
        One rule an input; None where the op has no gradient for it.
    variadic : callable or None
        The rule of every input beyond, given the input's index.
    broadcasts : bool
        The op follows NumPy's broadcasting: its rules give gradients of the output's shape, and the engine sums them
        down to the input's.
    core_axes : int
        Trailing axes that take no part in the broadcasting (2 for a matrix product).
    """

    rules: tuple[Rule | None, ...]
    variadic: VariadicRule | None = None
    broadcasts: bool = False
    core_axes: int = 0

    def rule(self, index: int) -> Rule | None:
        """Return the rule of one input, None where there is none."""
        if index < len(self.rules):
            return self.rules[index]
        variadic = self.variadic
        return None if variadic is None else lambda step: variadic(step, index)


VJPS: dict[str, Vjp] = {}


def defvjp(
    op: str, *rules: Rule | None, variadic: VariadicRule | None = None, broadcasts: bool = False, core_axes: int = 0
) -> None:
    r"""Register the gradient of an ONNX op.

    Parameters
    ----------
    op : str
        Op type of the default ONNX domain, for example "Relu".
    *rules : callable or None
        One for each input in turn: takes a `Step`, emits nodes, returns the name of the input's gradient, whose shape
        is (K, \*input shape). None: the input has no gradient.
    variadic : callable, optional
        For ops of any number of inputs: takes the `Step` and the input's index.
    broadcasts : bool
        True for ops of several inputs that follow NumPy's broadcasting: the rules then return gradients of the
        output's shape.
    core_axes : int
        Trailing axes that take no part in the broadcasting: 2 for a matrix product.

    Raises
    ------
    ArgumentError
        When no rule is given.

    Examples
    --------
    The gradient of y = x**3 in a model that holds the op "Cube":

    >>> def cube(step):
    ...     return step.times(step.emit("Mul", step.constant(3), step.emit("Mul", step.x[0], step.x[0])))
    >>> defvjp("Cube", cube)
    """
    if not rules and variadic is None:
        raise ArgumentError(f"defvjp({op!r}) needs a rule for at least one input")
    VJPS[op] = Vjp(rules, variadic, broadcasts, core_axes)


# Element-wise, one input

defvjp("Identity", lambda s: s.gradient)
defvjp("Dropout", lambda s: s.gradient)
defvjp("Relu", lambda s: s.only_where(s.emit("Greater", s.y, s.constant(0))))
defvjp("Sigmoid", lambda s: s.times(s.emit("Mul", s.y, s.emit("Sub", s.constant(1), s.y))))
defvjp("Tanh", lambda s: s.times(s.emit("Sub", s.constant(1), s.emit("Mul", s.y, s.y))))
defvjp("Neg", lambda s: s.emit("Neg", s.gradient))
defvjp("Exp", lambda s: s.times(s.y))
defvjp("Log", lambda s: s.emit("Div", s.gradient, s.x[0]))
# Steps: flat wherever they have a slope.
for _op in ("Ceil", "Floor", "Round", "Sign"):
    defvjp(_op, lambda s: s.times(s.constant(0)))
defvjp("Abs", lambda s: s.times(s.emit("Sign", s.x[0])))
defvjp("Sqrt", lambda s: s.emit("Div", s.gradient, s.emit("Mul", s.constant(2), s.y)))
defvjp("Reciprocal", lambda s: s.emit("Neg", s.times(s.emit("Mul", s.y, s.y))))
defvjp("Softplus", lambda s: s.times(s.emit("Sigmoid", s.x[0])))


def _clip(s: Step) -> str:
    """Strictly inside the bounds, as TensorFlow's and PyTorch's ReLU6."""
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
    """Straight-through: a number that is rounded hands its gradient on, one that saturates has none.

    Rounding has slope 0 almost everywhere, which would explain nothing; the float network that was quantised has the
    slope of the clipping alone (Bengio et al. 2013, Jacob et al. 2018, section 3). The gradient of a quantised number
    is that of the real one that it stands for.
    """
    kind = s.graph.type(s.y).dtype
    limits, scale, zero = np.iinfo(kind), s.fixed(s.x[1]), s.fixed_or(2, np.zeros(1, kind)).astype(np.float64)
    shape = [1] * s.rank(s.x[0]) if scale.size > 1 else []
    if shape:
        shape[s.attribute("axis", 1)] = scale.size
    bounds = [((limit - zero) * scale).astype(scale.dtype).reshape(shape) for limit in (limits.min, limits.max)]
    lowest, highest = (s.graph.emit_constant(bound, stem="gradient/bound") for bound in bounds)
    # The bounds themselves are inside: what was clipped to 0 before, by a ReLU of the float network, is exactly there.
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


# Element-wise, two inputs and more


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
    """Return the exponent in the base's type: ONNX lets it have another."""
    kind = s.graph.type(s.y).dtype
    if s.x[1] in s.graph.constants:
        return s.constant(s.graph.constants[s.x[1]])
    if s.graph.type(s.x[1]).dtype == kind:
        return s.x[1]
    return s.emit("Cast", s.x[1], to=onnx.helper.np_dtype_to_tensor_dtype(kind))


def _first_extreme(s: Step, index: int) -> str:
    """Where inputs tie, the first of them gets the gradient."""
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


# Matrix products


def _matmul_left(s: Step) -> str:
    """G B^T; a constant matrix is read in place, transposed by Gemm, so that the file does not hold it twice."""
    if s.x[1] in s.graph.constants and s.rank(s.x[1]) == 2:
        return _times_matrix(s, s.gradient, s.x[1], transposed=True)
    return s.emit("MatMul", s.gradient, _swapped(s, s.x[1]))


def _matmul_right(s: Step) -> str:
    return s.emit("MatMul", _swapped(s, s.x[0]), s.gradient)


def _gemm(s: Step) -> str:
    """Alpha * G B'^T, where B' is what Gemm multiplies by."""
    if s.attribute("transA", 0):
        s.refuse("its first input is transposed")
    gradient = _times_matrix(s, s.gradient, s.x[1], transposed=not s.attribute("transB", 0))
    alpha = s.attribute("alpha", 1.0)
    return gradient if alpha == 1 else s.emit("Mul", gradient, s.constant(alpha))


def _gemm_bias(s: Step) -> str:
    if s.shape(s.x[2]) != s.shape(s.y):
        s.refuse("what it adds is computed, and of another shape than its output")
    beta = s.attribute("beta", 1.0)
    return s.gradient if beta == 1 else s.times(s.constant(beta))


def _times_matrix(s: Step, value: str, matrix: str, *, transposed: bool) -> str:
    """Return ``value`` (K,N,...,U) times a matrix (U,V), or the transpose of a (V,U) one."""
    if not transposed:
        return s.emit("MatMul", value, matrix)
    rows, columns = static_dims(s.graph, matrix, (0, 1))
    flat = s.emit("Reshape", value, s.integers(-1, columns))
    product = s.emit("Gemm", flat, matrix, transB=1)
    lead = s.emit("Shape", value, start=0, end=-1)
    return s.emit("Reshape", product, s.emit("Concat", lead, s.integers(rows), axis=0))


def _swapped(s: Step, matrix: str) -> str:
    rank = s.rank(matrix)
    if rank < 2:
        s.refuse("it multiplies by a vector")
    return s.emit("Transpose", matrix, perm=[*range(rank - 2), rank - 1, rank - 2])


def _einsum(s: Step, index: int) -> str:
    """Exchange the operand and the result; labels that only the operand has are sums, and their gradient is spread."""
    terms, result = _equation(s)
    operand, others = terms[index], [term for position, term in enumerate(terms) if position != index]
    lead = next(letter for letter in string.ascii_letters if letter not in "".join([*terms, result]))
    shared = set(result).union(*others)
    reached = "".join(label for label in operand if label in shared)
    equation = f"{','.join([lead + result, *others])}->{lead}{reached}"
    factors = [name for position, name in enumerate(s.x) if position != index]
    gradient = s.emit("Einsum", s.gradient, *factors, equation=equation)
    summed = [place - len(operand) for place, label in enumerate(operand) if label not in shared]
    if not summed:
        return gradient
    return _stretched(s, s.emit("Unsqueeze", gradient, s.integers(*summed)), s.x[index], summed)


def _equation(s: Step) -> tuple[list[str], str]:
    """Return the labels of the operands and of the result."""
    left, arrow, right = s.attribute("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or any(len(set(term)) < len(term) for term in terms):
        s.refuse(f"its equation {left!r} has an ellipsis or a diagonal")
    sizes: dict[str, Dim] = {}
    for term, name in zip(terms, s.x, strict=True):
        for label, size in zip(term, s.shape(name), strict=True):
            if 1 in {size, sizes.setdefault(label, size)} and sizes[label] != size:
                s.refuse(f"it broadcasts along {label!r}")
    labels = left.replace(",", "")
    return terms, right if arrow else "".join(sorted(label for label in set(labels) if labels.count(label) == 1))


defvjp("MatMul", _matmul_left, _matmul_right, broadcasts=True, core_axes=2)
defvjp("Gemm", _gemm, None, _gemm_bias)
defvjp("Einsum", variadic=_einsum)


# Convolution and pooling


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pooling over the spatial axes.

    Along each axis, output position o reads the inputs o * stride - begin + i * dilation, for i in the kernel.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @cached_property
    def overhang(self) -> tuple[int, ...]:
        """How far the last window reaches beyond the input; negative: how much of the input no window reads."""
        return tuple(
            (count - 1) * stride + (size - 1) * dilation + 1 - begin - length
            for count, stride, size, dilation, begin, length in zip(
                self.outputs, self.strides, self.kernel, self.dilations, self.begin, self.inputs, strict=True
            )
        )

    @property
    def end(self) -> tuple[int, ...]:
        """Padding that the windows really read after the input."""
        return tuple(max(0, overhang) for overhang in self.overhang)

    def scatter_attributes(self) -> dict[str, Any]:
        """Return the attributes of the ConvTranspose that spreads the outputs back over the inputs."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": [*self.begin, *self.end],
            "output_padding": [max(0, -overhang) for overhang in self.overhang],
        }

    def starts(self) -> list[tuple[int, ...]]:
        """Return the offset of every kernel element in row-major order, in the padded input."""
        return [
            tuple(index * dilation for index, dilation in zip(indices, self.dilations, strict=True))
            for indices in np.ndindex(*self.kernel)
        ]


def _window(s: Step, kernel: tuple[int, ...]) -> Window:
    axes = range(2, 2 + len(kernel))
    inputs, outputs = static_dims(s.graph, s.x[0], axes), static_dims(s.graph, s.y, axes)
    ones = [1] * len(kernel)
    strides, dilations = tuple(s.attribute("strides", ones)), tuple(s.attribute("dilations", ones))
    pads = s.attribute("pads", [0] * 2 * len(kernel))
    window = Window(kernel, strides, dilations, tuple(pads[: len(kernel)]), inputs, outputs)
    mode = s.attribute("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        window = _padded_to_same(s, window, mode)
    last = [(count - 1) * stride for count, stride in zip(outputs, strides, strict=True)]
    if any(start >= begin + size for start, begin, size in zip(last, window.begin, inputs, strict=True)):
        s.refuse("its last window starts behind the input, which runtimes leave out")
    return window


def _padded_to_same(s: Step, window: Window, mode: str) -> Window:
    """Return the window with the padding that "same" stands for: as much as the outputs need, half on either side."""
    bare = dataclasses.replace(window, begin=(0,) * len(window.kernel))
    # ONNX says nothing of either, and runtimes differ.
    if max(window.dilations) > 1:
        s.refuse(f"auto_pad={mode} with dilations")
    if min(bare.overhang) < 0:
        s.refuse(f"auto_pad={mode} with strides that leave pixels out")
    return dataclasses.replace(
        window, begin=tuple(size // 2 if mode == "SAME_UPPER" else (size + 1) // 2 for size in bare.overhang)
    )


def _conv(s: Step) -> str:
    kernel = static_dims(s.graph, s.x[1], range(2, s.rank(s.x[1])))
    channels = static_dims(s.graph, s.y, [1])
    window = _window(s, kernel)
    flat = s.emit("Reshape", s.gradient, s.integers(-1, *channels, *window.outputs))
    spread = s.emit("ConvTranspose", flat, s.x[1], group=s.attribute("group", 1), **window.scatter_attributes())
    return _with_lead(s, spread, static_dims(s.graph, s.x[0], [1]) + window.inputs)


def _conv_transpose(s: Step) -> str:
    """The gradient of a transposed convolution is the convolution that it transposes."""
    kernel = static_dims(s.graph, s.x[1], range(2, s.rank(s.x[1])))
    window = _transposed_window(s, kernel)
    if any(-rest >= stride for rest, stride in zip(window.overhang, window.strides, strict=True)):
        s.refuse("output_padding is as long as a stride")
    flat = s.emit("Reshape", s.gradient, s.integers(-1, *static_dims(s.graph, s.y, [1]), *window.inputs))
    gathered = s.emit(
        "Conv",
        flat,
        s.x[1],
        group=s.attribute("group", 1),
        kernel_shape=list(kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.begin, *window.end],
    )
    return _with_lead(s, gathered, static_dims(s.graph, s.x[0], [1]) + window.outputs)


def _transposed_window(s: Step, kernel: tuple[int, ...]) -> Window:
    """Return the geometry of the convolution that a ConvTranspose transposes: it reads y and makes x."""
    axes = range(2, 2 + len(kernel))
    large, small = static_dims(s.graph, s.y, axes), static_dims(s.graph, s.x[0], axes)
    ones, zeros = [1] * len(kernel), (0,) * len(kernel)
    strides, dilations = tuple(s.attribute("strides", ones)), tuple(s.attribute("dilations", ones))
    mode = s.attribute("auto_pad", "NOTSET")
    if mode == "VALID" or not (mode.startswith("SAME") or s.attribute("output_shape")):
        begin = tuple(s.attribute("pads", zeros)[: len(kernel)])
        return Window(kernel, strides, dilations, begin, large, small)
    added = s.attribute("output_padding", zeros)
    overhang = Window(kernel, strides, dilations, zeros, large, small).overhang
    total = [size + extra for size, extra in zip(overhang, added, strict=True)]
    begin = tuple(size // 2 if mode == "SAME_UPPER" else size - size // 2 for size in total)
    return Window(kernel, strides, dilations, begin, large, small)


def _with_lead(s: Step, value: str, tail: tuple[int, ...]) -> str:
    """Reshape ``value`` to (K, N, *tail)."""
    lead = s.emit("Shape", s.gradient, start=0, end=2)
    return s.emit("Reshape", value, s.emit("Concat", lead, s.integers(*tail), axis=0))


def _max_pool(s: Step) -> str:
    """Each window's gradient goes to its first maximum in row-major order, as in TensorFlow and PyTorch."""
    if s.attribute("storage_order", 0):
        s.refuse("storage_order=1 is not row-major")
    window = _window(s, tuple(s.attribute("kernel_shape")))
    size = math.prod(window.kernel)
    first = s.emit("ArgMax", _stacked_windows(s, window), axis=2, keepdims=1)
    offsets = s.graph.emit_constant(np.arange(size, dtype=np.int64).reshape(-1, *[1] * len(window.kernel)))
    chosen = s.emit("Equal", first, offsets)
    gradient = s.emit("Unsqueeze", s.gradient, s.integers(3))
    routed = s.emit("Where", chosen, gradient, s.constant(0))
    one_hot = np.eye(size).reshape(size, 1, *window.kernel)
    return _scatter(s, routed, window, one_hot)


def _stacked_windows(s: Step, window: Window) -> str:
    """Return the input's windows as (N, C, kernel elements, *outputs)."""
    source = s.x[0]
    if any(window.begin) or any(window.end):
        lowest = s.constant(np.finfo(s.graph.type(source).dtype).min)
        source = s.emit("Pad", source, s.integers(0, 0, *window.begin, 0, 0, *window.end), lowest)
    axes = s.integers(*range(2, 2 + len(window.kernel)))
    slices = []
    for start in window.starts():
        stop = [
            first + (count - 1) * stride + 1
            for first, count, stride in zip(start, window.outputs, window.strides, strict=True)
        ]
        part = s.emit("Slice", source, s.integers(*start), s.integers(*stop), axes, s.integers(*window.strides))
        slices.append(s.emit("Unsqueeze", part, s.integers(2)))
    return s.emit("Concat", *slices, axis=2)


def _average_pool(s: Step) -> str:
    window = _window(s, tuple(s.attribute("kernel_shape")))
    shares = s.times(s.constant(1 / _window_counts(s, window)))
    return _scatter(s, shares, window, np.ones((1, 1, *window.kernel)))


def _window_counts(s: Step, window: Window) -> Array:
    """Return how many elements each window averages over, shape ``outputs``."""
    # Padding that was asked for may count; what ceil_mode adds beyond it never does.
    asked = list(s.attribute("pads", [0] * 2 * len(window.kernel)))[len(window.kernel) :]
    if s.attribute("auto_pad", "NOTSET") != "NOTSET":
        asked = list(window.end)
    counts = np.ones(())
    for axis, length in enumerate(window.inputs):
        low, high = 0, length
        if s.attribute("count_include_pad", 0):
            low, high = -window.begin[axis], length + asked[axis]
        read = (
            np.arange(window.outputs[axis])[:, None] * window.strides[axis]
            - window.begin[axis]
            + np.arange(window.kernel[axis]) * window.dilations[axis]
        )
        counts = np.multiply.outer(counts, ((read >= low) & (read < high)).sum(axis=1))
    return counts


def _scatter(s: Step, gradient: str, window: Window, kernel: Array) -> str:
    """Spread a gradient of the windows (..., kernel.shape[0], *outputs) over the input, channel by channel."""
    flat = s.emit("Reshape", gradient, s.integers(-1, kernel.shape[0], *window.outputs))
    spread = s.emit("ConvTranspose", flat, s.constant(kernel), **window.scatter_attributes())
    return _with_lead(s, spread, static_dims(s.graph, s.x[0], [1]) + window.inputs)


def _lp_pool(s: Step) -> str:
    """Y = (sum |x|^p)^(1/p) has the slope sign(x) (|x|/y)^(p-1)."""
    window = _window(s, tuple(s.attribute("kernel_shape")))
    exponent = s.attribute("p", 2) - 1
    shares = s.emit("Div", s.gradient, _signed_power(s, _one_for_zero(s, s.y), exponent))
    return s.emit(
        "Mul",
        _scatter(s, shares, window, np.ones((1, 1, *window.kernel))),
        _signed_power(s, s.x[0], exponent),
    )


def _one_for_zero(s: Step, norm: str) -> str:
    """Return a norm fit to divide by: where it is 0, all that it was taken of is 0, and so is its gradient."""
    return s.emit("Where", s.emit("Equal", norm, s.constant(0)), s.constant(1), norm)


def _signed_power(s: Step, value: str, exponent: int) -> str:
    """Sign(x) * |x|^exponent."""
    if exponent == 1:
        return value
    power = s.emit("Pow", s.emit("Abs", value), s.constant(exponent))
    return s.emit("Mul", s.emit("Sign", value), power)


def _global_max_pool(s: Step) -> str:
    axes = list(range(2 - s.rank(s.x[0]), 0))
    return s.emit("Where", _first_equal(s, s.y, axes), s.gradient, s.constant(0))


def _first_equal(s: Step, extreme: str, axes: list[int]) -> str:
    """Return where the input first equals its ``extreme`` over ``axes``, in row-major order."""
    sizes = static_dims(s.graph, s.x[0], axes)
    places: Array = np.ones(s.rank(s.x[0]), np.int64)
    places[axes] = sizes
    # Ranks fall along the axes, so that ReduceMax finds the first; float32 counts exactly up to 2**24.
    ranks = s.graph.emit_constant(np.arange(math.prod(sizes), 0, -1, dtype=np.float32).reshape(places))
    none = s.graph.emit_constant(np.float32(0))
    candidates = s.emit("Where", s.emit("Equal", s.x[0], extreme), ranks, none)
    return s.emit("Equal", candidates, s.emit("ReduceMax", candidates, s.integers(*axes), keepdims=1))


def _global_average_pool(s: Step) -> str:
    spatial = static_dims(s.graph, s.x[0], range(2, s.rank(s.x[0])))
    return s.times(s.constant(np.full(spatial, 1 / math.prod(spatial))))


def _batch_normalization(s: Step) -> str:
    if s.attribute("training_mode", 0):
        s.refuse("it is in training mode")
    gamma, variance = (s.fixed(name).astype(np.float64) for name in (s.x[1], s.x[4]))
    scale = gamma / np.sqrt(variance + s.attribute("epsilon", 1e-5))
    return s.times(s.constant(scale.reshape(-1, *[1] * (s.rank(s.x[0]) - 2))))


defvjp("Conv", _conv, None, None)
defvjp("ConvTranspose", _conv_transpose, None, None)
defvjp("MaxPool", _max_pool)
defvjp("AveragePool", _average_pool)
defvjp("LpPool", _lp_pool)
defvjp("GlobalAveragePool", _global_average_pool)
defvjp("GlobalMaxPool", _global_max_pool)
defvjp("BatchNormalization", _batch_normalization, None, None, None, None)


# Normalisation over values of the same image


def _layer_normalization(s: Step) -> str:
    return _normalization(s, s.x[0], s.times(s.x[1]), list(range(s.axis(), 0)))


def _group_normalization(s: Step) -> str:
    if s.graph.opset > 20:
        s.refuse("from opset 21 on it scales channels instead of groups; convert the model to opset 20")
    return _normalization_of_groups(s, s.attribute("num_groups"))


def _instance_normalization(s: Step) -> str:
    """Every channel is a group of its own."""
    return _normalization_of_groups(s, *static_dims(s.graph, s.x[0], [1]))


def _normalization_of_groups(s: Step, groups: int) -> str:
    """Scale and bias have one number a group."""
    x = s.emit("Reshape", s.x[0], s.integers(0, groups, -1))
    gradient = s.emit("Reshape", s.gradient, s.integers(0, 0, groups, -1))
    scaled = s.emit("Mul", gradient, s.emit("Unsqueeze", s.x[1], s.integers(-1)))
    return s.emit("Reshape", _normalization(s, x, scaled, [-1]), s.emit("Shape", s.gradient))


def _normalization(s: Step, x: str, gradient: str, axes: list[int]) -> str:
    """Return the gradient of x in n = (x - mean) / deviation: (g - mean(g) - n mean(g n)) / deviation."""

    def mean(value: str) -> str:
        return s.emit("ReduceMean", value, s.integers(*axes), keepdims=1)

    centred = s.emit("Sub", x, mean(x))
    variance = mean(s.emit("Mul", centred, centred))
    deviation = s.emit("Sqrt", s.emit("Add", variance, s.constant(s.attribute("epsilon", 1e-5))))
    normal = s.emit("Div", centred, deviation)
    along = s.emit("Mul", normal, mean(s.emit("Mul", gradient, normal)))
    rest = s.emit("Sub", s.emit("Sub", gradient, mean(gradient)), along)
    return s.emit("Div", rest, deviation)


def _local_response_normalization(s: Step) -> str:
    """Y_j = x_j d_j^-beta with d = bias + alpha/size * W x^2, where row j of W marks the channels around j.

    Hence g_i d_i^-beta - 2 alpha beta / size * x_i * sum_j W_ji g_j y_j / d_j.
    """
    (channels,), size = static_dims(s.graph, s.x[0], [1]), s.attribute("size")
    alpha, beta = s.attribute("alpha", 1e-4) / size, s.attribute("beta", 0.75)
    distance = np.arange(channels) - np.arange(channels)[:, None]
    window = (-((size - 1) // 2) <= distance) & (distance <= size // 2)
    axis = 1 - s.rank(s.x[0])
    squares = _matrix_along(s, s.emit("Mul", s.x[0], s.x[0]), window.T, axis)
    divisor = s.emit("Add", s.constant(s.attribute("bias", 1.0)), s.emit("Mul", s.constant(alpha), squares))
    through_divisor = _matrix_along(s, s.times(s.emit("Div", s.y, divisor)), window, axis)
    neighbours = s.emit("Mul", s.emit("Mul", s.constant(2 * alpha * beta), s.x[0]), through_divisor)
    return s.emit("Sub", s.times(s.emit("Pow", divisor, s.constant(-beta))), neighbours)


def _matrix_along(s: Step, value: str, matrix: Array, axis: int) -> str:
    """Return sum over j of value[..., j, ...] * matrix[j, i] along one axis, counted from the end."""
    if axis == -2:
        return s.emit("MatMul", s.constant(matrix.T), value)
    if axis == -1:
        return s.emit("MatMul", value, s.constant(matrix))
    # A matrix product reads the last axes: what lies behind the wanted one becomes a single axis.
    shape = s.emit("Shape", value)
    before = s.emit("Slice", shape, s.integers(0), s.integers(axis + 1), s.integers(0))
    flat = s.emit("Reshape", value, s.emit("Concat", before, s.integers(-1), axis=0))
    product = s.emit("MatMul", s.constant(matrix.T), flat)
    behind = s.emit("Slice", shape, s.integers(axis + 1), s.integers(_END), s.integers(0))
    ahead = s.emit("Slice", shape, s.integers(0), s.integers(axis), s.integers(0))
    return s.emit("Reshape", product, s.emit("Concat", ahead, s.integers(matrix.shape[1]), behind, axis=0))


_END = 2**31 - 1
"""The end of an axis in a Slice."""


def _softmax(s: Step) -> str:
    weighted = s.emit("ReduceSum", s.times(s.y), s.integers(s.axis()), keepdims=1)
    return s.emit("Mul", s.y, s.emit("Sub", s.gradient, weighted))


def _log_softmax(s: Step) -> str:
    total = s.emit("ReduceSum", s.gradient, s.integers(s.axis()), keepdims=1)
    return s.emit("Sub", s.gradient, s.emit("Mul", s.emit("Exp", s.y), total))


defvjp("LayerNormalization", _layer_normalization, None, None)
defvjp("InstanceNormalization", _instance_normalization, None, None)
defvjp("GroupNormalization", _group_normalization, None, None)
defvjp("LRN", _local_response_normalization)
defvjp("Softmax", _softmax)
defvjp("LogSoftmax", _log_softmax)


# Reductions


def _reduced_axes(s: Step) -> list[int]:
    """Return the reduced axes as negative numbers, which mean the same on a value and on its gradient."""
    rank = s.rank(s.x[0])
    axes = [int(axis) for axis in s.fixed_or(1, [])]
    if not axes and not s.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    return [axis - rank if axis >= 0 else axis for axis in axes]


def _with_reduced_axes(s: Step, value: str, axes: list[int]) -> str:
    """Return the output or its gradient with the reduced axes back, of size 1."""
    return value if s.attribute("keepdims", 1) else s.emit("Unsqueeze", value, s.integers(*axes))


def _spread_over(s: Step, axes: list[int]) -> str:
    """Return the gradient with the reduced axes back, in the sizes of the input."""
    return _stretched(s, _with_reduced_axes(s, s.gradient, axes), s.x[0], axes)


def _stretched(s: Step, gradient: str, value: str, axes: list[int]) -> str:
    """Return a gradient of size 1 along ``axes``, counted from the end, in the sizes of ``value``."""
    sizes = dict(zip(axes, static_dims(s.graph, value, axes), strict=True))
    return s.emit("Expand", gradient, s.integers(1, *(sizes.get(axis, 1) for axis in range(-s.rank(value), 0))))


def _reduce_sum(s: Step) -> str:
    return _spread_over(s, _reduced_axes(s))


def _reduce_mean(s: Step) -> str:
    axes = _reduced_axes(s)
    count = math.prod(static_dims(s.graph, s.x[0], axes))
    return s.emit("Mul", _spread_over(s, axes), s.constant(1 / count))


def _reduce_max(s: Step) -> str:
    axes = _reduced_axes(s)
    first = _first_equal(s, _with_reduced_axes(s, s.y, axes), axes)
    return s.emit("Where", first, _with_reduced_axes(s, s.gradient, axes), s.constant(0))


def _reduce_l2(s: Step) -> str:
    axes = _reduced_axes(s)
    norm, gradient = (_with_reduced_axes(s, value, axes) for value in (s.y, s.gradient))
    return s.emit("Mul", s.x[0], s.emit("Div", gradient, _one_for_zero(s, norm)))


defvjp("ReduceSum", _reduce_sum, None)
defvjp("ReduceMean", _reduce_mean, None)
defvjp("ReduceMax", _reduce_max, None)
defvjp("ReduceL2", _reduce_l2, None)


# Shape


def _back_to_input_shape(s: Step) -> str:
    """Reshape the gradient to (K, *input shape): 0 keeps K and, where the batch leads both, N; -1 is the open rest."""
    before, after = s.shape(s.x[0]), s.shape(s.y)
    leads = bool(before and after) and before[0] == after[0] and before[0] is not None
    target = [0, *before[1:]] if leads else list(before)
    if sum(not isinstance(size, int) for size in target) > 1:
        s.refuse(f"its input's shape {before} is open in more than one dimension")
    return s.emit("Reshape", s.gradient, s.integers(0, *(size if isinstance(size, int) else -1 for size in target)))


def _transpose(s: Step) -> str:
    rank = s.rank(s.x[0])
    order = s.attribute("perm", list(range(rank))[::-1])
    return s.emit("Transpose", s.gradient, perm=[0, *(1 + int(axis) for axis in np.argsort(order))])


def _concat(s: Step, index: int) -> str:
    axis = s.axis()
    sizes = [static_dims(s.graph, name, [axis])[0] for name in s.x[: index + 1]]
    start = sum(sizes[:-1])
    return s.emit("Slice", s.gradient, s.integers(start), s.integers(start + sizes[-1]), s.integers(axis))


def _split(s: Step) -> str:
    """Concatenate the gradients of the outputs that are read, each padded by those that are not."""
    axis = s.axis(default=0)
    sizes = [int(size) for size in s.fixed_or(1, _even_split(s, axis))]
    starts = [0, *itertools.accumulate(sizes)]
    read = [index for index, gradient in enumerate(s.gradients) if gradient]
    edges = [0, *(starts[index] for index in read[1:]), starts[-1]]
    parts = [
        _padded(s, gradient, axis, starts[index] - begin, end - starts[index + 1])
        for index, (begin, end) in zip(read, itertools.pairwise(edges), strict=True)
        if (gradient := s.gradients[index])
    ]
    return parts[0] if len(parts) == 1 else s.emit("Concat", *parts, axis=axis)


def _even_split(s: Step, axis: int) -> list[int]:
    """Return the sizes of a Split into equal parts, of which the last may be shorter."""
    (total,), count = static_dims(s.graph, s.x[0], [axis]), len(s.node.output)
    size = math.ceil(total / count)
    return [min(size, total - start) for start in range(0, size * count, size)]


def _padded(s: Step, gradient: str, axis: int, begin: int, end: int) -> str:
    """Return a gradient with zeros before and after it along one axis, counted from the end."""
    if not begin and not end:
        return gradient
    pads = np.zeros((2, 1 + s.rank(s.x[0])), np.int64)
    pads[:, axis] = begin, end
    return s.emit("Pad", gradient, s.integers(*pads.ravel()))


# Ops that pick or repeat positions along an axis


def _gathered_back(s: Step, gradient: str, indices: Array, axis: int) -> str:
    """Return the gradient of an input whose positions ``indices`` were read along one axis, counted from the end.

    Every position collects from all that read it: a Gather by the constant inverse of ``indices``, in which the zeros
    behind the gradient stand for those that nobody reads, and a sum where there are several.
    """
    (size,) = static_dims(s.graph, s.x[0], [axis])
    count = len(indices)
    if np.array_equal(indices, np.arange(indices[0], indices[0] + count)):
        return _padded(s, gradient, axis, int(indices[0]), size - int(indices[-1]) - 1)
    readers = [np.flatnonzero(indices == position) for position in range(size)]
    inverse = np.full((size, max(map(len, readers))), count)
    for row, found in zip(inverse, readers, strict=True):
        row[: len(found)] = found
    padded = _padded(s, gradient, axis, 0, int((inverse == count).any()))
    if inverse.shape[1] == 1:
        return s.emit("Gather", padded, s.graph.emit_constant(inverse[:, 0]), axis=axis)
    collected = s.emit("Gather", padded, s.graph.emit_constant(inverse), axis=axis)
    return s.emit("ReduceSum", collected, s.integers(axis), keepdims=0)


def _slice(s: Step) -> str:
    starts, ends = s.fixed(s.x[1]), s.fixed(s.x[2])
    axes, steps = s.fixed_or(3, range(len(starts))), s.fixed_or(4, [1] * len(starts))
    gradient = s.gradient
    for start, end, axis, step in zip(*(array.tolist() for array in (starts, ends, axes, steps)), strict=True):
        if (start, step) == (0, 1) and end >= _END:
            continue
        from_end = axis - s.rank(s.x[0]) if axis >= 0 else axis
        (size,) = static_dims(s.graph, s.x[0], [axis])
        gradient = _gathered_back(s, gradient, np.arange(size)[start:end:step], from_end)
    return gradient


def _gather(s: Step) -> str:
    axis, indices = s.axis(default=0), s.fixed(s.x[1])
    (size,) = static_dims(s.graph, s.x[0], [axis])
    gradient = s.gradient
    if indices.ndim == 0:
        gradient = s.emit("Unsqueeze", gradient, s.integers(axis))
    elif indices.ndim > 1:
        ahead = [0] * (1 + s.rank(s.x[0]) + axis)
        behind = static_dims(s.graph, s.x[0], range(axis + 1, 0))
        gradient = s.emit("Reshape", gradient, s.integers(*ahead, indices.size, *behind))
    return _gathered_back(s, gradient, indices.ravel() % size, axis)


def _tile(s: Step) -> str:
    gradient, rank = s.gradient, s.rank(s.x[0])
    for axis, repeats in enumerate(s.fixed(s.x[1]).tolist()):
        if repeats != 1:
            (size,) = static_dims(s.graph, s.x[0], [axis])
            gradient = _gathered_back(s, gradient, np.tile(np.arange(size), repeats), axis - rank)
    return gradient


def _pad(s: Step) -> str:
    rank, mode = s.rank(s.x[0]), s.attribute("mode", "constant")
    axes = [int(axis) % rank for axis in s.fixed_or(3, range(rank))]
    pads = s.fixed(s.x[1]).reshape(2, -1).T.tolist()
    if min(map(min, pads)) < 0:
        s.refuse("it crops")
    padded = [(axis, begin, end) for axis, (begin, end) in zip(axes, pads, strict=True) if begin or end]
    if mode == "constant":
        return _cropped(s, padded)
    gradient = s.gradient
    for axis, begin, end in padded:
        positions: Array = np.arange(*static_dims(s.graph, s.x[0], [axis]))
        gradient = _gathered_back(s, gradient, np.pad(positions, (begin, end), mode=mode), axis - rank)
    return gradient


def _cropped(s: Step, padded: list[tuple[int, int, int]]) -> str:
    axes, starts, _ = zip(*padded, strict=True) if padded else ((), (), ())
    if not axes:
        return s.gradient
    stops = [start + size for start, size in zip(starts, static_dims(s.graph, s.x[0], axes), strict=True)]
    return s.emit("Slice", s.gradient, s.integers(*starts), s.integers(*stops), s.integers(*(1 + a for a in axes)))


Variant = TypeVar("Variant")
Coordinates: TypeAlias = "Callable[[Array, int, int, float], Array]"

_COORDINATES: dict[str, Coordinates] = {
    "half_pixel": lambda x, before, after, scale: (x + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda x, before, after, scale: (x + 0.5 - after / 2) / scale + before / 2 - 0.5,
    "pytorch_half_pixel": lambda x, before, after, scale: (x + 0.5) / scale - 0.5 if after > 1 else 0 * x,
    "asymmetric": lambda x, before, after, scale: x / scale,
    "align_corners": lambda x, before, after, scale: x * (before - 1) / max(after - 1, 1),
}
"""Where output position x of a Resize lies in the input."""

_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _resize(s: Step) -> str:
    """Nearest picks positions; linear is, along each axis, a product with a constant matrix."""
    resize_back = _variant(s, "mode", "nearest", _RESIZES)
    place = _variant(s, "coordinate_transformation_mode", "half_pixel", _COORDINATES)
    for name, only in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        _variant(s, name, only, {only: only})
    rank = s.rank(s.x[0])
    axes = [axis % rank for axis in s.attribute("axes", range(rank))]
    scales = s.fixed_or(2, []).tolist() or [None] * len(axes)
    gradient = s.gradient
    for axis, scale in zip(axes, scales, strict=True):
        if scale == 1 or (scale is None and s.shape(s.x[0])[axis] == s.shape(s.y)[axis]):
            continue
        before, after = (static_dims(s.graph, value, [axis])[0] for value in (s.x[0], s.y))
        positions = place(np.arange(after, dtype=np.float64), before, after, scale or after / before)
        gradient = resize_back(s, gradient, positions, before, axis - rank)
    return gradient


def _variant(s: Step, name: str, default: Any, variants: Mapping[Any, Variant]) -> Variant:
    """Return what the table holds for an attribute's value; refuses the node when it holds nothing."""
    given = s.attribute(name, default)
    if given not in variants:
        s.refuse(f"its {name} {given!r} has no rule")
    return variants[given]


def _nearest_back(s: Step, gradient: str, positions: Array, size: int, axis: int) -> str:
    rounded = _ROUNDINGS[s.attribute("nearest_mode", "round_prefer_floor")](positions)
    return _gathered_back(s, gradient, np.clip(rounded, 0, size - 1).astype(np.int64), axis)


def _linear_back(s: Step, gradient: str, positions: Array, size: int, axis: int) -> str:
    """Row j of the matrix weighs the inputs by their nearness to position j; beyond the border lies its last value."""
    distance = np.abs(np.clip(positions, 0, size - 1)[:, None] - np.arange(size))
    return _matrix_along(s, gradient, np.maximum(0, 1 - distance), axis)


_RESIZES = {"nearest": _nearest_back, "linear": _linear_back}


def _depth_to_space(s: Step) -> str:
    """Undo (block row, block column, C) or, in mode CRD, (C, block row, block column) out of the channels."""
    block = s.attribute("blocksize")
    channels, height, width = static_dims(s.graph, s.x[0], (1, 2, 3))
    order = [0, 3, 5, 1, 2, 4] if s.attribute("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return _regrouped(s, (channels // block**2, height, block, width, block), order)


def _space_to_depth(s: Step) -> str:
    block = s.attribute("blocksize")
    channels, height, width = static_dims(s.graph, s.x[0], (1, 2, 3))
    return _regrouped(s, (block, block, channels, height // block, width // block), [0, 3, 4, 1, 5, 2])


def _regrouped(s: Step, sizes: tuple[int, ...], order: list[int]) -> str:
    """Return the gradient, seen as (K*N, *sizes), in another order of axes and the shape of the input."""
    groups = s.emit("Transpose", s.emit("Reshape", s.gradient, s.integers(-1, *sizes)), perm=order)
    return _with_lead(s, groups, static_dims(s.graph, s.x[0], (1, 2, 3)))


for _op in ("Reshape", "Squeeze", "Unsqueeze"):
    defvjp(_op, _back_to_input_shape, None)
defvjp("Flatten", _back_to_input_shape)
defvjp("Transpose", _transpose)
defvjp("Concat", variadic=_concat)
defvjp("Split", _split, None)
defvjp("Slice", _slice, None, None, None, None)
defvjp("Gather", _gather, None)
defvjp("Tile", _tile, None)
defvjp("Expand", lambda s: s.gradient, None, broadcasts=True)
defvjp("Pad", _pad, None, None, None)
defvjp("Resize", _resize, None, None, None)
defvjp("DepthToSpace", _depth_to_space)
defvjp("SpaceToDepth", _space_to_depth)


# Pooled gradients: where the gradient's sum over the map can be taken after the op instead of before it

Layout: TypeAlias = str
PushRule: TypeAlias = "Callable[[Graph, onnx.NodeProto, Layout], Layout | None]"


def _keeps_layout(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    return layout


def _pooling_keeps_layout(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    return layout if layout == "NCHW" else None


def _average_keeps_sum(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    """Every window hands out exactly its gradient, unless a share of it falls on padding."""
    counts_padding = attribute(node, "count_include_pad", 0)
    padded = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")
    return None if counts_padding and padded else _pooling_keeps_layout(graph, node, layout)


def _mean_over_map(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if axes is None or {layout[int(axis)] for axis in axes} != {"H", "W"}:
        return None
    return layout if attribute(node, "keepdims", 1) else layout.replace("H", "").replace("W", "")


def _permuted(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    return "".join(layout[axis] for axis in attribute(node, "perm", list(range(len(layout)))[::-1]))


def _single_pixel_dropped(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    """(N,C,1,1) to (N,C)."""
    sizes = dict(zip(layout, graph.shape(node.input[0]), strict=True))
    if (sizes.get("H", 1), sizes.get("W", 1)) != (1, 1) or graph.rank(node.output[0]) != 2:
        return None
    return "NC" if graph.shape(node.output[0])[1] == sizes["C"] else None


PUSHES: dict[str, PushRule] = {
    "Identity": _keeps_layout,
    "Dropout": _keeps_layout,
    "MaxPool": _pooling_keeps_layout,
    "AveragePool": _average_keeps_sum,
    "GlobalAveragePool": _pooling_keeps_layout,
    "GlobalMaxPool": _pooling_keeps_layout,
    "ReduceMean": _mean_over_map,
    "Transpose": _permuted,
    "Flatten": _single_pixel_dropped,
    "Reshape": _single_pixel_dropped,
    "Squeeze": _single_pixel_dropped,
}
"""Ops through which the sum of the gradient over the map passes unchanged, and what they make of the axes' order.

A MaxPool window's gradient goes to one of its inputs whatever the windows' overlap or padding; an average's is handed
out in shares that add up to 1. A rule returns the new layout, a permutation of "NCHW" or "NC", or None to stop.
"""
