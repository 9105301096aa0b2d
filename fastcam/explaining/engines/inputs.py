"""The images of one call, in the ways that an engine may take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...pictures.preparing import resize_image

Floats: TypeAlias = NDArray[np.float32]
Pixels: TypeAlias = NDArray[np.uint8]


class Inputs(Protocol):
    """N images."""

    def __len__(self) -> int: ...

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """Return a slice of them as the model's input, on the host."""


class Tensors:
    """A preprocessed batch.

    Attributes
    ----------
    batch : ndarray
        float32, as the model takes it.
    """

    def __init__(self, batch: Floats) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """See `Inputs`."""
        return self.batch[chunk]


class Pictures:
    """Pictures of any size.

    Parameters
    ----------
    pictures : sequence of ndarray
        uint8 (H0,W0,3).
    prepare : callable
        Of pictures: the model's input.
    """

    def __init__(self, pictures: Sequence[Pixels], prepare: Callable[[Sequence[Pixels]], Floats | Pixels]) -> None:
        self._pictures = pictures
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._pictures)

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """See `Inputs`."""
        return self._prepare(self._pictures[chunk])

    def resize_into(self, places: Pixels, chunk: slice) -> None:
        """Write a slice of them at the size of ``places``, (n,H,W,3), or (n,H,W,1) for their luma."""
        for picture, place in zip(self._pictures[chunk], places, strict=True):
            place[...] = resize_image(picture, place.shape[:2], place.shape[2])


class DeviceInputs:
    """An array on the device of another library.

    Attributes
    ----------
    array : object
        float32 as the model takes it, or uint8 (N,H,W,3) of its input's size.
    """

    def __init__(self, array: Any, count: int) -> None:
        self.array = array
        self._count = count

    def __len__(self) -> int:
        return self._count
