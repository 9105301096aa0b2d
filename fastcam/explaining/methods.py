"""The CAM family: each method is a formula of activations and gradients.

y is the logit of the target, A the activations (C,h,w) of the explained layer, g = dy/dA. Most maps are
ReLU(sum over channels of weight * A); the methods differ in the weight. One weight per channel keeps more of
what a channel shows elsewhere than one weight per element, which in turn follows individual, noisy gradients.
Methods without weights make their maps themselves.

A row says what its method reads: nothing else in the code knows a method's name, and a file offers every method whose
inputs it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..arrays import Floats
from ..errors import ArgumentError, suggest

if TYPE_CHECKING:
    from ..kernels.boundary import Weighting


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes
    ----------
    source : str
        Paper, and equation.
    reads : {"weights", "gradients", "activations"}
        What the method starts from, apart from the activations: the pooled gradients that every file holds, the full
        ones, or nothing.
    weights : callable or None
        Of activations (N,C,h,w) and gradients (N,K,C,h,w), both float32.
    weighting : {"channel", "element"}
        Whether ``weights`` gives one weight per channel, (N,K,C), or one per activation, (N,K,C,h,w).
    maps : callable or None
        Instead of ``weights``: of activations and what the method reads, the maps before their ReLU, (N,K,h,w).
    fused : {"pooled", "element"} or None
        Weighting with which the kernels compute the map directly from the gradients, on the host and on a device; None
        if the weights come from ``weights``, on the host.
    linear : bool
        Whether the weights are linear in the gradients, so that maps of several scores can be added and subtracted.
    """

    source: str
    reads: Literal["weights", "gradients", "activations"] = "gradients"
    weights: Callable[[Floats, Floats], Floats] | None = None
    weighting: Literal["channel", "element"] = "channel"
    maps: Callable[[Floats, Floats], Floats] | None = None
    fused: Weighting | None = None
    linear: bool = False

    def weigh(self, activations: Floats, second: Floats) -> tuple[Floats, Floats, Literal["channel", "element"]]:
        """Return activations, weights and weighting whose weighted sums are the maps before their ReLU.

        Parameters
        ----------
        activations : ndarray
            (N,C,h,w) float32.
        second : ndarray
            What the method reads: pooled gradients (N,K,C), or full ones (N,K,C,h,w).
        """
        if self.maps is not None:
            maps = np.ascontiguousarray(self.maps(activations, second), np.float32)
            count = maps.shape[1]
            each = np.broadcast_to(np.eye(count, dtype=np.float32), (len(maps), count, count))
            return maps, np.ascontiguousarray(each), "channel"
        if self.weights is None:
            return activations, second, "channel"
        return activations, self.weights(activations, second), self.weighting


def _mean(activations: Floats, gradients: Floats) -> Floats:
    return np.asarray(gradients.mean(axis=(3, 4)))


def _second_order(activations: Floats, gradients: Floats) -> Floats:
    """Weight each positive gradient by g^2 / (2 g^2 + sum(A) g^3), or 0 where the denominator is 0.

    The paper's exp(y) is omitted: it is a single factor for the whole map.
    """
    # float64: an infinite denominator would silently make the weight 0.
    total = activations.sum(axis=(2, 3), dtype=np.float64)[:, None, :, None, None]
    square = np.square(gradients, dtype=np.float64)
    denominator = 2 * square + total * square * gradients
    share = np.divide(square, denominator, out=np.zeros_like(square), where=denominator != 0)
    return np.asarray((share * np.maximum(gradients, 0)).sum(axis=(3, 4)), np.float32)


def _activation_share(activations: Floats, gradients: Floats) -> Floats:
    """Average the gradients weighted by each activation's share of its channel; 0 for a channel that sums to 0."""
    total = activations.sum(axis=(2, 3), keepdims=True, dtype=np.float64)
    share = np.divide(activations, total, out=np.zeros(activations.shape), where=total != 0)
    return np.asarray(np.einsum("nkchw,nchw->nkc", gradients, share), np.float32)


def _each(activations: Floats, gradients: Floats) -> Floats:
    return gradients


def _each_positive(activations: Floats, gradients: Floats) -> Floats:
    return np.maximum(gradients, 0)


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
    sign = np.where((found * (level - level.mean(axis=2, keepdims=True))).sum(axis=2, keepdims=True) < 0, -1.0, 1.0)
    return np.asarray(np.where(finite[..., 0], sign * found, np.nan))


METHODS: dict[str, Method] = {
    "gradcam": Method(
        "Selvaraju et al. 2017, Grad-CAM, eq. 1", reads="weights", weights=_mean, fused="pooled", linear=True
    ),
    "gradcam++": Method("Chattopadhay et al. 2018, Grad-CAM++, eq. 5 and 19", weights=_second_order),
    "xgradcam": Method("Fu et al. 2020, Axiom-based Grad-CAM (XGrad-CAM)", weights=_activation_share, linear=True),
    "hirescam": Method(
        "Draelos and Carin 2020, HiResCAM", weights=_each, weighting="element", fused="element", linear=True
    ),
    "layercam": Method("Jiang et al. 2021, LayerCAM, eq. 5 and 6", weights=_each_positive, weighting="element"),
    "eigencam": Method("Muhammad and Yeasin 2020, Eigen-CAM", reads="activations", maps=_principal),
    "eigengradcam": Method("Gildenblat 2021, EigenGradCAM of pytorch-grad-cam", maps=_principal_of_products),
}

FUSED: dict[str, Weighting] = {name: row.fused for name, row in METHODS.items() if row.fused is not None}
"""Weightings of the methods that the kernels compute from full gradients."""


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises
    ------
    ArgumentError
        There is no such method.
    """
    if name not in METHODS:
        raise ArgumentError(f"method={name!r}: {suggest(str(name), METHODS)}choose one of {', '.join(METHODS)}")
    return METHODS[name]
