"""All exceptions of the package.

Each is a `FastcamError` and also the builtin that it refines, so callers can catch either. A message says what was
wrong, where (value, node, layer, image or file), and what to do. Pickled errors, as sent by process pools, keep their
type, message and attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FastcamError(Exception):
    """Base of every error that fastcam raises."""

    def __reduce__(self) -> Any:
        # Exceptions are pickled as a call of their class with `args`, which may differ from what `__init__` takes.
        reduced: tuple[Any, ...] = super().__reduce__()  # type: ignore[assignment]  # never the name of a global
        _, args, *state = reduced
        return _restored, (type(self), args), *state


def _restored(kind: type[FastcamError], args: tuple[Any, ...]) -> FastcamError:
    """Return an error with these ``args``, without the `__init__` of its own class; its state is set afterwards."""
    error = kind.__new__(kind, *args)
    super(FastcamError, error).__init__(*args)
    return error


class ArgumentError(FastcamError, ValueError):
    """An argument has a value that the function does not accept."""


class ModelError(FastcamError, ValueError):
    """A model cannot be read, or is not one that fastcam can explain."""


class LayerError(ModelError):
    """The explained layer does not exist or has no spatial map."""


class UnsupportedOpError(ModelError, NotImplementedError):
    """An op between the explained layer and the logits has no gradient rule."""


class FileFormatError(ModelError):
    """A file was not written by `fastcam.export`, or by a version that this one cannot read."""


class ImageError(FastcamError, ValueError):
    """An image cannot be read or does not fit the model."""


class TargetError(FastcamError, ValueError):
    """A class to explain does not exist in the model."""


class KernelError(FastcamError, ValueError):
    """A kernel was given an array of the wrong dtype, shape, strides or memory."""


class NonFiniteError(FastcamError, ArithmeticError):
    """NaN or infinity in the activations, the gradients or the scores of an image.

    Attributes
    ----------
    image : int
        Index of the image in its batch.
    """

    def __init__(self, message: str, image: int) -> None:
        super().__init__(message)
        self.image = image


class DeviceError(FastcamError, RuntimeError):
    """A device or an execution provider is not available."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device does not have enough free memory."""


class TimeLimitError(FastcamError, TimeoutError):
    """A call took longer than its ``timeout``."""


class MissingExtraError(FastcamError, ImportError):
    """An optional dependency is not installed."""


class WriteError(FastcamError, OSError):
    """A file cannot be written; nothing is left behind."""


def suggest(wanted: str, known: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'? " for the known names closest to ``wanted``, or an empty string."""
    return offer(difflib.get_close_matches(wanted, list(dict.fromkeys(known)), n=3))


def offer(names: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'? ", or an empty string if there are no names."""
    listed = " or ".join(map(repr, names))
    return f"did you mean {listed}? " if listed else ""
