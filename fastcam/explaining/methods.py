"""The CAM family: each method is a formula that weights activations by gradients.

y is the logit of the target, A the activations (C,h,w) of the explained layer, g = dy/dA. Every map is
ReLU(sum over channels of weight * A); the methods differ in the weight. One weight per channel keeps more of
what a channel shows elsewhere than one weight per element, which in turn follows individual, noisy gradients.
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
    weighting : {"channel", "element"}
        One weight per channel, (N,K,C), or one per activation, (N,K,C,h,w).
    weights : callable
        Of activations (N,C,h,w) and gradients (N,K,C,h,w), both float32.
    source : str
        Paper, and equation of the weights.
    fused : {"pooled", "element"} or None
        Weighting with which the kernels compute the map directly from the gradients, on the host and on a device; None
        if the weights come from ``weights``, on the host.
    linear : bool
        Whether the weights are linear in the gradients, so that maps of several scores can be added and subtracted.
    """

    weighting: Literal["channel", "element"]
    weights: Callable[[Floats, Floats], Floats]
    source: str
    fused: Weighting | None = None
    linear: bool = False


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


METHODS: dict[str, Method] = {
    "gradcam": Method("channel", _mean, "Selvaraju et al. 2017, Grad-CAM, eq. 1", fused="pooled", linear=True),
    "gradcam++": Method("channel", _second_order, "Chattopadhay et al. 2018, Grad-CAM++, eq. 5 and 19"),
    "xgradcam": Method("channel", _activation_share, "Fu et al. 2020, Axiom-based Grad-CAM (XGrad-CAM)", linear=True),
    "hirescam": Method("element", _each, "Draelos and Carin 2020, HiResCAM", fused="element", linear=True),
    "layercam": Method("element", _each_positive, "Jiang et al. 2021, LayerCAM, eq. 5 and 6"),
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
