"""What callers hand over as images: paths, PIL images, arrays, tensors, dataset items, and lists of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ImageError
from ..pictures.reading import ImageSource
from .devices.exchange import HasDLPack, HasInterface, is_on_device

Images: TypeAlias = "ImageSource | npt.NDArray[np.floating[Any]] | Sequence[ImageSource] | HasDLPack | HasInterface"

_CHANNELS = (1, 3, 4)


def on_host(images: Any, *, pictures: bool = True) -> Any:
    """Return what a call was given, with tensors of other libraries in host memory as NumPy arrays.

    A dataset item, (image, label), is its image. A torch tensor of pictures, uint8 (3,H,W) or (N,3,H,W), gets its
    channels last, as all other pictures have them. Arrays on a device, and everything else, are returned unchanged.
    Without ``pictures``, the axes of all tensors stay as they are.

    Raises
    ------
    ImageError
        A tensor has no equivalent in NumPy (bfloat16, sparse, without data).
    """
    if is_item(images):
        return on_host(images[0], pictures=pictures)
    if isinstance(images, np.ndarray | list | str | bytes | bytearray | memoryview) or not _is_host_tensor(images):
        return images
    try:
        array = np.asarray(images.detach() if _is_torch(images) else images)
    except Exception as error:  # noqa: BLE001 - each library has its own errors
        raise ImageError(
            f"cannot be read as an array: {type(images).__name__} ({error}). Convert it to float32"
        ) from None
    if not pictures:
        return array
    if _is_torch(images) and array.dtype == np.uint8:
        return _channels_last(array)
    # A tensor of one preprocessed image, as datasets yield it: it must not pass for a picture with 0..1.
    return array[None] if _is_torch(images) and array.dtype.kind == "f" and array.ndim == 3 else array


def is_item(images: Any) -> bool:
    """Return whether it is an item of a dataset: a tuple of an image and the number of its class."""
    if not isinstance(images, tuple) or len(images) != 2:
        return False
    label = images[1]
    is_number = isinstance(label, int | np.integer) and not isinstance(label, bool)
    return is_number or (_is_host_tensor(label) and getattr(label, "ndim", None) == 0)


def as_list(images: Any) -> list[Any]:
    """Return the individual pictures: a list's items, the rows of an array (N,H,W,3), or the single one."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return [on_host(image) for image in images] if isinstance(images, list | tuple) else [images]


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("torch", "torchvision")


def _is_host_tensor(value: Any) -> bool:
    """Return whether another library's array lies in host memory."""
    kind = type(value)  # as Python looks special methods up
    return hasattr(kind, "__array__") and hasattr(kind, "__dlpack__") and not is_on_device(value)


def _channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.ndim in (3, 4) and array.shape[-3] in _CHANNELS:
        return np.moveaxis(array, -3, -1)
    return array
