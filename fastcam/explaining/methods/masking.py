"""Methods that run the network on masked images.

x is the image as the model takes it, y(x) its score; a mask m (H,W) of 0..1 hides parts of it: x * m. What is hidden
becomes 0, which is the mean colour for most preprocessings.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...arrays import Doubles, Floats, Indices
from .table import Evidence, Method, Rows, Setting, Settings

_SEED = Setting(0, 0, 2**32 - 1, "the seed of the random numbers")


def _score_cam(evidence: Evidence, settings: Settings) -> Doubles:
    """Weigh each channel by the softmax over channels of the score of the image seen through it (algorithm 1)."""
    masks, different = _channel_masks(evidence)
    scores = evidence.score_masked(lambda rows: masks[rows], len(masks))
    return _weighted(evidence, scores[different])


def _smoothed_score_cam(evidence: Evidence, settings: Settings) -> Doubles:
    """Average Score-CAM's scores over masks with Gaussian noise before the softmax (eq. 4)."""
    masks, different = _channel_masks(evidence)
    random = np.random.default_rng(settings["seed"])
    total = np.zeros((len(masks), len(evidence.scores)))
    for _ in range(settings["samples"]):

        def noisy(rows: slice) -> Floats:
            whole = evidence.resize(masks[rows], evidence.size)
            noise = random.normal(0, settings["noise"], whole.shape)
            return np.asarray(whole + noise, np.float32)

        total += evidence.score_masked(noisy, len(masks))
    return _weighted(evidence, (total / settings["samples"])[different])


def _integrated_score_cam(evidence: Evidence, settings: Settings) -> Doubles:
    """Average Score-CAM's scores over masks of growing strength, i/n for i = 1..n, before the softmax (eq. 4)."""
    masks, different = _channel_masks(evidence)
    count = settings["samples"]
    total = np.zeros((len(masks), len(evidence.scores)))
    for step in range(1, count + 1):
        share = np.float32(step / count)
        total += evidence.score_masked(_faded(masks, share), len(masks))
    return _weighted(evidence, (total / count)[different])


def _faded(masks: Floats, share: np.float32) -> Rows:
    return lambda rows: masks[rows] * share


def _channel_masks(evidence: Evidence) -> tuple[Floats, Indices]:
    """Return the different masks (M,h,w) of the channels, scaled to 0..1, and the mask of each channel (C,).

    A channel that is the same everywhere gives an empty mask: all of those are scored once.
    """
    maps = evidence.activations
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    span = high - low
    masks = np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0)
    varied = span[:, 0, 0] > 0
    number = np.cumsum(varied) - 1
    if varied.all():
        return masks, number
    return np.concatenate([masks[varied], np.zeros_like(masks[:1])]), np.where(varied, number, varied.sum())


def _weighted(evidence: Evidence, scores: Doubles) -> Doubles:
    """Return the activations' sum with weights that are the softmax of scores (C,K) over channels."""
    powers = np.exp(scores - scores.max(axis=0, keepdims=True))
    weights = powers / powers.sum(axis=0, keepdims=True)
    return np.asarray(np.einsum("ck,chw->khw", weights, evidence.activations))


def _rise(evidence: Evidence, settings: Settings) -> Doubles:
    """Average random masks, weighted by the probability of the image seen through them (eq. 6).

    From each weight the mean of all of them is subtracted. In expectation this lowers the map by one number everywhere,
    and leaves it positive where seeing a pixel raises the probability, or the score of a file without probabilities.
    """
    random = np.random.default_rng(settings["seed"])
    count, grid = settings["masks"], settings["grid"]
    coarse = (random.random((count, 1, grid + 1, grid + 1)) < settings["keep"]).astype(np.float32)
    shifts = random.random((count, 2))

    def masks(rows: slice) -> Floats:
        return np.stack(
            [_shifted(evidence, mask, shift, grid) for mask, shift in zip(coarse[rows], shifts[rows], strict=True)]
        )

    weights = evidence.score_masked(masks, count, probabilities=True)
    weights = weights - weights.mean(axis=0)
    total = np.zeros((weights.shape[1], *evidence.size))
    for rows in _chunks(count):
        total += np.einsum("mk,mhw->khw", weights[rows], masks(rows))
    return np.asarray(total / (count * settings["keep"]))


