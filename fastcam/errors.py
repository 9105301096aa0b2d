"""Every exception of the package.

Each is a `FastcamError`, and also the builtin that it refines, so that callers may catch either. A message says
what was wrong, where (value, node, layer, image or file), and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastcamError(Exception):
    """Base of everything that fastcam refuses."""


class ArgumentError(FastcamError, ValueError):
    """An argument has a value that the function does not accept."""


class ModelError(FastcamError, ValueError):
    """A model cannot be read, or is not one that fastcam can explain."""


class LayerError(ModelError):
    """The explained layer does not exist, or holds no spatial map."""


class UnsupportedOpError(ModelError, NotImplementedError):
    """An op between the explained layer and the logits has no gradient rule."""


class FileFormatError(ModelError):
    """A file was not made by `fastcam.export`, or by one that this version cannot read."""


class ImageError(FastcamError, ValueError):
    """An image cannot be read, or does not fit the model."""


class TargetError(FastcamError, ValueError):
    """A class to explain does not exist in the model."""


class KernelError(FastcamError, ValueError):
    """A kernel was given an array of wrong dtype, shape, strides or memory."""


class NonFiniteError(FastcamError, ArithmeticError):
    """NaN or infinity in the activations, the gradients or the scores of an image.

    Attributes
    ----------
    image : int
        Number of the image in its batch.
    """

    def __init__(self, message: str, image: int) -> None:
        super().__init__(message)
        self.image = image


class DeviceError(FastcamError, RuntimeError):
    """A device or an execution provider is not available."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device has not enough free memory."""


class MissingExtraError(FastcamError, ImportError):
    """An optional dependency is not installed."""


class WriteError(FastcamError, OSError):
    """A file could not be written; nothing was left behind."""


def suggest(wanted: str, known: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'? " for the known names nearest to ``wanted``, or nothing."""
    return offer(difflib.get_close_matches(wanted, list(dict.fromkeys(known)), n=3))


def offer(names: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'? ", or nothing where there are no names."""
    listed = " or ".join(map(repr, names))
    return f"did you mean {listed}? " if listed else ""
