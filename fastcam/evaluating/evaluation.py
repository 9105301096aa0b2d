"""`evaluate`: which method's heatmaps to trust, for this model and these pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..arguments import check_callable, check_count, check_mapping, check_names, check_path, checked, optional, shown
from ..arrays import Array, Doubles, Floats
from ..errors import ArgumentError, ImageError, suggest
from ..explaining.explainer import Explainer
from ..explaining.explanation import import_pandas
from ..explaining.images import Images, as_list, on_host
from ..explaining.methods import FORMULAS, METHODS
from ..explaining.targets import Target
from ..files import write_json
from .baselines import BASELINES
from .case import Case, Draw
from .metrics import GRID, METRICS, SETTINGS, Metric

if TYPE_CHECKING:
    import pandas as pd

_TILES = 4
_DEFAULT_METRICS = ("deletion", "insertion", "average_drop", "adcc", "road", "mu_fidelity", "sparseness")
_RESAMPLES = 1000
_CONFIDENCE = 0.95


class Summary(NamedTuple):
    """One metric of one method over all pictures.

    Attributes
    ----------
    method, metric : str
    better : {"higher", "lower"}
    mean : float
    low, high : float
        Bounds of the 95 % confidence interval of the mean, from 1000 bootstrap samples of the pictures.
    values : int
        How many values the mean is of: one for each picture; for "grid" four for each grid.
    better_than : tuple of str
        The baselines that the method beats: the confidence interval of the mean difference, picture by picture,
        leaves out 0.
    """

    method: str
    metric: str
    better: str
    mean: float
    low: float
    high: float
    values: int
    better_than: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of methods over pictures.

    Attributes
    ----------
    values : dict
        ``values[method][metric]`` holds a number for each picture, (N,); for "grid" four for each grid.
    milliseconds : dict
        The median time of one explanation by each method.
    targets : list of int
        The explained class of each picture.
    settings : dict
        All settings of methods and metrics.
    """

    values: dict[str, dict[str, Doubles]]
    milliseconds: dict[str, float]
    targets: list[int]
    settings: dict[str, Any]

    def summary(self) -> list[Summary]:
        """Return a row for each metric and method, the best method of each metric first."""
        rows = []
        for metric in next(iter(self.values.values())):
            found = [self._summarised(method, metric) for method in self.values]
            rows += sorted(found, key=lambda row: row.mean, reverse=found[0].better == "higher")
        return rows

    def _summarised(self, method: str, metric: str) -> Summary:
        better = METRICS[metric].better if metric in METRICS else "higher"
        numbers, seed = self.values[method][metric], self.settings["seed"]
        others = [name for name in BASELINES if name != method]
        beaten = tuple(name for name in others if paired_gain(self, method, metric, name) > 0)
        return Summary(method, metric, better, *_interval(numbers, seed), len(numbers), beaten)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings, for JSON."""
        return {
            "settings": self.settings,
            "targets": self.targets,
            "milliseconds": self.milliseconds,
            "summary": [row._asdict() for row in self.summary()],
            "values": {
                method: {metric: numbers.tolist() for metric, numbers in found.items()}
                for method, found in self.values.items()
            },
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Return `summary` as a pandas table.

        Raises
        ------
        MissingExtraError
            pandas is not installed.
        """
        table: pd.DataFrame = import_pandas().DataFrame(self.summary())
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises
        ------
        WriteError
            The file cannot be written.
        """
        write_json(check_path("path", path), self.to_dict())

    def __str__(self) -> str:
        """Return the summary as a table, one method per row and one metric per column."""
        return _table(self)


def paired_gain(evaluation: Evaluation, method: str, metric: str, other: str) -> float:
    """Return by how much a method is at least better than another one: the lower end of the interval of the mean.

    Of the differences picture by picture: pictures differ more than methods do.
    """
    sign = -1 if metric in METRICS and METRICS[metric].better == "lower" else 1
    gains = sign * (evaluation.values[method][metric] - evaluation.values[other][metric])
    return _interval(gains, evaluation.settings["seed"])[1]


class _Question(NamedTuple):
    """What is measured, checked."""

    explainer: Explainer
    drawn: Mapping[str, Callable[[Floats, int, int], Draw]]
    metrics: Mapping[str, Metric]
    settings: Mapping[str, Any]
    batch: int


@checked(
    methods=optional(check_names),
    metrics=optional(check_names),
    settings=optional(check_mapping),
    method_settings=optional(check_mapping),
    batch_size=check_count,
    progress=optional(check_callable),
)
def evaluate(
    explainer: Explainer | str | os.PathLike[str],
    images: Images,
    *,
    target: Target = None,
    methods: str | Sequence[str] | None = None,
    metrics: str | Sequence[str] | None = None,
    masks: Sequence[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    method_settings: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure how well methods explain a model, beside baselines that know nothing of it.

    Rankings of methods depend on the metric, on its settings and on the pictures: compare intervals, not only means,
    and trust no method that is not better than the baselines "random", "centre" and "edges", which are always measured.

    Parameters
    ----------
    explainer : Explainer or path
        Of a classifier that takes pictures.
    images
        A list of pictures in any form that `Explainer` takes.
    target
        The class to explain: None, the top class of each picture; one class; or a list with one for each picture.
    methods : str or list of str, optional
        By default all methods that the file offers and that are formulas of activations and gradients.
    metrics : str or list of str, optional
        Rows of `METRICS`, or "grid": the grid pointing game (Boehle et al. 2021), in which four pictures of different
        classes share an image, and the heatmap's share in its own quarter counts; chance is 0.25. By default
        "deletion", "insertion", "average_drop", "adcc", "road", "mu_fidelity", "sparseness", and with ``masks`` also
        "pointing", "energy" and "iou".
    masks : list, optional
        Where the object is in each picture: bool arrays (h,w) of any size, or paths of pictures that are bright there.
    settings : mapping, optional
        Of the metrics: see `SETTINGS` and docs/evaluation.md.
    method_settings : mapping, optional
        Settings of methods, by the method's name.
    batch_size : int
        Largest number of changed images given to the model at once.
    progress : callable, optional
        Called after each picture with the number of finished ones and of all.

    Returns
    -------
    Evaluation

    Raises
    ------
    ArgumentError
        A method, metric or setting does not exist, or masks do not fit the pictures.
    FastcamError
        As `Explainer` does.
    MissingExtraError
        A metric needs SciPy.
    """
    opened = explainer if isinstance(explainer, Explainer) else Explainer(check_path("explainer", explainer))
    if opened.score != "classes":
        raise ArgumentError(f"{opened.path} explains {opened.score}: metrics are for the classes of a classifier")
    if opened.fit != "stretch":
        raise ArgumentError(f'{opened.path} fits pictures by letterbox: export it again with fit="stretch"')
    items = as_list(on_host(images))
    tensors = opened.prepare(items)
    if not len(tensors):
        raise ImageError("there are no images to evaluate")
    names = _names(methods, [name for name in FORMULAS if name in opened.methods], opened.methods, "methods")
    chosen = _names(metrics, _default_metrics(masks), (*METRICS, GRID), "metrics")
    objects = _masks(masks, len(items), opened.input_size, chosen)
    all_settings = {name: row.check(name, (settings or {}).get(name, row.default)) for name, row in SETTINGS.items()}
    for name in settings or {}:
        if name not in SETTINGS:
            raise ArgumentError(f"settings: {shown(name)}: {suggest(str(name), SETTINGS)}choose from {list(SETTINGS)}")
    given = _method_settings(method_settings, names)
    drawn = {name: _by_method(opened, name, given[name]) for name in names}
    drawn |= {name: _by_baseline(opened, name, int(all_settings["seed"])) for name in BASELINES}
    rows = {name: METRICS[name] for name in chosen if name != GRID}
    question = _Question(opened, drawn, rows, all_settings, batch_size)
    values: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in chosen} for name in drawn}
    seconds: dict[str, list[float]] = {name: [] for name in drawn}
    targets = _targets(target, len(items))
    explained: list[int] = []
    for number, tensor in enumerate(tensors):
        mask = None if objects is None else objects[number]
        explained.append(_measure(question, tensor, targets[number], mask, number, values, seconds))
        if progress is not None:
            progress(number + 1, len(items))
    if GRID in chosen:
        for name, found in _grid_game(question, np.asarray(tensors), explained).items():
            values[name][GRID] = found
    return Evaluation(
        {name: {metric: np.array(numbers) for metric, numbers in found.items()} for name, found in values.items()},
        {name: float(np.median(found)) * 1e3 for name, found in seconds.items()},
        explained,
        {**all_settings, "methods": given},
    )


