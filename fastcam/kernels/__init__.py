"""Grad-CAM from activations and weights: maps, heatmaps and overlays in one fused call; and the network's input.

Two backends do the same work behind one boundary (`boundary`): `cpu`, the native module, and `reference`, NumPy in
float64, which is the specification. The environment variable ``FASTCAM_BACKEND`` ("native", the default, or
"reference") chooses when this package is imported.

In: arrays. Out: arrays. Imports `errors` only.
"""

from __future__ import annotations

import importlib
import os

from ..errors import ArgumentError
from .boundary import Kernels, Rendered

__all__ = [
    "Kernels",
    "Rendered",
    "colorize",
    "describe",
    "first_not_finite",
    "prepare",
    "render",
    "render_outputs",
    "resize",
]

_MODULES = {"native": "cpu", "reference": "reference"}


def _load(name: str) -> Kernels:
    if name not in _MODULES:
        allowed = " or ".join(f"'{backend}'" for backend in _MODULES)
        raise ArgumentError(f"environment variable FASTCAM_BACKEND is '{name}': set it to {allowed}, or unset it")
    kernels: Kernels = importlib.import_module(f".{_MODULES[name]}", __name__).KERNELS
    return kernels


_kernels = _load(os.environ.get("FASTCAM_BACKEND", "native"))

render = _kernels.render
render_outputs = _kernels.render_outputs
resize = _kernels.resize
colorize = _kernels.colorize
prepare = _kernels.prepare
first_not_finite = _kernels.first_not_finite
describe = _kernels.describe
