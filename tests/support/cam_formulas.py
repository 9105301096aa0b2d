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
    "refinecam": _gradcam_plus_plus,
    "layercam": lambda A, g: g.clip(min=0),
}
"""Weight of a channel, or of each of its elements, from its activations and gradients, both (h,w)."""


def _eigen(values: Array) -> Array:
    """The first principal component's scores (h,w) of pixels with these values (C,h,w), by the covariance matrix."""
    pixels = values.reshape(len(values), -1).T
    centred = pixels - pixels.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    scores = centred @ vectors[:, -1]
    level = pixels.sum(axis=1)
    sign = -1 if np.corrcoef(scores, level)[0, 1] < 0 else 1
    return np.asarray(sign * scores.reshape(values.shape[1:]))


def _kernel_eigen(values: Array) -> Array:
    """The same in the feature space of the kernel tanh(x.y / C + 1), centred there as scikit-learn does it."""
    pixels = values.reshape(len(values), -1).T
    pixels = pixels - pixels.mean(axis=0)
    count = len(pixels)
    kernel = np.array([[np.tanh(x @ y / len(values) + 1) for y in pixels] for x in pixels])
    centring = np.eye(count) - np.full((count, count), 1 / count)
    eigenvalues, vectors = np.linalg.eigh(centring @ kernel @ centring)
    scores = vectors[:, -1] * np.sqrt(eigenvalues[-1])
    sign = -1 if np.corrcoef(scores, pixels.sum(axis=1))[0, 1] < 0 else 1
    return np.asarray(sign * scores.reshape(values.shape[1:]))


MAPS: dict[str, Callable[[Array, Array], Array]] = {
    "eigencam": lambda A, g: _eigen(A),
    "kpcacam": lambda A, g: _kernel_eigen(A),
    "eigengradcam": lambda A, g: _eigen(A * g),
}
"""Map (h,w) before its ReLU, from activations and gradients, both (C,h,w)."""


def cam(method: str, activations: Array, gradients: Array) -> Array:
    """Return the maps (N,K,h,w) of activations (N,C,h,w) and gradients (N,K,C,h,w)."""
    n, k, channels, h, w = gradients.shape
    maps = np.zeros((n, k, h, w))
    if method in MAPS:
        for image, target in np.ndindex(n, k):
            maps[image, target] = MAPS[method](activations[image], gradients[image, target])
        return maps.clip(min=0)
    for image, target, channel in np.ndindex(n, k, channels):
        A = activations[image, channel]
        maps[image, target] += WEIGHTS[method](A, gradients[image, target, channel]) * A
    return maps.clip(min=0)
