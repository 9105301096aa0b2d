"""Heatmaps that know nothing of the model: a method that is no better says nothing either."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import Doubles, Floats

Baseline = Callable[[Floats, np.random.Generator], Doubles]
"""Of an image (H,W,channels) and random numbers, a map (H,W) of at least 0."""


def _random(image: Floats, random: np.random.Generator) -> Doubles:
    """Draw each pixel evenly from 0..1."""
    return random.random(image.shape[:2])


def _centre(image: Floats, random: np.random.Generator) -> Doubles:
    """Return a Gaussian around the middle, with a standard deviation of a quarter of each side."""
    rows, columns = (((np.arange(side) + 0.5) / side - 0.5) / 0.25 for side in image.shape[:2])
    return np.asarray(np.exp(-(rows[:, None] ** 2 + columns**2) / 2))


def _edges(image: Floats, random: np.random.Generator) -> Doubles:
    """Return the magnitude of the brightness' differences between neighbours."""
    brightness = image.mean(axis=2, dtype=np.float64)
    down, across = np.gradient(brightness) if min(brightness.shape) > 1 else (brightness, brightness)
    return np.asarray(np.hypot(down, across))


BASELINES: dict[str, Baseline] = {"random": _random, "centre": _centre, "edges": _edges}
