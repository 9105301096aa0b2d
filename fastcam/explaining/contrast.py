"""What speaks for one target rather than others, and what speaks against it, from maps before their ReLU.

Methods whose weights are linear in the gradients give maps that are linear in the explained scalar: the map of
y_c - gamma * mean(y_d) is the map of c minus gamma times the mean of the maps of d, from one pass for all of them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .. import kernels
from ..arguments import shown
from ..arrays import Doubles, Floats, Indices
from ..errors import ArgumentError, TargetError
from ..kernels.boundary import NORMALIZATIONS, Normalize
from ..kernels.reference import normalized, positive_share
from .engines import Results
from .methods import METHODS

Scaling: TypeAlias = 'Normalize | Literal["signed"]'

SCALINGS: tuple[Scaling, ...] = (*NORMALIZATIONS[:-1], "signed", None)

# Finer-CAM, as torchcam computes it: y_c - 0.6 * mean of the three classes with the nearest scores.
NEAREST = "nearest"
NEAREST_COUNT, NEAREST_SHARE = 3, 0.6


class Contrast(NamedTuple):
    """How maps before their ReLU are combined.

    Attributes
    ----------
    kept : int
        Number of maps per image to return; those after them are subtracted.
    share : float
        Times the mean of the others.
    counterfactual : bool
        Whether evidence against the targets is wanted instead: the maps with the opposite sign.
    references : ndarray or None
        (1 or N,kept) float64, for values of a regression: what raises a value above its reference is evidence for it,
        or where the value is below it, what lowers it.
    """

    kept: int
    share: float = 0.0
    counterfactual: bool = False
    references: Doubles | None = None


def check_scaling(normalize: Any) -> Scaling:
    """Return how maps are scaled, or raise ArgumentError."""
    if not isinstance(normalize, str | None) or normalize not in SCALINGS:
        *others, last = map(repr, SCALINGS)
        raise ArgumentError(f"normalize={shown(normalize)}: choose {', '.join(others)} or {last}")
    return SCALINGS[SCALINGS.index(normalize)]


def check_linear(method: str) -> None:
    """Raise ArgumentError for a method whose maps are not linear in the explained scalar."""
    if not METHODS[method].linear:
        linear = ", ".join(repr(name) for name, row in METHODS.items() if row.linear)
        raise ArgumentError(f"method={method!r}: maps can be contrasted for methods linear in the gradient: {linear}")


def nearest_classes(logits: Floats, targets: Indices) -> Indices:
    """Return the classes whose scores are nearest to that of each image's only target, (N,3) or fewer.

    Parameters
    ----------
    logits : ndarray
        (N,classes).
    targets : ndarray
        (N,1).

    Raises
    ------
    TargetError
        There is no other class.
    """
    count = min(NEAREST_COUNT, logits.shape[1] - 1)
    if count < 1:
        raise TargetError('against="nearest": the model has only one class')
    distances = np.abs(logits - np.take_along_axis(logits, targets, axis=1))
    np.put_along_axis(distances, targets, np.inf, axis=1)
    return np.asarray(np.argsort(distances, axis=1, kind="stable")[:, :count], np.int64)


def contrasted(results: Results, contrast: Contrast, size: tuple[int, ...] | None, scaling: Scaling) -> Results:
    """Return the results of the first maps, minus their share of the others, rectified and scaled.

    Parameters
    ----------
    results : Results
        With ``maps`` before their ReLU, (N,K+M,h,w).
    contrast : Contrast
    size : tuple of int or None
        Of the heatmaps; None for that of the maps.
    scaling : {"max", "minmax", "signed", None}
    """
    raw: Doubles = results.maps[:, : contrast.kept].astype(np.float64)
    others = results.maps[:, contrast.kept :]
    if others.shape[1]:
        raw = raw - contrast.share * others.mean(axis=1, keepdims=True, dtype=np.float64)
    raw = -raw if contrast.counterfactual else raw
    if contrast.references is not None:
        values = np.take_along_axis(results.logits, results.targets[:, : contrast.kept], axis=1)
        raw = raw * np.sign(values - contrast.references)[..., None, None]
    maps = np.ascontiguousarray(_scaled(raw, scaling), np.float32)
    heatmaps = maps if size is None else kernels.resize(maps, size)
    targets, boxes = results.targets[:, : contrast.kept], results.boxes
    if boxes is not None:
        boxes = boxes._replace(**{name: value[:, : contrast.kept] for name, value in boxes._asdict().items()})
    share = np.asarray(positive_share(raw), np.float32)
    return Results(heatmaps, maps, targets, results.logits, share, boxes, results.similarity)


def _scaled(raw: Doubles, scaling: Scaling) -> Doubles:
    if scaling != "signed":
        return normalized(np.maximum(raw, 0), scaling)
    top = np.abs(raw).max(axis=(2, 3), keepdims=True)
    result: Doubles = np.divide(raw, top, out=np.zeros_like(raw), where=top > 0)
    return result
