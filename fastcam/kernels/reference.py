"""The specification: NumPy in float64, one line per formula, no cleverness.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..arrays import Doubles, Floats, Pixels
from .boundary import VIEW_LIMIT, Kernels, MapCall, Normalize, Overlay, Weighting

if TYPE_CHECKING:
    from PIL import Image


class ReferenceKernels(Kernels):
    """Slow, single-threaded, and right by inspection."""

    def first_not_finite(self, array: Floats) -> int | None:
        """See `Kernels`."""
        found = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
        return int(found[0]) if found.size else None

    def describe(self) -> dict[str, str | int]:
        """Backend "reference"."""
        return {"backend": "reference", "instruction_set": "numpy", "threads": 1}

    def _default_threads(self) -> int:
        return 1

    def _render(self, call: MapCall, heatmaps: Floats, overlay: Overlay | None, threads: int) -> int | None:
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            raw = weighted_sum(call.activations, call.weights, call.weighting).astype(np.float32)
        bad = _first_map(~np.isfinite(raw))
        if bad is not None:
            return bad
        call.evidence[...] = positive_share(raw.astype(np.float64))
        maps = normalized(np.maximum(raw.astype(np.float64), 0), call.normalize)
        call.maps[...] = maps
        values = resized(maps, (heatmaps.shape[2], heatmaps.shape[3]))
        heatmaps[...] = values
        _blend(values, overlay)
        return None

    def _view(
        self, maps: Floats, size: tuple[int, int], heatmaps: Floats | None, overlay: Overlay | None, threads: int
    ) -> int | None:
        bad = _first_map(~(np.abs(maps) <= VIEW_LIMIT))
        if bad is not None:
            return bad
        values = resized(maps.astype(np.float64), size)
        if heatmaps is not None:
            heatmaps[...] = values
        _blend(values, overlay)
        return None

    def _prepare(
        self, image: Pixels, levels: Floats, input_out: Floats, *, reversed_order: bool, channels_last: bool
    ) -> None:
        from PIL import Image

        height, width = input_out.shape[:2] if channels_last else input_out.shape[1:]
        pixels = np.asarray(resized_picture(Image.fromarray(image), (height, width)))
        values = levels[np.arange(3), pixels[..., ::-1] if reversed_order else pixels]
        input_out[...] = values if channels_last else values.transpose(2, 0, 1)


def weighted_sum(activations: NDArray[np.floating], weights: NDArray[np.floating], weighting: Weighting) -> Doubles:
    """Sum over channels of weight * activation (eq. 2 before the ReLU), (N, K, h, w)."""
    values = activations.astype(np.float64)
    factors = weights.astype(np.float64)
    if weighting == "pooled":
        factors = factors.mean(axis=(3, 4))  # eq. 1
    formula = "nkchw,nchw->nkhw" if weighting == "element" else "nkc,nchw->nkhw"
    sums: Doubles = np.einsum(formula, factors, values)
    return sums


def positive_share(raw: Doubles) -> Doubles:
    """Sum of the positive values over the sum of all magnitudes, (N, K); 0 for a map of zeros."""
    positive = np.maximum(raw, 0).sum(axis=(2, 3))
    total = np.abs(raw).sum(axis=(2, 3))
    share: Doubles = np.divide(positive, total, out=np.zeros_like(total), where=total > 0)
    return share


def normalized(maps: Doubles, normalize: Normalize) -> Doubles:
    """Maps in 0..1 by "max" or "minmax", raw by None; zeros where the divisor is 0."""
    if normalize is None:
        return maps
    low = maps.min(axis=(2, 3), keepdims=True) if normalize == "minmax" else 0.0
    span = maps.max(axis=(2, 3), keepdims=True) - low
    result: Doubles = np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0)
    return result


def resized(maps: Doubles, size: tuple[int, int]) -> Doubles:
    """Half-pixel-centre bilinear interpolation, edges repeated, no antialiasing."""
    low, high, fraction = _positions(maps.shape[2], size[0])
    maps = maps[:, :, low] * (1 - fraction)[:, None] + maps[:, :, high] * fraction[:, None]
    low, high, fraction = _positions(maps.shape[3], size[1])
    return maps[..., low] * (1 - fraction) + maps[..., high] * fraction


def resized_picture(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Antialiased bilinear resizing to (H, W), to the width first.

    In a single call, Pillow 13 starts with the height for some tall pictures, which rounds differently.
    """
    from PIL import Image

    height, width = size
    for step in ((width, picture.height), (width, height)):
        picture = picture.resize(step, Image.Resampling.BILINEAR)
    return picture


def blended(values: Doubles, images: Pixels, palette: Pixels, alpha: float) -> Pixels:
    """Colours of `values` over `images`, (N, K, H, W, 3)."""
    colors = palette[np.rint(255 * np.clip(values, 0, 1)).astype(np.intp)]
    return np.rint((1 - alpha) * images[:, None] + alpha * colors).astype(np.uint8)


def _positions(inputs: int, outputs: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Doubles]:
    """For each output: the input below, the input above, and its fractional position between them."""
    at = np.clip((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
    low = np.floor(at).astype(np.intp)
    return low, np.minimum(low + 1, inputs - 1), at - low


def _blend(values: Doubles, overlay: Overlay | None) -> None:
    if overlay is not None:
        overlay.out[...] = blended(values, overlay.images, overlay.palette, overlay.alpha)


def _first_map(bad: NDArray[np.bool_]) -> int | None:
    found = np.flatnonzero(bad.any(axis=(2, 3)))
    return int(found[0]) if found.size else None


KERNELS = ReferenceKernels()
