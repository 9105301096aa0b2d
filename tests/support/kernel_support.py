"""Inputs of the kernel tests, and the comparison that every backend has to pass.

The comparison's bound is a forward error bound, not a guess. A sum of n products in float32, in any order, is off by at
most n * eps * sum |weight * activation| (Higham 2002, section 3.1), plus n * tiny for products that fall below the
normal numbers. Normalisation divides that by the map's maximum or range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcam.kernels import Rendered, reference
from fastcam.kernels.boundary import Kernels, Normalize, Weighting

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).smallest_subnormal)


@dataclass
class Case:
    """Arguments of `render`."""

    activations: NDArray[Any]
    weights: NDArray[Any]
    weighting: Weighting = "channel"
    normalize: Normalize = "max"
    size: tuple[int, int] | None = None
    overlay: dict[str, Any] = field(default_factory=dict)

    def run(self, kernels: Kernels, **more: Any) -> Rendered:
        return kernels.render(
            self.activations,
            self.weights,
            weighting=self.weighting,
            normalize=self.normalize,
            size=self.size,
            **self.overlay,
            **more,
        )


def weights_shape(shape: tuple[int, int, int, int], k: int, weighting: Weighting) -> tuple[int, ...]:
    n, c, h, w = shape
    return (n, k, c) if weighting == "channel" else (n, k, c, h, w)


def channels_last(array: NDArray[Any]) -> NDArray[Any]:
    """The same values with the channels innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, -3, -1)), -1, -3)


def random_case(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int] = (2, 20, 6, 5),
    k: int = 3,
    *,
    dtypes: tuple[Any, Any] = (np.float32, np.float32),
    last: bool = False,
    weighting: Weighting = "channel",
    normalize: Normalize = "max",
    size: tuple[int, int] | None = (31, 40),
    overlay: bool = False,
) -> Case:
    """Positive activations, as a ReLU leaves them, and weights of both signs."""
    activations = rng.random(shape, np.float32).astype(dtypes[0])
    weights = rng.standard_normal(weights_shape(shape, k, weighting), np.float32).astype(dtypes[1])
    if last:
        activations = channels_last(activations)
        weights = weights if weighting == "channel" else channels_last(weights)
    case = Case(activations, weights, weighting, normalize, size)
    if overlay:
        height, width = size or shape[2:]
        case.overlay = {
            "images": rng.integers(0, 256, (shape[0], height, width, 3), np.uint8),
            "palette": rng.integers(0, 256, (256, 3), np.uint8),
            "alpha": 0.4,
        }
    return case


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Relative L2 error."""
    difference = float(np.linalg.norm(actual.astype(np.float64) - expected))
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return difference / norm if norm > 0 else difference


def sum_bound(case: Case) -> NDArray[np.float64]:
    """Largest error of each element of the raw maps, (N, K, h, w)."""
    _, c, h, w = case.activations.shape
    terms = c if case.weighting != "pooled" else c + h * w + 1
    magnitudes = reference.weighted_sum(np.abs(case.activations), np.abs(case.weights), case.weighting)
    # A subnormal weight or product is off by at most TINY, times its other factor.
    reach = np.abs(case.activations.astype(np.float64)).sum(axis=1)[:, None]
    bound: NDArray[np.float64] = (terms + 2) * (EPS * magnitudes + TINY * (1 + reach))
    return bound


def assert_same(kernels: Kernels, case: Case, **more: Any) -> Rendered:
    """Check that a backend agrees with the specification; return its results."""
    expected = case.run(reference.KERNELS)
    actual = case.run(kernels, **more)
    tolerance = _map_tolerance(case)
    assert_close(actual.maps, expected.maps, tolerance)
    # Bilinear interpolation is an average: it passes on at most the largest error, and rounds a few times itself.
    largest = tolerance.max(axis=(2, 3), keepdims=True) + 4 * EPS * expected.maps.max(axis=(2, 3), keepdims=True)
    assert_close(actual.heatmaps, expected.heatmaps, largest)
    assert_close(actual.evidence, expected.evidence, _evidence_tolerance(case))
    if actual.overlays is not None:
        assert_overlays(actual.overlays, actual.heatmaps, case.overlay)
    else:
        assert expected.overlays is None
    return actual


def _evidence_tolerance(case: Case) -> NDArray[np.float64]:
    """Largest error of P / T, the sum of the positive values over that of all magnitudes.

    With E the sum of the errors of all pixels, P and T are off by E at most, and by (pixels + 4) EPS of themselves from
    adding up in float32 in any order: the quotient is off by 2 E / (T - E) + 2 (pixels + 4) EPS. If E is not small
    compared with T, any value in 0..1 is right.
    """
    sums = reference.weighted_sum(case.activations, case.weights, case.weighting)
    total, error = np.abs(sums).sum(axis=(2, 3)), sum_bound(case).sum(axis=(2, 3))
    relative = np.divide(2 * error, total - error, out=np.ones_like(total), where=total > 2 * error)
    tolerance: NDArray[np.float64] = np.minimum(1, relative + 2 * (sums[0, 0].size + 4) * EPS) if sums.size else total
    return tolerance


def _map_tolerance(case: Case) -> NDArray[np.float64]:
    error = sum_bound(case)
    if case.normalize is None:
        return error + TINY
    sums = reference.weighted_sum(case.activations, case.weights, case.weighting)
    raw = np.maximum(sums, 0)
    low = raw.min(axis=(2, 3), keepdims=True) if case.normalize == "minmax" else np.zeros(1)
    span = raw.max(axis=(2, 3), keepdims=True) - low
    worst = error.max(axis=(2, 3), keepdims=True)
    relative = np.divide(4 * worst, span - 2 * worst, out=np.ones_like(span), where=span > 4 * worst)
    surely_zero = (sums + error <= 0).all(axis=(2, 3), keepdims=True)
    # Between the two, rounding decides whether the divisor is 0: any value in 0..1 is right.
    return np.broadcast_to(np.where(surely_zero, 0.0, np.minimum(relative, 1) + 2 * EPS), raw.shape)


def assert_close(actual: NDArray[Any], expected: NDArray[Any], tolerance: NDArray[np.float64]) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    if actual.size == 0:
        return
    excess = np.abs(actual.astype(np.float64) - expected) - tolerance
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"at {worst}: {actual[worst]} instead of {expected[worst]}"


def assert_overlays(overlays: NDArray[np.uint8], heatmaps: NDArray[np.float32], overlay: dict[str, Any]) -> None:
    """Check the blend of each pixel with the colour of its value, or with an adjacent one where rounding decides."""
    values = heatmaps.astype(np.float64)
    slack = 2 * EPS
    blends = [
        reference.blended(values + shift, overlay["images"], overlay["palette"], overlay["alpha"])
        for shift in (-slack, slack)
    ]
    right = np.zeros(overlays.shape[:-1], bool)
    for blend in blends:
        right |= (overlays == blend).all(axis=-1)
    assert right.all(), f"{np.count_nonzero(~right)} pixels of {right.size} have a wrong colour"
