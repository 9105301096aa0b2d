"""Further inputs of a call: the regions of a segmentation to explain, and the references of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import shown
from ..arrays import Doubles, Floats
from ..errors import ArgumentError
from ..pictures.letterbox import Frame


def mask_rows(mask: Any, images: int, targets: int, size: tuple[int, int], frames: Sequence[Frame | None]) -> Floats:
    """Return regions as the model takes them, (1 or N, K, H, W).

    Parameters
    ----------
    mask
        (h,w) for all images and targets, (K,h,w) for all images, or (N,K,h,w); bool, or weights of at least 0. It
        covers the whole picture, at any size.
    images, targets : int
        N and K.
    size : (int, int)
        H and W, of the model's scores.
    frames : sequence of Frame or None
        Where each picture lies in the model's input; None where it fills it.

    Raises
    ------
    ArgumentError
        It has another shape, holds negative numbers or NaN, or a region is empty.
    """
    try:
        array = np.asarray(mask)
        known = array.dtype.kind in "biuf" and 2 <= array.ndim <= 4 and array.size > 0
    except Exception:  # noqa: BLE001 - the caller's object may raise anything
        known = False
    if not known:
        raise ArgumentError(f"mask={shown(mask)}: give an array (h,w), (K,h,w) or (N,K,h,w) of bool or weights")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    values = array.reshape(*[1] * (4 - array.ndim), *array.shape)
    if values.shape[0] not in (1, images) or values.shape[1] not in (1, targets):
        raise ArgumentError(
            f"mask of shape {array.shape}: there are {images} images with {targets} targets each; give (h,w), "
            f"({targets},h,w) or ({images},{targets},h,w)"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise ArgumentError("mask: weights must be finite, and not negative")
    # Only their proportions count, and sums must stay finite.
    values = values / max(float(values.max()), np.finfo(np.float32).tiny)
    if any(frame is not None and not _fills(frame) for frame in frames):
        values = np.broadcast_to(values, (images, *values.shape[1:]))
        placed = [_placed(one, frame, size) for one, frame in zip(values, frames, strict=True)]
        values = np.stack(placed)
    else:
        values = _nearest(values, size)
    if not values.any(axis=(2, 3)).all():
        raise ArgumentError(f"mask: a region is empty at the size of the model's scores, {size[0]} x {size[1]}")
    return np.ascontiguousarray(np.broadcast_to(values, (len(values), targets, *size)), np.float32)


def _fills(frame: Frame) -> bool:
    return (frame.height, frame.width) == frame.size


def _placed(mask: Floats, frame: Frame | None, size: tuple[int, int]) -> Floats:
    """Return the masks (K,h,w) of one picture where it lies in the input, at the size of the scores."""
    if frame is None or _fills(frame):
        return _nearest(mask, size)
    whole = np.zeros((len(mask), *frame.size), np.float32)
    rows, columns = slice(frame.top, frame.top + frame.height), slice(frame.left, frame.left + frame.width)
    whole[:, rows, columns] = _nearest(mask, (frame.height, frame.width))
    return _nearest(whole, size)


def _nearest(maps: Floats, size: tuple[int, int]) -> Floats:
    """Resize the last two axes by the value in the middle of each new pixel."""
    sides = zip(size, maps.shape[-2:], strict=True)
    rows, columns = ((2 * np.arange(after) + 1) * before // (2 * after) for after, before in sides)
    return np.asarray(maps[..., rows[:, None], columns], np.float32)


def reference_values(reference: Any, images: int, targets: int) -> Doubles:
    """Return the values to compare those of a regression with, (1 or N, K).

    Raises
    ------
    ArgumentError
        They are not numbers, not finite, or do not fit the images and targets.
    """
    try:
        values = np.asarray(reference, np.float64)
        values = np.broadcast_to(values, (1 if values.ndim < 2 else images, targets))
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(
            f"reference={shown(reference)}: give a number, {targets} numbers, one per target, or an array "
            f"({images},{targets})"
        ) from error
    if not np.isfinite(values).all():
        raise ArgumentError("reference: a value is not finite")
    return values


def is_embedding(reference: Any, size: int) -> bool:
    """Return whether it is embeddings of this size: floats (D,), (K,D) or (N,K,D)."""
    is_array = isinstance(reference, np.ndarray) and reference.dtype.kind == "f"
    return is_array and 1 <= reference.ndim <= 3 and reference.shape[-1] == size


def reference_rows(embeddings: Floats, images: int) -> Floats:
    """Return embeddings as the model takes them, (1 or N, K, D).

    Raises
    ------
    ArgumentError
        They do not fit the images, or one is zero or not finite.
    """
    values = np.asarray(embeddings, np.float32)
    values = values.reshape(*[1] * (3 - values.ndim), *values.shape)
    if values.shape[0] not in (1, images) or not values.shape[1]:
        raise ArgumentError(
            f"reference of shape {embeddings.shape}: there are {images} images; give (D,), (K,D) or ({images},K,D)"
        )
    if not np.isfinite(values).all() or not values.any(axis=2).all():
        raise ArgumentError("reference: an embedding is zero, or not finite")
    # Only their direction counts.
    longest = np.abs(values).max(axis=2, keepdims=True)
    return np.ascontiguousarray(values / longest, np.float32)
