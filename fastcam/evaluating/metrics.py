"""Scores of one heatmap, one row each.

y is the probability of the explained class (the score, where the file has no probabilities). What is removed from an
image becomes 0, the mean colour for most preprocessings. Heatmaps are 0..1; no metric takes their absolute value or
stretches them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..arrays import Array, Doubles, Floats
from ..errors import MissingExtraError
from ..explaining.methods import Setting
from .case import Case


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Attributes
    ----------
    source : str
        Paper, and equation.
    better : {"higher", "lower"}
    compute : callable
    needs_mask : bool
        Whether it compares with the place of the object.
    """

    source: str
    better: Literal["higher", "lower"]
    compute: Callable[[Case], float]
    needs_mask: bool = False


def _ranked(case: Case) -> Array:
    """Return the pixels from the most to the least important; equal ones in the order of the image."""
    return np.argsort(-case.heatmap.ravel(), kind="stable")


def _curve(case: Case, *, inserts: bool) -> Doubles:
    """Return y while ever more of the most important pixels are removed, or added to an image of zeros."""
    pixels, order = case.pixels(), _ranked(case)
    counts = np.linspace(0, len(order), case.settings["steps"] + 1, dtype=np.int64)
    empty = np.zeros_like(pixels)

    def images(rows: slice) -> Floats:
        changed = []
        for count in counts[rows]:
            start, end = (empty, pixels) if inserts else (pixels, empty)
            one = start.copy()
            one[order[:count]] = end[order[:count]]
            changed.append(one)
        return case.images(np.stack(changed))

    return case.score(images, len(counts))


def _area(curve: Doubles) -> float:
    """Return the area under a curve of equal steps, by trapezoids."""
    return float((curve[:-1] + curve[1:]).mean() / 2)


def _deletion(case: Case) -> float:
    """Return the area under y while pixels are removed, the most important first."""
    return _area(_curve(case, inserts=False))


def _insertion(case: Case) -> float:
    """Return the area under y while pixels are added, the most important first."""
    return _area(_curve(case, inserts=True))


def _masked_score(case: Case) -> float:
    return case.once("masked score", lambda it: float(it.score(lambda rows: it.masked()[None], 1)[0]))


def _average_drop(case: Case) -> float:
    """Return the share of y that is lost if the image is multiplied by its heatmap: max(0, y - y') / y."""
    own = case.own_score()
    return max(0.0, own - _masked_score(case)) / own if own > 0 else 0.0


def _increase(case: Case) -> float:
    """Return 1 if y rises when the image is multiplied by its heatmap, else 0."""
    return float(_masked_score(case) > case.own_score())


def _complexity(case: Case) -> float:
    """Return the mean of the heatmap: its L1 norm, divided by the number of pixels."""
    return float(case.heatmap.mean())


def _coherency(case: Case) -> float:
    """Return the correlation of the heatmap with that of the image times the heatmap, moved to 0..1."""
    again = case.draw(case.masked(), None)
    return (_correlation(case.heatmap.ravel(), again.ravel()) + 1) / 2


def _adcc(case: Case) -> float:
    """Return the harmonic mean of coherency, 1 - complexity and 1 - average drop."""
    return _harmonic(_value(case, "coherency"), 1 - _complexity(case), 1 - _average_drop(case))


def _arcc(case: Case) -> float:
    """Return the harmonic mean of coherency, 1 - complexity and twice ROAD, cut to 0..1."""
    road = min(max(2 * _value(case, "road"), 0.0), 1.0)
    return _harmonic(_value(case, "coherency"), 1 - _complexity(case), road)


def _road(case: Case) -> float:
    """Return half of what y loses more when the most important pixels are imputed than when the least important are.

    Removed pixels become weighted means of their neighbours, which gives away less than a constant does, plus noise.
    The mean over several shares of the pixels.
    """
    levels = case.settings["road_levels"]
    shares = 100 * np.arange(1, levels + 1) / (levels + 1)
    random = case.random()
    masks = [values < np.percentile(values, share) for values in (1 - case.heatmap, case.heatmap) for share in shares]
    imputed = [_imputed(case, kept, random) for kept in masks]
    scores = case.score(lambda rows: np.concatenate(imputed[rows]), len(imputed))
    return float((scores[:levels] - scores[levels:]).mean() / 2)


