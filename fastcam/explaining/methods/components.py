"""Methods that take apart what varies among the pixels of a layer: principal components."""

from __future__ import annotations

import numpy as np

from ...arrays import Doubles, Floats
from .table import Method


def _principal(activations: Floats, second: Floats) -> Floats:
    """Project the pixels' activations, minus their mean, on the first principal component: the same for every target.

    The component's sign is open. Here pixels with larger activations get larger values.
    """
    n, c, h, w = activations.shape
    maps = _projected(activations.reshape(n, 1, c, h * w)).reshape(n, 1, h, w)
    return np.asarray(np.broadcast_to(maps, (n, second.shape[1], h, w)), np.float32)


def _principal_of_products(activations: Floats, gradients: Floats) -> Floats:
    """Project gradient times activation, element by element, as `_principal` does."""
    n, k, c, h, w = gradients.shape
    products = gradients * activations[:, None]
    return np.asarray(_projected(products.reshape(n, k, c, h * w)).reshape(n, k, h, w), np.float32)


def _projected(values: Floats) -> Floats:
    """Return the projection (N,K,P) of pixels (N,K,C,P) on their first principal component."""
    pixels = values.astype(np.float64).swapaxes(2, 3)
    # NaN is reported by the caller, and would end the decomposition with an error of its own.
    finite = np.asarray(np.isfinite(pixels).all(axis=(2, 3), keepdims=True))
    centred = np.where(finite, pixels - pixels.mean(axis=2, keepdims=True), 0)
    component = np.linalg.svd(centred, full_matrices=False)[2][:, :, :1]
    found = (centred * component).sum(axis=3)
    level = np.where(finite[..., 0], pixels.sum(axis=3), 0)
    return np.asarray(np.where(finite[..., 0], _upright(found, level), np.nan))


def _upright(found: Doubles, level: Doubles) -> Doubles:
    """Return projections (...,P) with the sign that makes them grow with the sum of the activations, (...,P)."""
    agreement = (found * (level - level.mean(axis=-1, keepdims=True))).sum(axis=-1, keepdims=True)
    return np.where(agreement < 0, -found, found)


def _kernel_principal(activations: Floats, second: Floats) -> Floats:
    """Project the pixels on the first kernel principal component, with tanh(x.y / C + 1): the same for every target.

    The component's sign is open, as in `_principal`.
    """
    n, c, h, w = activations.shape
    pixels = activations.reshape(n, c, h * w).swapaxes(1, 2).astype(np.float64)
    finite = np.asarray(np.isfinite(pixels).all(axis=(1, 2), keepdims=True))
    centred = np.where(finite, pixels - pixels.mean(axis=1, keepdims=True), 0)
    kernel = np.tanh(centred @ centred.swapaxes(1, 2) / c + 1)
    rows = kernel.mean(axis=2, keepdims=True)
    values, vectors = np.linalg.eigh(kernel - rows - rows.swapaxes(1, 2) + kernel.mean(axis=(1, 2), keepdims=True))
    # The kernel may have negative eigenvalues: the component is that of the largest one, not of the largest magnitude.
    found = vectors[:, :, -1] * np.sqrt(np.maximum(values[:, -1:], 0))
    maps = np.where(finite[:, :, 0], _upright(found, centred.sum(axis=2)), np.nan).reshape(n, 1, h, w)
    return np.asarray(np.broadcast_to(maps, (n, second.shape[1], h, w)), np.float32)


METHODS = {
    "eigencam": Method("Muhammad and Yeasin 2020, Eigen-CAM", reads=("activations",), maps=_principal),
    "kpcacam": Method(
        "Karmani et al. 2024, KPCA-CAM, with the sigmoid kernel", reads=("activations",), maps=_kernel_principal
    ),
    "eigengradcam": Method("Gildenblat 2021, EigenGradCAM of pytorch-grad-cam", maps=_principal_of_products),
}