def _shifted(evidence: Evidence, coarse: Floats, shift: Doubles, grid: int) -> Floats:
    """Return a mask (H,W) from a coarse one (1,g+1,g+1), enlarged bilinearly and cut at a random place of a cell."""
    size = evidence.size
    cells = [-(-side // grid) for side in size]
    whole = evidence.resize(coarse, (cells[0] * (grid + 1), cells[1] * (grid + 1)))[0]
    top, left = (int(part * cell) for part, cell in zip(shift, cells, strict=True))
    return np.asarray(whole[top : top + size[0], left : left + size[1]])


def _occlusion(evidence: Evidence, settings: Settings) -> Doubles:
    """Return for each pixel the mean loss of score over the windows that hide it (section 4.2)."""
    places = list(_windows(evidence.size, settings["window"], settings["stride"]))

    def masks(rows: slice) -> Floats:
        hidden = np.ones((len(places[rows]), *evidence.size), np.float32)
        for mask, place in zip(hidden, places[rows], strict=True):
            mask[place] = 0
        return hidden

    lost = evidence.scores - evidence.score_masked(masks, len(places))
    total, covered = np.zeros((lost.shape[1], *evidence.size)), np.zeros(evidence.size)
    for place, loss in zip(places, lost, strict=True):
        total[(slice(None), *place)] += loss[:, None, None]
        covered[place] += 1
    return np.asarray(total / np.maximum(covered, 1))


def _windows(size: tuple[int, int], window: float, stride: float) -> Iterator[tuple[slice, slice]]:
    """Yield windows of a share of the image's sides, a share of a window apart; the last ones end with the image."""
    sides = [max(1, round(window * side)) for side in size]
    steps = [max(1, round(stride * side)) for side in sides]
    starts = [
        range(0, max(0, length - side) + step, step) for length, side, step in zip(size, sides, steps, strict=True)
    ]
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + sides[0]), slice(left, left + sides[1])


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, 64):
        yield slice(start, min(start + 64, count))


METHODS = {
    "scorecam": Method("Wang et al. 2020, Score-CAM, algorithm 1", reads=("activations",), reruns=_score_cam),
    "sscam": Method(
        "Wang et al. 2020, SS-CAM, eq. 4",
        reads=("activations",),
        reruns=_smoothed_score_cam,
        settings={
            "samples": Setting(10, 1, 1000, "noisy copies of each mask"),
            "noise": Setting(2.0, 0.0, 100.0, "standard deviation of the noise on masks of 0..1"),
            "seed": _SEED,
        },
    ),
    "iscam": Method(
        "Naidu et al. 2020, IS-CAM, eq. 4",
        reads=("activations",),
        reruns=_integrated_score_cam,
        settings={"samples": Setting(10, 1, 1000, "strengths of each mask")},
    ),
    "rise": Method(
        "Petsiuk et al. 2018, RISE, eq. 6, minus its mean",
        reads=("scores",),
        reruns=_rise,
        settings={
            "masks": Setting(1000, 1, 1_000_000, "random masks"),
            "grid": Setting(7, 1, 64, "cells of a mask along each side"),
            "keep": Setting(0.5, 0.01, 0.99, "share of the cells that are shown"),
            "seed": _SEED,
        },
    ),
    "occlusion": Method(
        "Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, section 4.2",
        reads=("scores",),
        reruns=_occlusion,
        settings={
            "window": Setting(0.15, 0.001, 1.0, "sides of the window, as a share of the image's"),
            "stride": Setting(0.5, 0.01, 1.0, "distance of windows, as a share of a window's side"),
        },
    ),
}
