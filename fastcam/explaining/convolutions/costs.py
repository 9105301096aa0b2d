"""Which convolutions are worth it."""

from __future__ import annotations

from .planning import Layer, Network, find_layers
from .stored import StoredModel


def may_gain(stored: StoredModel) -> bool:
    """Return whether a model may have convolutions that gain, by its weights alone."""
    return any(len(tensor.shape) == 4 and tensor.shape[2:] == (3, 3) and tensor.shape[1] >= 16 for tensor in stored.tensors.values())


def choose(network: Network) -> list[Layer]:
    """Return the layers to compute with our kernels."""
    return find_layers(network)
