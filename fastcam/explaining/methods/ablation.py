"""Methods that look into the head of the network: they run it again, or read its weights or its curvature."""

from __future__ import annotations

import numpy as np

from ...arrays import Doubles
from ...errors import ArgumentError
from .table import Evidence, Method, Settings


def _ablation(evidence: Evidence, settings: Settings) -> Doubles:
    """Weigh each channel by the share of the score that is lost without it: (y - y_k) / y (eq. 3).

    The sign of y is left out: a negative score would turn the whole map around.
    """
    lost = evidence.scores - evidence.score_without_channels()
    size = np.abs(evidence.scores)
    weights = np.divide(lost, size, out=np.zeros_like(lost), where=size > 0)
    return np.asarray(np.einsum("ck,chw->khw", weights, evidence.activations))


def _class_weights(evidence: Evidence, settings: Settings) -> Doubles:
    """Weigh each channel by the weight with which its mean enters the score (eq. 2).

    That is the derivative of the score in the mean: h*w times the mean gradient.
    """
    if not evidence.has_linear_head():
        raise ArgumentError(
            'method="cam" is for networks whose head is global average pooling and one dense layer: '
            'take "gradcam", of which it is a special case'
        )
    c, h, w = evidence.activations.shape
    weights = evidence.weights.astype(np.float64) * (h * w)
    return np.asarray((weights @ evidence.activations.reshape(c, h * w)).reshape(-1, h, w))


def _shapley(evidence: Evidence, settings: Settings) -> Doubles:
    """Weigh each channel by its Shapley value to second order, mean(g - H A / 2)."""
    if evidence.position:
        raise ArgumentError('method="shapleycam" explains the first layer of a file: omit layer=')
    weights = evidence.weights - evidence.output("curvatures") / 2
    return np.asarray(np.einsum("kc,chw->khw", weights, evidence.activations))


METHODS = {
    "cam": Method(
        "Zhou et al. 2016, Learning Deep Features for Discriminative Localization, eq. 2",
        reads=("weights",),
        reruns=_class_weights,
    ),
    "shapleycam": Method("Cai 2025, Shapley-CAM, arXiv 2501.06261", reads=("weights", "curvatures"), reruns=_shapley),
    "ablationcam": Method("Ramaswamy et al. 2020, Ablation-CAM, eq. 3 and 4", reads=("activations",), reruns=_ablation),
}
