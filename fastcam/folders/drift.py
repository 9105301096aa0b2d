"""`compare_results`: where a model looks now, compared with where it looked before, class by class."""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import kernels
from ..arguments import check_number, check_path, checked, shown
from ..arrays import Doubles
from ..errors import ArgumentError
from ..files import open_regular, replacing, write_json
from ..pictures.writing import palette
from .journal import RESULTS, parse_line

_RESAMPLES = 500
_SEED = 0


class Look(NamedTuple):
    """Where the heatmaps of one class lie, in one folder of results.

    Attributes
    ----------
    pictures : int
        Pictures that are explained as this class.
    centre : (float, float)
        Row and column of the centre of mass of the mean map, 0..1.
    spread : float
        Root mean square distance from the centre, as a share of the map's sides.
    entropy : float
        Of the mean map, 0 for one pixel, 1 for evenly spread.
    outside : float or None
        Share of the mean map outside of the region that was given.
    mean : ndarray
        (h,w) float64: the mean map, which sums to 1.
    """

    pictures: int
    centre: tuple[float, float]
    spread: float
    entropy: float
    outside: float | None
    mean: Doubles


class ClassDrift(NamedTuple):
    """How one class has moved.

    Attributes
    ----------
    label : str
    before, after : Look or None
        None if no picture is explained as this class.
    distance : float
        Half of the sum of the differences of both mean maps: 0 for the same, 1 for maps without a common pixel.
    chance : float
        What 95 % of random splits of the same pictures into two groups of these sizes stay below: more is drift.
    """

    label: str
    before: Look | None
    after: Look | None
    distance: float
    chance: float

    @property
    def has_moved(self) -> bool:
        """Whether the distance is larger than chance explains."""
        return self.distance > self.chance


class Drift(NamedTuple):
    """The result of `compare_results`: all classes, those that moved most first."""

    classes: tuple[ClassDrift, ...]

    @property
    def moved(self) -> tuple[str, ...]:
        """Labels of the classes that moved more than chance explains."""
        return tuple(row.label for row in self.classes if row.has_moved)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings, for JSON."""
        return {"moved": list(self.moved), "classes": [_plain(row) for row in self.classes]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises
        ------
        WriteError
            The file cannot be written.
        """
        write_json(check_path("path", path), self.to_dict())


@checked(reference=check_path, new=check_path)
def compare_results(
    reference: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    region: tuple[float, float, float, float] | None = None,
) -> Drift:
    """Compare where the heatmaps of each class lie in two folders of results, of `explain_files` with its report.

    A model whose scores stay good may still have started to look elsewhere: at a watermark, at a border, at a new
    camera's frame.

    Parameters
    ----------
    reference, new : path
        Results before and now; of other pictures, or of another model.
    region : (top, left, bottom, right), optional
        Where the objects are expected, as shares of the picture, 0..1.

    Returns
    -------
    Drift

    Raises
    ------
    ArgumentError
        A folder has no results with maps, or the region is not one.
    """
    expected = None if region is None else _region(region)
    before, after = (_maps(Path(folder)) for folder in (reference, new))
    rows = [_compared(label, before.get(label), after.get(label), expected) for label in sorted({*before, *after})]
    return Drift(tuple(sorted(rows, key=lambda row: row.distance - row.chance, reverse=True)))


def _region(region: Any) -> tuple[float, float, float, float]:
    sides = region if isinstance(region, list | tuple) else ()
    if len(sides) == 4:
        top, left, bottom, right = (
            check_number("region", side, lambda share: 0 <= share <= 1, "shares of the picture, 0 to 1")
            for side in sides
        )
        if top < bottom and left < right:
            return top, left, bottom, right
    raise ArgumentError(f"region={shown(region)}: give (top, left, bottom, right), shares of the picture, 0 to 1")


def _maps(folder: Path) -> dict[str, list[Doubles]]:
    """Return the maps of the first class of each picture by its label, each divided by its sum; all of one size."""
    found: dict[str, list[Doubles]] = {}
    for label, single in _read(folder):
        total = single.sum()
        if total > 0:
            found.setdefault(label, []).append(single / total)
    if not found:
        raise ArgumentError(f"{folder} has no results with maps: give folders of explain_files, with its report")
    return found


def _read(folder: Path) -> Iterator[tuple[str, Doubles]]:
    try:
        with open_regular(folder / RESULTS) as file:
            found = [_first_map(line, f"{folder / RESULTS}, line {number}") for number, line in enumerate(file, 1)]
    except OSError as error:
        raise ArgumentError(f"{folder} has no results: {error}") from error
    yield from (one for one in found if one is not None)


