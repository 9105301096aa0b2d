"""The images of one call, in the forms that an engine may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from ...arrays import Floats, Pixels
from ...errors import ArgumentError
from ...pictures.preparing import resize_image

Source: TypeAlias = Literal["pixels", "input"]
"""What a device receives: pictures of the input's size, or the model's input."""


WAY_OUT = 'Open Explainer(..., device="cuda"), or use arrays on the host'


class Inputs(Protocol):
    """N images."""

    @property
    def device_array(self) -> Any:
        """Another library's array on the device that holds them, or None."""

    @property
    def source(self) -> Source:
        """What `write` writes."""

    def __len__(self) -> int: ...

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """Return a slice of them as the model's input, on the host."""

    def write(self, places: Any, chunk: slice) -> None:
        """Write a slice of them, to (n,H,W,3) uint8, to (n,H,W,1) for the luma, or to the model's input."""


class Tensors:
    """A preprocessed batch.

    Parameters
    ----------
    batch : ndarray
        float32, as the model takes it.
    """

    device_array = None
    source: Source = "input"

    def __init__(self, batch: Floats) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch)

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """See `Inputs`."""
        return self._batch[chunk]

    def write(self, places: Floats, chunk: slice) -> None:
        """See `Inputs`."""
        places[...] = self._batch[chunk]


class Pictures:
    """Pictures of any size.

    Parameters
    ----------
    pictures : sequence of ndarray
        uint8 (H0,W0,3).
    prepare : callable
        Converts pictures into the model's input.
    """

    device_array = None
    source: Source = "pixels"

    def __init__(self, pictures: Sequence[Pixels], prepare: Callable[[Sequence[Pixels]], Floats | Pixels]) -> None:
        self._pictures = pictures
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._pictures)

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """See `Inputs`."""
        return self._prepare(self._pictures[chunk])

    def write(self, places: Pixels, chunk: slice) -> None:
        """See `Inputs`."""
        for picture, place in zip(self._pictures[chunk], places, strict=True):
            place[...] = resize_image(picture, place.shape[:2], place.shape[2])


class DeviceInputs:
    """Another library's array on the device.

    Parameters
    ----------
    array : object
        float32 as the model takes it, or uint8 (N,H,W,3) of its input's size.
    count : int
        N.
    source : {"pixels", "input"}
        Which of the two.
    """

    def __init__(self, array: Any, count: int, source: Source) -> None:
        self.device_array = array
        self.source = source
        self._count = count

    def __len__(self) -> int:
        return self._count

    def tensor(self, chunk: slice) -> Floats | Pixels:
        """Raise an error: only engines for that device take these.

        Raises
        ------
        ArgumentError
            Always.
        """
        raise ArgumentError(f"the images cannot be on a GPU: the model runs on the host. {WAY_OUT}")

    def write(self, places: Any, chunk: slice) -> None:
        """Raise an error, as `tensor` does."""
        self.tensor(chunk)
