"""The self-test stored in a file: an input that any language can compute, and the expected results.

Numbers separated by spaces in ``metadata_props``, so that no runtime needs a parser:

    fastcam.selftest.input      shape of the input, then its lowest and highest value
    fastcam.selftest.target     the class to explain: not the top one
    fastcam.selftest.logits     scores of the first image
    fastcam.selftest.heatmap    a step, then every step-th value of every step-th row of the first image's heatmap
    fastcam.selftest.tolerance  largest relative L2 error of either
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FileFormatError

_PREFIX = "fastcam.selftest."
# About this many values along each side of a heatmap are compared.
_SIDE = 16


@dataclass(frozen=True)
class SelfTest:
    """An input and the expected results.

    Attributes
    ----------
    shape : tuple of int
        Shape of the input.
    low, high : float
        Its range: 0 and 255 for pictures.
    target : int
        The class to explain.
    logits : ndarray
        float32 (classes,).
    step : int
    heatmap : ndarray
        float32, every ``step``-th value of every ``step``-th row.
    tolerance : float
    """

    shape: tuple[int, ...]
    low: float
    high: float
    target: int
    logits: NDArray[np.float32]
    step: int
    heatmap: NDArray[np.float32]
    tolerance: float

    def input(self, dtype: Any = np.float32) -> NDArray[Any]:
        """Return the input: one byte of a hash of each value's position, scaled to the range."""
        return hashed(self.shape, self.low, self.high, dtype)

    def errors(self, logits: NDArray[Any], heatmaps: NDArray[Any]) -> tuple[float, float]:
        """Return the relative L2 errors of logits (N,classes) and of heatmaps (N,K,H,W), of the first image and map."""
        found = heatmaps[0, 0, :: self.step, :: self.step]
        return _error(logits[0], self.logits), _error(found, self.heatmap)

    def to_properties(self) -> dict[str, str]:
        """Return the entries of ``metadata_props``."""
        entries = {
            "input": (*self.shape, self.low, self.high),
            "target": (self.target,),
            "logits": self.logits,
            "heatmap": (self.step, *self.heatmap),
            "tolerance": (self.tolerance,),
        }
        return {_PREFIX + key: " ".join(f"{number:.9g}" for number in numbers) for key, numbers in entries.items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], name: str) -> SelfTest:
        """Read the entries of the file called ``name``.

        Raises
        ------
        FileFormatError
            It has no self-test, or the self-test is damaged.
        """
        if _PREFIX + "input" not in properties:
            raise FileFormatError(
                f"{name} holds no self-test: install onnxruntime and export the model again with draw='heatmaps'"
            )
        try:
            numbers = {
                key: [float(text) for text in properties[_PREFIX + key].split()]
                for key in ("input", "target", "logits", "heatmap", "tolerance")
            }
            *shape, low, high = numbers["input"]
            step, *heatmap = numbers["heatmap"]
            return cls(
                shape=tuple(int(side) for side in shape),
                low=low,
                high=high,
                target=int(numbers["target"][0]),
                logits=np.array(numbers["logits"], np.float32),
                step=int(step),
                heatmap=np.array(heatmap, np.float32),
                tolerance=numbers["tolerance"][0],
            )
        except (KeyError, ValueError, IndexError, OverflowError) as error:
            raise FileFormatError(f"{name}: its self-test is damaged ({error!r}): export the model again") from error


def hashed(shape: tuple[int, ...], low: float, high: float, dtype: Any) -> NDArray[Any]:
    """Return an array whose value number i is one byte of a hash of i, scaled from 0..255 to ``low``..``high``."""
    x = np.arange(1, math.prod(shape) + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x85EBCA77)
    levels = (x >> np.uint32(24)).astype(np.float32)
    values = np.float32(low) + levels * np.float32((high - low) / 255)
    return values.astype(dtype).reshape(shape)


def sampling_step(height: int, width: int) -> int:
    """Return the step at which a heatmap is compared."""
    return max(1, min(height, width) // _SIDE)


def _error(found: NDArray[Any], expected: NDArray[np.float32]) -> float:
    """Return the relative L2 error; for an expected value of zero, the norm of the actual one."""
    if found.size != expected.size:
        return math.inf
    wanted = expected.astype(np.float64).ravel()
    norm = float(np.linalg.norm(wanted))
    error = float(np.linalg.norm(found.astype(np.float64).ravel() - wanted))
    return (error / norm if norm else error) if math.isfinite(error) else math.inf
