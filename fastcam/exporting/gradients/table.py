"""The table of gradient rules: one short vector-Jacobian product (VJP) per input of an ONNX op.

A rule gets a `Step`, one node of the forward pass together with the gradient of its output, and emits the nodes that
give the gradient of one input. Every gradient has one more axis than its value, a leading K for the targets. A value of
shape (N,C,h,w) has a gradient of shape (K,N,C,h,w), so element-wise rules work by broadcasting alone and the forward
values are never repeated.

Rules emit only nodes that ONNX Runtime's CUDA provider and TensorRT run: no MaxUnpool, Col2Im or Scatter.
Sums over broadcast axes, accumulation and the choice of path belong to the engine, `autodiff`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from ...arrays import Array
from ...errors import ArgumentError, UnsupportedOpError
from ...graph import Dim, Graph, attribute

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
        r"""Gradient of the node's first output, (K, \*output shape); rejects the node when another output has one."""
        first, *others = self.gradients
        if first is None or any(others):
            self.refuse("the gradient arrives at an output other than its first")
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
        """Return the array of a constant input; rejects the node when it is computed."""
        if value not in self.graph.constants:
            self.refuse(f"input {value!r} is computed; the rule needs a constant")
        return self.graph.constants[value]

    def fixed_or(self, index: int, default: npt.ArrayLike) -> Array:
        """Return the array of an optional constant input, ``default`` where it is absent."""
        given = index < len(self.x) and self.x[index]
        return self.fixed(given) if given else np.asarray(default)

    def only_where(self, condition: str) -> str:
        """Return the gradient where ``condition`` holds, 0 elsewhere."""
        return self.emit("Where", condition, self.gradient, self.constant(0))

    def times(self, factor: str) -> str:
        """Return the gradient times ``factor``."""
        return self.emit("Mul", self.gradient, factor)

    def axis(self, default: int = -1) -> int:
        """Return the attribute ``axis`` as a negative number, which means the same for a value and its gradient."""
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
        One rule per input; None where the op has no gradient for it.
    variadic : callable or None
        The rule of every further input, given the input's index.
    broadcasts : bool
        The op follows NumPy's broadcasting: its rules give gradients of the output's shape, and the engine sums them
        down to the input's.
    core_axes : int
        Trailing axes that are not broadcast (2 for a matrix product).
    """

    rules: tuple[Rule | None, ...]
    variadic: VariadicRule | None = None
    broadcasts: bool = False
    core_axes: int = 0

    def rule(self, index: int) -> Rule | None:
        """Return the rule of one input, or None."""
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
        One per input, in order: takes a `Step`, emits nodes, returns the name of the input's gradient, whose shape
        is (K, \*input shape). None: the input has no gradient.
    variadic : callable, optional
        For ops with any number of inputs: takes the `Step` and the input's index.
    broadcasts : bool
        True for ops of several inputs that follow NumPy's broadcasting: the rules then return gradients of the
        output's shape.
    core_axes : int
        Trailing axes that are not broadcast: 2 for a matrix product.

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
