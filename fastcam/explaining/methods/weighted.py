"""The CAM family: each method is a formula of activations and gradients.

y is the logit of the target, A the activations (C,h,w) of the explained layer, g = dy/dA. The maps are
ReLU(sum over channels of weight * A); the methods differ in the weight. One weight per channel keeps more of
what a channel shows elsewhere than one weight per element, which in turn follows individual, noisy gradients.
"""

from __future__ import annotations

import numpy as np

from ...arrays import Floats
from .table import Method


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


METHODS = {
    "gradcam": Method(
        "Selvaraju et al. 2017, Grad-CAM, eq. 1", reads=("weights",), weights=_mean, fused="pooled", linear=True
    ),
    "gradcam++": Method("Chattopadhay et al. 2018, Grad-CAM++, eq. 5 and 19", weights=_second_order),
    "xgradcam": Method("Fu et al. 2020, Axiom-based Grad-CAM (XGrad-CAM)", weights=_activation_share, linear=True),
    "hirescam": Method(
        "Draelos and Carin 2020, HiResCAM", weights=_each, weighting="element", fused="element", linear=True
    ),
    "layercam": Method("Jiang et al. 2021, LayerCAM, eq. 5 and 6", weights=_each_positive, weighting="element"),
    "refinecam": Method(
        "RefineCAM 2026 (arXiv 2605.14641): the product over layers of Grad-CAM++",
        weights=_second_order,
        merge="product",
    ),
}
