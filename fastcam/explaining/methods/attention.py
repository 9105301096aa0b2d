"""Methods that read the attention of a transformer, whose maps the file makes itself."""

from __future__ import annotations

from ...arrays import Doubles
from .table import Evidence, Method, Settings


def _rollout(evidence: Evidence, settings: Settings) -> Doubles:
    """Return the patches' shares in what the head reads, through all blocks (eq. 1): the same for every target."""
    return evidence.output("rollout_maps")


def _legrad(evidence: Evidence, settings: Settings) -> Doubles:
    """Return the positive gradients of every block's own score in its attention, over heads and tokens (eq. 5 to 8)."""
    return evidence.output("legrad_maps")


METHODS = {
    "attentionrollout": Method(
        "Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, eq. 1",
        reads=("rollout_maps",),
        reruns=_rollout,
    ),
    "legrad": Method("Bousselham et al. 2025, LeGrad, eq. 5 to 8", reads=("legrad_maps",), reruns=_legrad),
}