def _measure(
    question: _Question,
    tensor: Floats,
    target: Any,
    mask: Array | None,
    number: int,
    values: dict[str, dict[str, list[float]]],
    seconds: dict[str, list[float]],
) -> int:
    """Add the metrics of all methods for one picture; return the explained class."""
    evidence, explained = question.explainer.evidence(tensor[None], target, batch_size=question.batch)
    for name, draw_of in question.drawn.items():
        draw = draw_of(tensor, explained, number)
        begin = time.perf_counter()
        heatmap = draw(tensor, None)
        seconds[name].append(time.perf_counter() - begin)
        count = question.explainer.class_count
        case = Case(evidence, explained, count, heatmap, draw, mask, question.settings, number)
        for metric, row in question.metrics.items():
            values[name][metric].append(case.once(metric, row.compute))
    return explained


def _by_method(
    explainer: Explainer, method: str, settings: Mapping[str, Any] | None
) -> Callable[[Floats, int, int], Draw]:
    def of_image(tensor: Floats, target: int, number: int) -> Draw:
        def draw(image: Floats, other: int | None) -> Doubles:
            wanted = target if other is None else other
            found = explainer(image[None], wanted, method=method, settings=settings)
            return np.asarray(found.heatmaps[0, 0], np.float64)

        return draw

    return of_image