# Weights of the neighbours in the mean that replaces a pixel: those across a corner count half.
_NEIGHBOURS = [
    (down, across, 1 / 12 if down and across else 1 / 6)
    for down in (-1, 0, 1)
    for across in (-1, 0, 1)
    if down or across
]


def _imputed(case: Case, kept: Array, random: np.random.Generator) -> Floats:
    """Return the image (1, ...) with the pixels that are not kept solved from a linear system of their neighbours."""
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.linalg import spsolve
    except ImportError as error:
        raise MissingExtraError(f"the metric road needs SciPy ({error}): pip install fastcam[evaluate]") from error
    pixels = case.pixels().astype(np.float64)
    rows, columns = np.nonzero(~kept)
    if not len(rows):
        return case.images(pixels[None].astype(np.float32))
    height, width = kept.shape
    numbers = np.full(kept.shape, -1)
    numbers[rows, columns] = np.arange(len(rows))
    known, total = np.zeros((len(rows), pixels.shape[1])), np.zeros(len(rows))
    entries: list[tuple[Array, Array, Array]] = []
    for down, across, weight in _NEIGHBOURS:
        y, x = rows + down, columns + across
        inside = np.nonzero((y >= 0) & (y < height) & (x >= 0) & (x < width))[0]
        y, x = y[inside], x[inside]
        total[inside] += weight
        is_known = kept[y, x]
        known[inside[is_known]] += weight * pixels[y[is_known] * width + x[is_known]]
        unknown = inside[~is_known]
        entries.append((unknown, numbers[y[~is_known], x[~is_known]], np.full(len(unknown), -weight)))
    entries.append((np.arange(len(rows)), np.arange(len(rows)), total))
    i, j, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    solved = spsolve(coo_array((values, (i, j)), shape=(len(rows), len(rows))).tocsc(), known)
    noise = random.normal(0, case.settings["road_noise"], known.shape) if case.settings["road_noise"] else 0
    pixels[rows * width + columns] = solved.reshape(known.shape) + noise
    return case.images(pixels[None].astype(np.float32))


def _mu_fidelity(case: Case) -> float:
    """Return the rank correlation of y's loss with the heatmap's sum over random parts that are removed (def. 3)."""
    grid, count = case.settings["fidelity_grid"], case.settings["fidelity_samples"]
    height, width = case.evidence.size
    random = case.random()
    cells = random.random((count, grid, grid)) > case.settings["fidelity_share"]
    rows, columns = ((2 * np.arange(side) + 1) * grid // (2 * side) for side in (height, width))
    masks = cells[:, rows[:, None], columns]
    kept = case.evidence.score_masked(lambda part: masks[part].astype(np.float32), count, probabilities=True)
    sums = [float(case.heatmap[~mask].sum()) for mask in masks]
    return rank_correlation(case.own_score() - kept[:, 0], np.array(sums))


def _sparseness(case: Case) -> float:
    """Return the Gini index of the heatmap: 0 if all pixels are equal, near 1 if few have everything."""
    values = np.sort(case.heatmap.ravel())
    total = values.sum()
    if total <= 0:
        return 0.0
    ranks = np.arange(1, len(values) + 1)
    return float(1 - 2 * ((values / total) * (len(values) - ranks + 0.5)).sum() / len(values))


def _max_sensitivity(case: Case) -> float:
    """Return the largest relative change of the heatmap over slightly changed images (def. 2)."""
    image, random = case.evidence.image, case.random()
    radius = case.settings["sensitivity_radius"] * float(image.max() - image.min())
    size = np.linalg.norm(case.heatmap)
    changes = []
    for _ in range(case.settings["sensitivity_samples"]):
        changed = (image + random.uniform(-radius, radius, image.shape)).astype(np.float32)
        changes.append(np.linalg.norm(case.draw(changed, None) - case.heatmap))
    return float(max(changes) / size) if size > 0 else 0.0


def _random_logit(case: Case) -> float:
    """Return the rank correlation with the heatmap of another class, drawn at random: explanations should differ."""
    others = [index for index in range(case.class_count) if index != case.target]
    if not others:
        return 1.0
    other = int(case.random().choice(others))
    return rank_correlation(case.heatmap.ravel(), case.draw(case.evidence.image, other).ravel())


def _object(case: Case) -> Array:
    return case.mask if case.mask is not None else np.ones(case.evidence.size, bool)


def _pointing(case: Case) -> float:
    """Return 1 if the heatmap's maximum lies on the object, else 0."""
    return float(_object(case).ravel()[int(case.heatmap.argmax())])


def _energy(case: Case) -> float:
    """Return the share of the heatmap's sum that lies on the object."""
    total = float(case.heatmap.sum())
    return float(case.heatmap[_object(case)].sum()) / total if total > 0 else 0.0


def _iou(case: Case) -> float:
    """Return the overlap of the object with as many of the most important pixels, over their union."""
    inside = _object(case).ravel()
    chosen = np.zeros(inside.shape, bool)
    chosen[_ranked(case)[: int(inside.sum())]] = True
    return float((chosen & inside).sum() / max(1, (chosen | inside).sum()))


def _value(case: Case, name: str) -> float:
    return case.once(name, METRICS[name].compute)


def _harmonic(*values: float) -> float:
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def _correlation(first: Doubles, second: Doubles) -> float:
    """Return Pearson's correlation; 0 if one of them is the same everywhere."""
    first, second = first - first.mean(), second - second.mean()
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / size) if size > 0 else 0.0


