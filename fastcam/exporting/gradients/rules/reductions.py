"""Gradient rules of reductions."""

from __future__ import annotations

import math
from collections.abc import Callable

from ....graph import static_dims
from ..table import Step, defvjp
from .common import first_equal, one_for_zero, stretched


# Reductions
def _reduced_axes(s: Step) -> list[int]:
    """Return the reduced axes as negative numbers, which mean the same for a value and its gradient."""
    rank = s.rank(s.x[0])
    axes = [int(axis) for axis in s.fixed_or(1, [])]
    if not axes and not s.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    return [axis - rank if axis >= 0 else axis for axis in axes]


def _with_reduced_axes(s: Step, value: str, axes: list[int]) -> str:
    """Return the output or its gradient with the reduced axes restored, of size 1."""
    return value if s.attribute("keepdims", 1) else s.emit("Unsqueeze", value, s.integers(*axes))


def _spread_over(s: Step, axes: list[int]) -> str:
    """Return the gradient with the reduced axes restored to their sizes in the input."""
    return stretched(s, _with_reduced_axes(s, s.gradient, axes), s.x[0], axes)


def _reduce_sum(s: Step) -> str:
    return _spread_over(s, _reduced_axes(s))


def _reduce_mean(s: Step) -> str:
    axes = _reduced_axes(s)
    count = math.prod(static_dims(s.graph, s.x[0], axes))
    return s.emit("Mul", _spread_over(s, axes), s.constant(1 / count))


def _reduce_extreme(s: Step) -> str:
    axes = _reduced_axes(s)
    first = first_equal(s, _with_reduced_axes(s, s.y, axes), axes)
    return s.emit("Where", first, _with_reduced_axes(s, s.gradient, axes), s.constant(0))


def _reduce_log_sum(s: Step) -> str:
    axes = _reduced_axes(s)
    share = s.emit("Div", s.gradient, s.emit("Exp", s.y))
    return stretched(s, _with_reduced_axes(s, share, axes), s.x[0], axes)


# Slopes of reductions by input and output, which keeps the reduced axes.
_SLOPES: dict[str, Callable[[Step, str], str]] = {
    "ReduceL1": lambda s, y: s.emit("Sign", s.x[0]),
    "ReduceL2": lambda s, y: s.emit("Div", s.x[0], one_for_zero(s, y)),
    "ReduceSumSquare": lambda s, y: s.emit("Mul", s.constant(2), s.x[0]),
    "ReduceLogSumExp": lambda s, y: s.emit("Exp", s.emit("Sub", s.x[0], y)),
}


def _by_slope(slope: Callable[[Step, str], str]) -> Callable[[Step], str]:
    def rule(s: Step) -> str:
        axes = _reduced_axes(s)
        y, gradient = (_with_reduced_axes(s, value, axes) for value in (s.y, s.gradient))
        return s.emit("Mul", gradient, slope(s, y))

    return rule


for _op, _slope in _SLOPES.items():
    defvjp(_op, _by_slope(_slope), None)


defvjp("ReduceSum", _reduce_sum, None)


defvjp("ReduceMean", _reduce_mean, None)


for _op in ("ReduceMax", "ReduceMin"):
    defvjp(_op, _reduce_extreme, None)


defvjp("ReduceLogSum", _reduce_log_sum, None)
