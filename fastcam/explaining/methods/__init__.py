"""The methods by which a score is explained: one table, whose rows say what they read and how they make maps.

Nothing else in the code knows a method's name: a file offers every method whose inputs it holds. A new method is a row
in the module of its kind, with its formula.

In: activations and gradients, or an `Evidence` that runs the model. Out: weights, or maps before their ReLU. Imports
only the ground.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ArgumentError, suggest
from . import ablation, attention, components, masking, sensitivity, weighted
from .table import Evidence, Method, Reads, Setting

if TYPE_CHECKING:
    from ...kernels.boundary import Weighting

__all__ = ["FORMULAS", "FUSED", "METHODS", "Evidence", "Method", "Reads", "Setting", "find_method"]

METHODS: dict[str, Method] = {
    **weighted.METHODS,
    **components.METHODS,
    **ablation.METHODS,
    **masking.METHODS,
    **sensitivity.METHODS,
    **attention.METHODS,
}

FORMULAS = tuple(name for name, row in METHODS.items() if row.reruns is None)
"""Methods that are formulas of activations and gradients, and do not run the model again."""

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