def _by_baseline(explainer: Explainer, name: str, seed: int) -> Callable[[Floats, int, int], Draw]:
    def of_image(tensor: Floats, target: int, number: int) -> Draw:
        def draw(image: Floats, other: int | None) -> Doubles:
            whole = image if explainer.input_layout == "NHWC" else image.transpose(1, 2, 0)
            found = BASELINES[name](whole, np.random.default_rng([seed, number]))
            top = found.max()
            return np.asarray(found / top if top > 0 else found)

        return draw

    return of_image


def _grid_game(question: _Question, tensors: Floats, explained: Sequence[int]) -> dict[str, list[float]]:
    """Return for each method the heatmaps' shares in their own quarters, of grids of four pictures each."""
    grids = _grids(explained)
    if not grids:
        raise ArgumentError(
            f'metrics: "{GRID}" needs pictures of {_TILES} different classes, and these are explained as '
            f"{len(set(explained))}"
        )
    found: dict[str, list[float]] = {name: [] for name in question.drawn}
    axes = [question.explainer.input_layout.index(axis) - 1 for axis in "HW"]
    for members in grids:
        halves = [_halved(tensors[index], axes) for index in members]
        rows = [np.concatenate(halves[start : start + 2], axis=axes[1]) for start in (0, 2)]
        image = np.concatenate(rows, axis=axes[0])
        height, width = (image.shape[axis] for axis in axes)
        for name, draw_of in question.drawn.items():
            for place, index in enumerate(members):
                heatmap = draw_of(image, explained[index], index)(image, None)
                top, left = place // 2 * (height // 2), place % 2 * (width // 2)
                bottom, right = (height, width) if place == _TILES - 1 else (top + height // 2, left + width // 2)
                total = heatmap.sum()
                found[name].append(float(heatmap[top:bottom, left:right].sum() / total) if total > 0 else 0.0)
    return found


def _grids(explained: Sequence[int]) -> list[list[int]]:
    """Return groups of four pictures of different classes, in their order; each picture is used once."""
    grids: list[list[int]] = []
    left = list(range(len(explained)))
    while True:
        group: list[int] = []
        for index in left:
            if len(group) < _TILES and explained[index] not in {explained[member] for member in group}:
                group.append(index)
        if len(group) < _TILES:
            return grids
        grids.append(group)
        left = [index for index in left if index not in group]


def _halved(tensor: Floats, axes: Sequence[int]) -> Floats:
    """Return an image at half of its height and width: the mean of each 2x2 pixels, whose last odd ones are dropped."""
    for axis in axes:
        length = tensor.shape[axis] // 2 * 2
        pairs = np.take(tensor, range(length), axis=axis)
        shape = (*pairs.shape[:axis], length // 2, 2, *pairs.shape[axis + 1 :])
        tensor = pairs.reshape(shape).mean(axis=axis + 1)
    return tensor


def _names(asked: str | Sequence[str] | None, default: Sequence[str], known: Sequence[str], argument: str) -> list[str]:
    names = list(default) if asked is None else [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in known:
            raise ArgumentError(f"{argument}: {shown(name)}: {suggest(name, known)}choose from {', '.join(known)}")
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"{argument}={shown(asked)}: give at least one name, and each only once")
    return names


def _method_settings(settings: Mapping[str, Any] | None, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of each method, defaults included."""
    for name, given in (settings or {}).items():
        if name not in methods:
            raise ArgumentError(
                f"method_settings: {shown(name)}: {suggest(name, methods)}measured: {', '.join(methods)}"
            )
        check_mapping(f"method_settings[{name!r}]", given)
    return {name: dict(METHODS[name].chosen((settings or {}).get(name))) for name in methods}


def _default_metrics(masks: Sequence[Any] | None) -> list[str]:
    located = [name for name, row in METRICS.items() if row.needs_mask]
    return [*_DEFAULT_METRICS, *(located if masks is not None else [])]


def _targets(target: Target, count: int) -> list[Any]:
    if isinstance(target, list | tuple) or (isinstance(target, np.ndarray) and target.ndim):
        if len(target) != count:
            raise ArgumentError(f"target holds {len(target)} classes for {count} images: give one for each, or one")
        return [int(item) if isinstance(item, np.integer) else item for item in target]
    return [target] * count


def _masks(
    masks: Sequence[Any] | None, count: int, size: tuple[int, int], metrics: Sequence[str]
) -> list[Array] | None:
    """Return the masks at the size of the model's input."""
    if masks is None:
        needy = [name for name in metrics if name in METRICS and METRICS[name].needs_mask]
        if needy:
            raise ArgumentError(f"metrics: {', '.join(needy)} compare with the place of the object: give masks=")
        return None
    items = _listed(masks)
    if len(items) != count:
        raise ArgumentError(f"masks={shown(masks)}: there are {len(items)} for {count} images: give a list, one each")
    found = [_mask(item, size, number) for number, item in enumerate(items)]
    for number, one in enumerate(found):
        if not one.any():
            raise ArgumentError(f"masks: that of image {number} is empty at the model's size, {size[0]} x {size[1]}")
    return found


def _array(item: Any) -> Array:
    try:
        return np.asarray(item)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything
        raise ArgumentError(f"masks: {shown(item)} is not an array") from None


def _listed(masks: Any) -> list[Any]:
    is_array = isinstance(masks, np.ndarray) and masks.ndim > 0
    return list(masks) if is_array or isinstance(masks, list | tuple) else []


def _mask(item: Any, size: tuple[int, int], number: int) -> Array:
    if isinstance(item, str | os.PathLike):
        try:
            with Image.open(Path(item)) as picture:
                array = np.asarray(picture.convert("L")) > 127
        except (OSError, ValueError) as error:
            raise ImageError(f"masks: {item}: it cannot be read as a picture: {error}") from error
    else:
        array = _array(item)
    if array.ndim != 2 or array.dtype.kind not in "bui" or not array.size:
        raise ArgumentError(f"masks: that of image {number} is {array.dtype} {array.shape}: give bool (h,w), or a path")
    rows, columns = (
        (2 * np.arange(after) + 1) * before // (2 * after) for after, before in zip(size, array.shape, strict=True)
    )
    return np.asarray(array.astype(bool)[rows[:, None], columns])


def _interval(values: Doubles, seed: int) -> tuple[float, float, float]:
    """Return the mean, and the bounds of its confidence interval by the percentile bootstrap."""
    picks = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(values.mean()), float(low), float(high)


def _table(evaluation: Evaluation) -> str:
    metrics = list(next(iter(evaluation.values.values())))
    means = {(row.method, row.metric): row for row in evaluation.summary()}
    width = max(map(len, evaluation.values))
    lines = ["  ".join([" " * width, *(f"{name:>20}" for name in metrics), f"{'ms':>8}"])]
    for method in evaluation.values:
        cells = (means[method, metric] for metric in metrics)
        texts = [f"{row.mean:.3f} {row.low:.3f}..{row.high:.3f}" for row in cells]
        lines.append(
            "  ".join(
                [f"{method:{width}}", *(f"{text:>20}" for text in texts), f"{evaluation.milliseconds[method]:8.1f}"]
            )
        )
    return "\n".join(lines)
