"""One heatmap of one picture, and what can be asked about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import Array, Doubles, Floats
from ..explaining.methods import Evidence

Draw = Callable[[Floats, int | None], Doubles]
"""Returns the heatmap (H,W) of a preprocessed image, for the target, or for another entry of the table of scores."""


@dataclass
class Case:
    """A heatmap, and the model that it explains.

    Attributes
    ----------
    evidence : Evidence
        Of the image, with the explained class as its only target.
    target : int
        The explained class.
    class_count : int
    heatmap : ndarray
        (H,W) float64 in 0..1, of the image's size.
    draw : callable
        How the heatmap was made, for other images and classes.
    mask : ndarray or None
        (H,W) bool: where the object is.
    settings : mapping
        Of all metrics, see `metrics.SETTINGS`.
    number : int
        Of the image: random choices of a metric are the same for all methods, and differ between images.
    """

    evidence: Evidence
    target: int
    class_count: int
    heatmap: Doubles
    draw: Draw
    mask: Array | None
    settings: Mapping[str, Any]
    number: int
    _found: dict[str, float] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[Case], float]) -> float:
        """Return a metric of this case, which several others may be made of."""
        if name not in self._found:
            self._found[name] = compute(self)
        return self._found[name]

    def random(self) -> np.random.Generator:
        """Return random numbers that depend on the seed and on the image only."""
        return np.random.default_rng([self.settings["seed"], self.number])

    def pixels(self) -> Floats:
        """Return the image as rows of pixels, (H*W,channels)."""
        channels_last = (
            self.evidence.image if self.evidence.layout == "NHWC" else self.evidence.image.transpose(1, 2, 0)
        )
        return np.ascontiguousarray(channels_last.reshape(-1, channels_last.shape[2]))

    def images(self, pixels: Floats) -> Floats:
        """Return rows of pixels (M,H*W,channels) as images."""
        images = pixels.reshape(len(pixels), *self.evidence.size, -1)
        return np.ascontiguousarray(images if self.evidence.layout == "NHWC" else images.transpose(0, 3, 1, 2))

    def score(self, images: Callable[[slice], Floats], count: int) -> Doubles:
        """Return the probabilities (M,) of the target for changed images; scores where there are no probabilities."""
        return np.asarray(self.evidence.score(images, count, probabilities=True)[:, 0])

    def own_score(self) -> float:
        """Return the probability or score of the image itself."""
        return self.once("score", lambda case: float(case.score(lambda rows: case.evidence.image[None], 1)[0]))

    def masked(self) -> Floats:
        """Return the image times its heatmap."""
        shape = (*self.evidence.size, 1) if self.evidence.layout == "NHWC" else (1, *self.evidence.size)
        return np.asarray(self.evidence.image * self.heatmap.astype(np.float32).reshape(shape))
