"""The kernels' tests are tested: the comparison that every backend passes must catch each planted fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from kernel_support import Case, assert_same, random_case

from fastcam.arrays import Floats
from fastcam.kernels import reference
from fastcam.kernels.boundary import Kernels, MapCall, Normalize, Overlay
from fastcam.kernels.reference import ReferenceKernels

weighted_sum, normalized, resized, blended = (
    reference.weighted_sum,
    reference.normalized,
    reference.resized,
    reference.blended,
)


class FaultyKernels(ReferenceKernels):
    """The specification with one of its functions replaced."""

    def __init__(self, function: str, replacement: Callable[..., Any]) -> None:
        self._function = function
        self._replacement = replacement

    def _render(self, call: MapCall, heatmaps: Floats, overlay: Overlay | None, threads: int) -> int | None:
        with mock.patch.object(reference, self._function, self._replacement):
            return super()._render(call, heatmaps, overlay, threads)


def corner_aligned(maps: Any, size: tuple[int, int]) -> Any:
    for axis, outputs in zip((2, 3), size, strict=True):
        at = np.linspace(0, maps.shape[axis] - 1, outputs)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, maps.shape[axis] - 1)
        shape = [1] * 4
        shape[axis] = outputs
        fraction = (at - low).reshape(shape)
        maps = maps.take(low, axis) * (1 - fraction) + maps.take(high, axis) * fraction
    return maps


def nearest(maps: Any, size: tuple[int, int]) -> Any:
    for axis, outputs in zip((2, 3), size, strict=True):
        maps = maps.take(((np.arange(outputs) + 0.5) * maps.shape[axis] / outputs).astype(int), axis)
    return maps


def truncated_index(values: Any, images: Any, palette: Any, alpha: float) -> Any:
    return blended(np.floor(255 * np.clip(values, 0, 1)) / 255, images, palette, alpha)


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "height and width swapped": ("weighted_sum", lambda *a: weighted_sum(*a).swapaxes(2, 3)),
    "absolute value instead of ReLU": ("weighted_sum", lambda *a: np.abs(weighted_sum(*a))),
    "gradient averaged over channels": (
        "weighted_sum",
        lambda a, w, kind: weighted_sum(a, np.broadcast_to(w.mean(axis=2, keepdims=True), w.shape), kind),
    ),
    "weights of the next channel": ("weighted_sum", lambda a, w, kind: weighted_sum(a, np.roll(w, 1, axis=2), kind)),
    "weights of the next map": ("weighted_sum", lambda a, w, kind: weighted_sum(a, np.roll(w, 1, axis=1), kind)),
    "activations of the next image": ("weighted_sum", lambda a, w, kind: weighted_sum(np.roll(a, 1, axis=0), w, kind)),
    "last channel left out": ("weighted_sum", lambda a, w, kind: weighted_sum(a[:, :-1], w[:, :, :-1], kind)),
    "last pixel left out": ("weighted_sum", lambda *a: weighted_sum(*a) * (np.arange(49) < 48).reshape(7, 7)),
    "sums in float16": ("weighted_sum", lambda *a: weighted_sum(*a).astype(np.float16)),
    "one maximum for all maps": ("normalized", lambda maps, _: maps / maps.max()),
    "maximum and range confused": (
        "normalized",
        lambda maps, kind: normalized(maps, "max" if kind == "minmax" else "minmax"),
    ),
    "no normalisation": ("normalized", lambda maps, _: normalized(maps, None)),
    "corner-aligned resize": ("resized", corner_aligned),
    "nearest neighbour": ("resized", nearest),
    "size swapped": ("resized", lambda maps, size: resized(maps.swapaxes(2, 3), size)),
    "heatmap upside down": ("resized", lambda maps, size: resized(maps, size)[:, :, ::-1]),
    "index truncated": ("blended", truncated_index),
    "alpha the other way round": ("blended", lambda v, i, p, alpha: blended(v, i, p, 1 - alpha)),
    "red and blue swapped": ("blended", lambda v, i, p, alpha: blended(v, i, p[:, ::-1], alpha)),
    "blend truncated": (
        "blended",
        lambda v, i, p, alpha: ((1 - alpha) * i[:, None] + alpha * p[np.rint(255 * v.clip(0, 1)).astype(int)]).astype(
            np.uint8
        ),
    ),
}


def cases(rng: np.random.Generator) -> list[Case]:
    """The inputs for testing a backend, square with square heatmaps, so that shapes alone reveal nothing."""
    normalizations: list[Normalize] = ["max", "minmax", None]
    return [
        random_case(rng, (2, 20, 7, 7), 3, weighting="pooled", normalize=kind, size=(30, 30), overlay=kind is not None)
        for kind in normalizations
    ]


def is_caught(kernels: Kernels, case: Case) -> bool:
    try:
        assert_same(kernels, case)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(rng: np.random.Generator, name: str) -> None:
    assert any(is_caught(FaultyKernels(*FAULTS[name]), case) for case in cases(rng))


def test_nothing_is_caught_without_a_fault(rng: np.random.Generator) -> None:
    for case in cases(rng):
        assert_same(FaultyKernels("weighted_sum", weighted_sum), case)


def test_missing_relu_is_caught(rng: np.random.Generator) -> None:
    class WithoutRelu(ReferenceKernels):
        def _render(self, call: MapCall, heatmaps: Floats, overlay: Overlay | None, threads: int) -> int | None:
            with mock.patch.object(np, "maximum", lambda a, _: a):
                return super()._render(call, heatmaps, overlay, threads)

    for case in cases(rng):
        with pytest.raises(AssertionError):
            assert_same(WithoutRelu(), case)
