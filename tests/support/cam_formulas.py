"""The CAM family's formulas, one channel at a time and as the papers write them: the oracle of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from networks import Array


def _gradcam(A: Array, g: Array) -> float:
    return float(sum(g[a, b] for a, b in np.ndindex(*A.shape)) / A.size)


def _gradcam_plus_plus(A: Array, g: Array) -> float:
    total = 0.0
    for a, b in np.ndindex(*A.shape):
        if g[a, b] > 0:
            alpha = g[a, b] ** 2 / (2 * g[a, b] ** 2 + A.sum() * g[a, b] ** 3)
            total += alpha * g[a, b]
    return total


def _xgradcam(A: Array, g: Array) -> float:
    return float((A * g).sum() / A.sum()) if A.sum() != 0 else 0.0


WEIGHTS: dict[str, Callable[[Array, Array], Array | float]] = {
    "gradcam": _gradcam,
    "gradcam++": _gradcam_plus_plus,
    "xgradcam": _xgradcam,
    "hirescam": lambda A, g: g,
    "layercam": lambda A, g: g.clip(min=0),
}
"""Weight of a channel, or of each of its elements, from its activations and gradients, both (h,w)."""


def cam(method: str, activations: Array, gradients: Array) -> Array:
    """Return the maps (N,K,h,w) of activations (N,C,h,w) and gradients (N,K,C,h,w)."""
    n, k, channels, h, w = gradients.shape
    maps = np.zeros((n, k, h, w))
    for image, target, channel in np.ndindex(n, k, channels):
        A = activations[image, channel]
        maps[image, target] += WEIGHTS[method](A, gradients[image, target, channel]) * A
    return maps.clip(min=0)
