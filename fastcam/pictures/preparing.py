"""From pictures to the model's input batch: resizing and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..arrays import Pixels
from ..errors import ArgumentError
from ..kernels.reference import resized_picture
from ..preprocessing import Layout, Preprocessing


def prepare(
    images: Sequence[Pixels],
    preprocessing: Preprocessing,
    size: tuple[int, int],
    layout: Layout = "NHWC",
    channels: int = 3,
) -> NDArray[np.float32]:
    """Resize and normalise pictures into one input batch.

    The whole picture is stretched to `size`, without cropping, regardless of its aspect ratio, so that a heatmap
    stretched over the picture covers all of it. Resizing is Pillow's bilinear filter, antialiased when shrinking, to
    the width first.

    Parameters
    ----------
    images
        N uint8 arrays (H0,W0,3), RGB, as from `read_image`; their sizes may differ.
    preprocessing
        Normalisation after resizing.
    size
        (H, W) of the model's input, pixels.
    layout
        "NHWC" or "NCHW".
    channels
        3, or 1 for a greyscale model: the ITU-R 601 luma, normalised by three equal means and scales.

    Returns
    -------
    ndarray
        float32 (N,H,W,channels) or (N,channels,H,W), C-contiguous.

    Raises
    ------
    ArgumentError
        Unknown layout, other channels than 1 and 3, or a greyscale model with different means or scales.
    """
    if layout not in ("NHWC", "NCHW"):
        raise ArgumentError(f"layout must be 'NHWC' or 'NCHW', not {layout!r}")
    if channels not in (1, 3):
        raise ArgumentError(f"pictures fit models with 1 or 3 channels, not {channels}. Pass a float batch instead")
    if channels == 1 and (len(set(preprocessing.mean)) > 1 or len(set(preprocessing.scale)) > 1):
        raise ArgumentError(f"a greyscale model needs three equal means and three equal scales, not {preprocessing}")
    shape = (*size, channels) if layout == "NHWC" else (channels, *size)
    batch = np.empty((len(images), *shape), np.float32)
    levels = _levels(preprocessing)
    for image, place in zip(images, batch, strict=True):
        if channels == 1:
            place.reshape(size)[...] = levels[0][resize_image(image, size, 1)[..., 0]]
        else:
            kernels.prepare(
                np.ascontiguousarray(image),
                levels,
                place,
                reversed_order=preprocessing.order == "BGR",
                channels_last=layout == "NHWC",
            )
    return batch


def _levels(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return what each pixel value becomes, float32 (3,256), by channel of the model's input."""
    mean, scale = (np.array(values, np.float32)[:, None] for values in (preprocessing.mean, preprocessing.scale))
    levels: NDArray[np.float32] = (np.arange(256, dtype=np.float32) - mean) * scale
    return levels


def resize_image(image: Pixels, size: tuple[int, int], channels: int = 3) -> Pixels:
    """Resize a picture to (H, W), antialiased bilinear; uint8 (H,W,channels), 1 channel being its luma."""
    from PIL import Image

    height, width = size
    picture = Image.fromarray(image)
    if channels == 1:
        picture = picture.convert("L")
    return np.asarray(resized_picture(picture, size)).reshape(height, width, channels)


def resize_images(images: Sequence[Pixels], size: tuple[int, int]) -> Pixels:
    """Resize pictures to (H, W) as `prepare` does, without normalising them; uint8 (N,H,W,3)."""
    batch = np.empty((len(images), *size, 3), np.uint8)
    for image, place in zip(images, batch, strict=True):
        place[...] = resize_image(image, size)
    return batch


def shrink_image(image: Pixels, factor: int) -> Pixels:
    """Shrink a picture by a whole factor, averaging; a factor below 2 changes nothing."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image