def rank_correlation(first: Doubles, second: Doubles) -> float:
    """Return Spearman's correlation; equal numbers share the mean of their ranks."""
    return _correlation(_ranks(first), _ranks(second))


def _ranks(values: Doubles) -> Doubles:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS: dict[str, Metric] = {
    "deletion": Metric("Petsiuk et al. 2018, RISE, section 3.3", "lower", _deletion),
    "insertion": Metric("Petsiuk et al. 2018, RISE, section 3.3", "higher", _insertion),
    "average_drop": Metric("Chattopadhay et al. 2018, Grad-CAM++, section 5.1", "lower", _average_drop),
    "increase": Metric("Chattopadhay et al. 2018, Grad-CAM++, section 5.1", "higher", _increase),
    "coherency": Metric("Poppi et al. 2021 (arXiv 2104.10252), eq. 5", "higher", _coherency),
    "complexity": Metric("Poppi et al. 2021 (arXiv 2104.10252), eq. 6", "lower", _complexity),
    "adcc": Metric("Poppi et al. 2021 (arXiv 2104.10252), eq. 7", "higher", _adcc),
    "road": Metric("Rong et al. 2022 (arXiv 2202.00449), noisy linear imputation", "higher", _road),
    "arcc": Metric("RefineCAM 2026 (arXiv 2605.14641), ARCC", "higher", _arcc),
    "mu_fidelity": Metric("Bhatt et al. 2020 (arXiv 2005.00631), def. 3, by ranks", "higher", _mu_fidelity),
    "sparseness": Metric("Chalasani et al. 2020 (arXiv 1810.06583): the Gini index", "higher", _sparseness),
    "max_sensitivity": Metric("Yeh et al. 2019 (arXiv 1901.09392), def. 2", "lower", _max_sensitivity),
    "random_logit": Metric("Sixt et al. 2020 (arXiv 1912.09818): another class, by ranks", "lower", _random_logit),
    "pointing": Metric("Zhang et al. 2018, Excitation Backprop, section 5.1", "higher", _pointing, needs_mask=True),
    "energy": Metric(
        "Wang et al. 2020, Score-CAM, section 4.4: energy in the mask", "higher", _energy, needs_mask=True
    ),
    "iou": Metric("overlap of as many pixels as the mask has", "higher", _iou, needs_mask=True),
}

# The grid pointing game, of four pictures at once: see `evaluation`.
GRID = "grid"

SETTINGS: dict[str, Setting] = {
    "steps": Setting(20, 1, 100_000, "steps of deletion and insertion"),
    "road_levels": Setting(4, 1, 99, "shares of the pixels that road removes"),
    "road_noise": Setting(0.01, 0.0, 100.0, "standard deviation of the noise on imputed pixels"),
    "fidelity_samples": Setting(100, 2, 1_000_000, "random parts of mu_fidelity"),
    "fidelity_grid": Setting(9, 1, 512, "cells of these parts along each side"),
    "fidelity_share": Setting(0.2, 0.001, 0.999, "share of the cells that are removed"),
    "sensitivity_samples": Setting(5, 1, 1_000_000, "changed images of max_sensitivity"),
    "sensitivity_radius": Setting(0.02, 0.0, 10.0, "largest change of a value, as a share of the image's range"),
    "seed": Setting(0, 0, 2**32 - 1, "the seed of the random numbers"),
}
