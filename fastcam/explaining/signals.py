"""Series and volumes: how callers hand them over, and how their heatmaps are enlarged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..arrays import Floats
from ..errors import ImageError, MissingExtraError
from ..preprocessing import CONTENTS, Layout
from .engines.inputs import Tensors
from .images import on_host

NIFTI = (".nii", ".nii.gz")


class Signals(Tensors):
    """A batch of series or volumes.

    Parameters
    ----------
    batch : ndarray
        float32, as the model takes it.
    sources : sequence
        Of each: the nibabel image that it came from, or None.
    """

    def __init__(self, batch: Floats, sources: Sequence[Any]) -> None:
        super().__init__(batch)
        self.batch = batch
        self.sources = list(sources)


def read_signals(signals: Any, layout: Layout, shape: tuple[int, ...]) -> Signals:
    """Read what a call was given.

    Parameters
    ----------
    signals
        An array or tensor of numbers: a batch, one series or volume, or one without its axis of one channel; a
        nibabel image, or the path of a .nii or .nii.gz file: axes as nibabel has them, in this order, and a last one
        for channels; or a list of these.
    layout : Layout
        Of the model's input.
    shape : tuple of int
        Of one, as the model takes it.

    Raises
    ------
    ImageError
        One has another shape, cannot be read, or holds NaN or infinity.
    MissingExtraError
        nibabel is not installed.
    """
    if _is_batch(signals, len(layout)):
        batch = np.asarray(on_host(signals, pictures=False))
        parts, sources = list(batch), [None] * len(batch)
    else:
        items = list(signals) if isinstance(signals, list | tuple) else [signals]
        read = [_read(item, layout) for item in items]
        parts, sources = [part for part, _ in read], [source for _, source in read]
    rows = [_fitted(part, layout, shape, position) for position, part in enumerate(parts)]
    batch = np.stack(rows) if rows else np.zeros((0, *shape), np.float32)
    bad = kernels.first_not_finite(batch) if rows else None
    if bad is not None:
        raise ImageError(f"number {bad} of the {_contents(layout)} holds NaN or infinity, or a number beyond float32")
    return Signals(batch, sources)


def _is_batch(signals: Any, rank: int) -> bool:
    return getattr(signals, "ndim", None) == rank and not _is_nifti(signals)


def _is_nifti(item: Any) -> bool:
    return hasattr(item, "get_fdata") and hasattr(item, "affine")


def _read(item: Any, layout: Layout) -> tuple[Any, Any]:
    """Return the numbers of one series or volume, and the nibabel image that they came from."""
    if isinstance(item, str | os.PathLike):
        item = _open_nifti(Path(item), layout)
    if not _is_nifti(item):
        return np.asarray(on_host(item, pictures=False)), None
    try:
        numbers = np.asarray(item.get_fdata(dtype=np.float32, caching="unchanged"))
    except Exception as error:
        raise ImageError(f"the NIfTI image cannot be read ({type(error).__name__}: {error})") from error
    if numbers.ndim == len(layout) - 1 and layout[1] == "C":
        numbers = np.moveaxis(numbers, -1, 0)
    return numbers, item


def _open_nifti(path: Path, layout: Layout) -> Any:
    if len(layout) != 5 or not path.name.lower().endswith(NIFTI):
        files = "arrays, nibabel images and .nii or .nii.gz files" if len(layout) == 5 else "arrays"
        raise ImageError(f"{path}: the model takes {_contents(layout)}: pass {files}")
    try:
        import nibabel
    except ImportError as error:
        raise MissingExtraError(f'reading {path} needs nibabel ({error}): pip install "fastcam[volumes]"') from error
    try:
        return nibabel.load(path)
    except (OSError, nibabel.filebasedimages.ImageFileError) as error:
        raise ImageError(f"{path}: it cannot be read as NIfTI ({error})") from error


def _fitted(part: Any, layout: Layout, shape: tuple[int, ...], position: int) -> Floats:
    """Return one series or volume as the model takes it."""
    channels = layout.index("C") - 1
    if part.dtype.kind not in "fiub":
        raise ImageError(f"number {position} of the {_contents(layout)} is an array of {part.dtype}: pass numbers")
    if part.shape == shape[:channels] + shape[channels + 1 :] and shape[channels] == 1:
        part = np.expand_dims(part, channels)
    if part.shape != shape:
        sizes = ", ".join(map(str, shape))
        raise ImageError(
            f"number {position} of the {_contents(layout)} has shape {part.shape}; the model takes (N, {sizes}), "
            f"{layout}: resample it first, in the way that the model was trained with"
        )
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(part, np.float32)


def _contents(layout: Layout) -> str:
    return CONTENTS[len(layout)]


def enlarge(maps: Floats, shape: tuple[int, ...], size: tuple[int, ...] | None) -> Floats:
    """Return the maps of series or volumes at another size.

    Linear interpolation along every axis, with half-pixel centres and repeated edges, as pictures have it.

    Parameters
    ----------
    maps : ndarray
        (N,K,a,b) float32, laid out as planes: (N,K,1,t) or (N,K,d*h,w).
    shape : tuple of int
        Of one map, (t,) or (d,h,w).
    size : tuple of int or None
        The wanted shape; None for the same.

    Returns
    -------
    ndarray
        (N,K,*size) float32.
    """
    rows, count = maps.shape[:2]
    if size is None or not rows * count:
        return maps.reshape(rows, count, *(size or shape))
    if len(shape) == 1:
        return kernels.resize(np.ascontiguousarray(maps.reshape(rows, count, 1, -1)), (1, *size)).reshape(
            rows, count, *size
        )
    depth, *plane = shape
    planes = np.ascontiguousarray(maps.reshape(rows, count * depth, *plane))
    wide = kernels.resize(planes, size[1:]).reshape(rows, count, depth, *size[1:])
    return np.ascontiguousarray(np.einsum("dz,nkzyx->nkdyx", _interpolation(depth, size[0]), wide), np.float32)


def _interpolation(before: int, after: int) -> Floats:
    """Return the matrix (after,before) of linear interpolation along one axis."""
    centres = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    low = np.floor(centres).astype(int)
    matrix = np.zeros((after, before), np.float32)
    rows = np.arange(after)
    matrix[rows, low] = 1 - (centres - low)
    matrix[rows, np.minimum(low + 1, before - 1)] += (centres - low).astype(np.float32)
    return matrix
