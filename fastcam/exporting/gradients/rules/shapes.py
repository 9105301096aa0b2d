"""Gradient rules of ops that move, select or repeat values."""

from __future__ import annotations

import itertools
import math

import numpy as np

from ....arrays import Array
from ....graph import static_dims
from ..table import Step, defvjp
from .common import END, pad_along, with_lead


# Shape
def _back_to_input_shape(s: Step) -> str:
    """Reshape the gradient to (K, *input shape): 0 keeps K and, where the batch leads both, N; -1 is the open axis."""
    before, after = s.shape(s.x[0]), s.shape(s.y)
    leads = bool(before and after) and before[0] == after[0] and before[0] is not None
    target = [0, *before[1:]] if leads else list(before)
    if sum(not isinstance(size, int) for size in target) > 1:
        s.refuse(f"its input's shape {before} is dynamic in more than one dimension")
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
    """Concatenate the gradients of the outputs that are read, padded with zeros for those that are not."""
    axis = s.axis(default=0)
    sizes = [int(size) for size in s.fixed_or(1, _even_split(s, axis))]
    starts = [0, *itertools.accumulate(sizes)]
    read = [index for index, gradient in enumerate(s.gradients) if gradient]
    edges = [0, *(starts[index] for index in read[1:]), starts[-1]]
    parts = [
        pad_along(s, gradient, axis, starts[index] - begin, end - starts[index + 1])
        for index, (begin, end) in zip(read, itertools.pairwise(edges), strict=True)
        if (gradient := s.gradients[index])
    ]
    return parts[0] if len(parts) == 1 else s.emit("Concat", *parts, axis=axis)


def _even_split(s: Step, axis: int) -> list[int]:
    """Return the sizes of a Split into equal parts; the last one may be shorter."""
    (total,), count = static_dims(s.graph, s.x[0], [axis]), len(s.node.output)
    size = math.ceil(total / count)
    return [min(size, total - start) for start in range(0, size * count, size)]


# Ops that pick or repeat positions along an axis
def gathered_back(s: Step, gradient: str, indices: Array, axis: int) -> str:
    """Return the gradient of an input whose positions ``indices`` were read along one axis, counted from the end.

    Every position collects from all its readers: a Gather by the constant inverse of ``indices``, where zeros
    appended to the gradient serve the positions that nothing reads, and a sum where there are several readers.
    """
    (size,) = static_dims(s.graph, s.x[0], [axis])
    count = len(indices)
    if np.array_equal(indices, np.arange(indices[0], indices[0] + count)):
        return pad_along(s, gradient, axis, int(indices[0]), size - int(indices[-1]) - 1)
    readers = [np.flatnonzero(indices == position) for position in range(size)]
    inverse = np.full((size, max(map(len, readers))), count)
    for row, found in zip(inverse, readers, strict=True):
        row[: len(found)] = found
    padded = pad_along(s, gradient, axis, 0, int((inverse == count).any()))
    if inverse.shape[1] == 1:
        return s.emit("Gather", padded, s.graph.emit_constant(inverse[:, 0]), axis=axis)
    collected = s.emit("Gather", padded, s.graph.emit_constant(inverse), axis=axis)
    return s.emit("ReduceSum", collected, s.integers(axis), keepdims=0)


def _slice(s: Step) -> str:
    starts, ends = s.fixed(s.x[1]), s.fixed(s.x[2])
    axes, steps = s.fixed_or(3, range(len(starts))), s.fixed_or(4, [1] * len(starts))
    gradient = s.gradient
    for start, end, axis, step in zip(*(array.tolist() for array in (starts, ends, axes, steps)), strict=True):
        if (start, step) == (0, 1) and end >= END:
            continue
        from_end = axis - s.rank(s.x[0]) if axis >= 0 else axis
        (size,) = static_dims(s.graph, s.x[0], [axis])
        gradient = gathered_back(s, gradient, np.arange(size)[start:end:step], from_end)
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
    return gathered_back(s, gradient, indices.ravel() % size, axis)


def _tile(s: Step) -> str:
    gradient, rank = s.gradient, s.rank(s.x[0])
    for axis, repeats in enumerate(s.fixed(s.x[1]).tolist()):
        if repeats != 1:
            (size,) = static_dims(s.graph, s.x[0], [axis])
            gradient = gathered_back(s, gradient, np.tile(np.arange(size), repeats), axis - rank)
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
        gradient = gathered_back(s, gradient, np.pad(positions, (begin, end), mode=mode), axis - rank)
    return gradient


def _cropped(s: Step, padded: list[tuple[int, int, int]]) -> str:
    axes, starts, _ = zip(*padded, strict=True) if padded else ((), (), ())
    if not axes:
        return s.gradient
    stops = [start + size for start, size in zip(starts, static_dims(s.graph, s.x[0], axes), strict=True)]
    return s.emit("Slice", s.gradient, s.integers(*starts), s.integers(*stops), s.integers(*(1 + a for a in axes)))


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
    return with_lead(s, groups, static_dims(s.graph, s.x[0], (1, 2, 3)))


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


defvjp("DepthToSpace", _depth_to_space)


defvjp("SpaceToDepth", _space_to_depth)