def _first_map(line: bytes, place: str) -> tuple[str, Doubles] | None:
    """Return label and map of the first class of a line; None if it has no map."""
    try:
        entry = parse_line(line)
        row = next((row for row in entry.get("classes", []) if row.get("map")), None)
        if row is None:
            return None
        values = np.frombuffer(b64decode(row["map"]), np.uint8).reshape(entry["map_size"])
    except (ValueError, KeyError) as error:
        raise ArgumentError(f"{place} is damaged: {error}") from None
    return str(row["label"]), values.astype(np.float64)


def _compared(
    label: str,
    before: list[Doubles] | None,
    after: list[Doubles] | None,
    region: tuple[float, float, float, float] | None,
) -> ClassDrift:
    looks = [None if maps is None else _look(maps, region) for maps in (before, after)]
    if before is None or after is None:
        return ClassDrift(label, looks[0], looks[1], 0.0, 0.0)
    same = _at_one_size(before, after)
    first, second = same[: len(before)], same[len(before) :]
    return ClassDrift(label, looks[0], looks[1], _distance(first, second), _by_chance(same, len(before)))


def _look(maps: list[Doubles], region: tuple[float, float, float, float] | None) -> Look:
    mean = np.mean(_at_one_size(maps, []), axis=0)
    rows, columns = ((np.arange(side) + 0.5) / side for side in mean.shape)
    centre = float(mean.sum(axis=1) @ rows), float(mean.sum(axis=0) @ columns)
    squares = (rows[:, None] - centre[0]) ** 2 + (columns - centre[1]) ** 2
    shares = mean[mean > 0]
    entropy = float(-(shares * np.log(shares)).sum() / np.log(mean.size)) if mean.size > 1 else 0.0
    outside = None
    if region is not None:
        top, left, bottom, right = region
        inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
        outside = float(mean[~inside].sum())
    return Look(len(maps), centre, float(np.sqrt((mean * squares).sum())), entropy, outside, mean)


def _at_one_size(first: list[Doubles], second: list[Doubles]) -> Doubles:
    """Return all maps at the size of the first one, (N,h,w), each with the sum 1."""
    size = first[0].shape
    found = []
    for single in (*first, *second):
        resized = single
        if single.shape != size:
            resized = kernels.resize(single.astype(np.float32)[None, None], (size[0], size[1]))[0, 0].astype(np.float64)
        found.append(resized / resized.sum())
    return np.stack(found)


def _distance(first: Doubles, second: Doubles) -> float:
    return float(np.abs(first.mean(axis=0) - second.mean(axis=0)).sum() / 2)


def _by_chance(maps: Doubles, count: int) -> float:
    """Return the 95 % quantile of the distance over random splits of the maps."""
    random = np.random.default_rng(_SEED)
    found = []
    for _ in range(_RESAMPLES):
        mixed = maps[random.permutation(len(maps))]
        found.append(_distance(mixed[:count], mixed[count:]))
    return float(np.quantile(found, 0.95))


def _plain(row: ClassDrift) -> dict[str, Any]:
    looks = {
        name: None if look is None else {**look._asdict(), "centre": list(look.centre), "mean": look.mean.tolist()}
        for name, look in (("before", row.before), ("after", row.after))
    }
    return {"label": row.label, "distance": row.distance, "chance": row.chance, "has_moved": row.has_moved, **looks}


@checked(path=check_path)
def write_drift_page(drift: Drift, path: str | os.PathLike[str]) -> Path:
    """Write a comparison as one HTML file that needs neither network nor server.

    Raises
    ------
    WriteError
        The file cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    destination = Path(path)
    colours = ["#{:02x}{:02x}{:02x}".format(*row) for row in palette("viridis").tolist()]
    environment = Environment(loader=PackageLoader("fastcam.folders"), autoescape=True)
    page = environment.get_template("drift.html").render(
        classes=drift.classes, moved=drift.moved, cells=lambda look: _cells(look, colours)
    )
    with replacing(destination) as file:
        file.write(page.encode())
    return destination


def _cells(look: Look, colours: list[str]) -> list[list[str]]:
    """Return the colours of a mean map's pixels."""
    levels = np.rint(look.mean / look.mean.max() * 255).astype(int)
    return [[colours[level] for level in row] for row in levels.tolist()]
