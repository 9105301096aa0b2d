"""From logits to probabilities, as the source model computes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import Floats


def probabilities_of(logits: Floats, activation: str) -> Floats | None:
    """Return the probabilities (N,classes) of logits; None if the activation is not known."""
    compute = _PROBABILITIES.get(activation)
    return None if compute is None else compute(logits)


def _softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)


def _sigmoid(logits: Floats) -> Floats:
    # Only exp of negative numbers: exp(-x) would overflow for large negative logits.
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1 / (1 + small), small / (1 + small)), np.float32)


_PROBABILITIES: dict[str, Callable[[Floats], Floats]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "probabilities": lambda logits: logits,
}
