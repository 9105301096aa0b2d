"""Gradient rule of Resize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ....arrays import Array
from ....graph import static_dims
from ..table import Step, defvjp
from .common import matrix_along
from .shapes import gathered_back

Variant = TypeVar("Variant")


Coordinates: TypeAlias = "Callable[[Array, int, int, float], Array]"


_COORDINATES: dict[str, Coordinates] = {
    "half_pixel": lambda x, before, after, scale: (x + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda x, before, after, scale: (x + 0.5 - after / 2) / scale + before / 2 - 0.5,
    "pytorch_half_pixel": lambda x, before, after, scale: (x + 0.5) / scale - 0.5 if after > 1 else 0 * x,
    "asymmetric": lambda x, before, after, scale: x / scale,
    "align_corners": lambda x, before, after, scale: x * (before - 1) / max(after - 1, 1),
}


"""The position in the input of output position x of a Resize."""


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _resize(s: Step) -> str:
    """Nearest picks positions; linear is a product with a constant matrix along each axis."""
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
    """Return the table's entry for an attribute's value; reject the node when there is no entry."""
    given = s.attribute(name, default)
    if given not in variants:
        s.refuse(f"its {name} {given!r} has no rule")
    return variants[given]


def _nearest_back(s: Step, gradient: str, positions: Array, size: int, axis: int) -> str:
    rounded = _ROUNDINGS[s.attribute("nearest_mode", "round_prefer_floor")](positions)
    return gathered_back(s, gradient, np.clip(rounded, 0, size - 1).astype(np.int64), axis)


def _linear_back(s: Step, gradient: str, positions: Array, size: int, axis: int) -> str:
    """Row j of the matrix weights the inputs by their proximity to position j; border values repeat outside."""
    distance = np.abs(np.clip(positions, 0, size - 1)[:, None] - np.arange(size))
    return matrix_along(s, gradient, np.maximum(0, 1 - distance), axis)


_RESIZES = {"nearest": _nearest_back, "linear": _linear_back}


defvjp("Resize", _resize, None, None, None)
