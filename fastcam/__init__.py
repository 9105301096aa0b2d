"""fastcam: image classifiers that explain themselves, wherever ONNX runs.

The way of the data::

    Keras model / .keras / .h5 / .onnx
      -> export      one .onnx file: scores, activations, and the gradients of the scores that are asked for
      -> Explainer   the file in ONNX Runtime, and a fused kernel for the heatmaps
      -> Explanation scores, heatmaps, overlays

>>> import fastcam
>>> fastcam.export(model, "dogs.onnx", classes=["beagle", "pug"])  # doctest: +SKIP
>>> explanation = fastcam.Explainer("dogs.onnx")("dog.jpg")  # doctest: +SKIP
>>> explanation[0].save("why.png")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        ArgumentError,
        DeviceError,
        FastcamError,
        FileFormatError,
        ImageError,
        KernelError,
        LayerError,
        MissingExtraError,
        ModelError,
        NonFiniteError,
        TargetError,
        UnsupportedOpError,
        WriteError,
    )
    from .explainer import Explainer, Explanation, ImageExplanation
    from .exporter import ExportResult, export
    from .imaging import Preprocessing
    from .splitter import split
    from .vjps import Step, defvjp

# The one list of public names, by the module that makes them. They are loaded when first used: onnx alone takes longer
# to import than a service that only runs an Explainer should wait.
_PUBLIC = {
    "exporter": ("ExportResult", "export"),
    "splitter": ("split",),
    "vjps": ("Step", "defvjp"),
    "explainer": ("Explainer", "Explanation", "ImageExplanation"),
    "imaging": ("Preprocessing",),
    "errors": (
        "ArgumentError",
        "DeviceError",
        "FastcamError",
        "FileFormatError",
        "ImageError",
        "KernelError",
        "LayerError",
        "MissingExtraError",
        "ModelError",
        "NonFiniteError",
        "TargetError",
        "UnsupportedOpError",
        "WriteError",
    ),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "ArgumentError",
    "DeviceError",
    "Explainer",
    "Explanation",
    "ExportResult",
    "FastcamError",
    "FileFormatError",
    "ImageError",
    "ImageExplanation",
    "KernelError",
    "LayerError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "Preprocessing",
    "Step",
    "TargetError",
    "UnsupportedOpError",
    "WriteError",
    "defvjp",
    "export",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastcam")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastcam' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
