"""Nodes that rules in several files emit."""

from __future__ import annotations

import math

import numpy as np

from ....arrays import Array
from ....graph import static_dims
from ..table import Step


def with_lead(s: Step, value: str, tail: tuple[int, ...]) -> str:
    """Reshape ``value`` to (K, N, *tail)."""
    lead = s.emit("Shape", s.gradient, start=0, end=2)
    return s.emit("Reshape", value, s.emit("Concat", lead, s.integers(*tail), axis=0))


def one_for_zero(s: Step, norm: str) -> str:
    """Return a norm that is safe to divide by: where it is 0, all its terms are 0, and so is their gradient."""
    return s.emit("Where", s.emit("Equal", norm, s.constant(0)), s.constant(1), norm)


def first_equal(s: Step, extreme: str, axes: list[int]) -> str:
    """Return where the input first equals its ``extreme`` over ``axes``, in row-major order."""
    sizes = static_dims(s.graph, s.x[0], axes)
    places: Array = np.ones(s.rank(s.x[0]), np.int64)
    places[axes] = sizes
    # Ranks fall along the axes, so that ReduceMax finds the first; float32 counts exactly up to 2**24.
    ranks = s.graph.emit_constant(np.arange(math.prod(sizes), 0, -1, dtype=np.float32).reshape(places))
    none = s.graph.emit_number(0)
    candidates = s.emit("Where", s.emit("Equal", s.x[0], extreme), ranks, none)
    return s.emit("Equal", candidates, s.emit("ReduceMax", candidates, s.integers(*axes), keepdims=1))


def matrix_along(s: Step, value: str, matrix: Array, axis: int) -> str:
    """Return sum over j of value[..., j, ...] * matrix[j, i] along one axis, counted from the end."""
    if axis == -2:
        return s.emit("MatMul", s.constant(matrix.T), value)
    if axis == -1:
        return s.emit("MatMul", value, s.constant(matrix))
    # A matrix product reads the last axes: the axes after the wanted one become a single axis.
    shape = s.emit("Shape", value)
    before = s.emit("Slice", shape, s.integers(0), s.integers(axis + 1), s.integers(0))
    flat = s.emit("Reshape", value, s.emit("Concat", before, s.integers(-1), axis=0))
    product = s.emit("MatMul", s.constant(matrix.T), flat)
    behind = s.emit("Slice", shape, s.integers(axis + 1), s.integers(END), s.integers(0))
    ahead = s.emit("Slice", shape, s.integers(0), s.integers(axis), s.integers(0))
    return s.emit("Reshape", product, s.emit("Concat", ahead, s.integers(matrix.shape[1]), behind, axis=0))


END = 2**31 - 1


"""The end of an axis, for Slice."""


def stretched(s: Step, gradient: str, value: str, axes: list[int]) -> str:
    """Return a gradient of size 1 along ``axes``, counted from the end, in the sizes of ``value``."""
    sizes = dict(zip(axes, static_dims(s.graph, value, axes), strict=True))
    return s.emit("Expand", gradient, s.integers(1, *(sizes.get(axis, 1) for axis in range(-s.rank(value), 0))))


def pad_along(s: Step, gradient: str, axis: int, begin: int, end: int) -> str:
    """Return a gradient with zeros before and after it along one axis, counted from the end."""
    if not begin and not end:
        return gradient
    pads = np.zeros((2, 1 + s.rank(s.x[0])), np.int64)
    pads[:, axis] = begin, end
    return s.emit("Pad", gradient, s.integers(*pads.ravel()))
