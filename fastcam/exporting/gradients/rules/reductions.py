"""Gradient rules of reductions."""

from __future__ import annotations

import math

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


def _reduce_max(s: Step) -> str:
    axes = _reduced_axes(s)
    first = first_equal(s, _with_reduced_axes(s, s.y, axes), axes)
    return s.emit("Where", first, _with_reduced_axes(s, s.gradient, axes), s.constant(0))


def _reduce_l2(s: Step) -> str:
    axes = _reduced_axes(s)
    norm, gradient = (_with_reduced_axes(s, value, axes) for value in (s.y, s.gradient))
    return s.emit("Mul", s.x[0], s.emit("Div", gradient, one_for_zero(s, norm)))


defvjp("ReduceSum", _reduce_sum, None)


defvjp("ReduceMean", _reduce_mean, None)


defvjp("ReduceMax", _reduce_max, None)


defvjp("ReduceL2", _reduce_l2, None)
