"""A page that shows an `Evaluation`: for each metric the methods in order, with their confidence intervals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from ..arguments import check_path
from ..files import replacing
from .baselines import BASELINES
from .evaluation import Evaluation, Summary
from .metrics import GRID, METRICS
from .verification import Verification

_GRID_SOURCE = "Boehle et al. 2021 (arXiv 2104.00032): the share of the map in its own quarter, chance is 0.25"


class _Bar(NamedTuple):
    """One method in the plot of a metric; positions are percents of the plot's width."""

    method: str
    text: str
    better_than: str
    milliseconds: str
    is_baseline: bool
    left: float
    width: float
    dot: float


class _Plot(NamedTuple):
    metric: str
    source: str
    better: str
    bars: list[_Bar]


def write_evaluation_page(evaluation: Evaluation, path: str | os.PathLike[str]) -> Path:
    """Write an evaluation as one HTML file that needs neither network nor server.

    Raises
    ------
    WriteError
        The file cannot be written.
    """
    return _write(
        path,
        "evaluation.html",
        plots=_plots(evaluation),
        settings=evaluation.settings,
        pictures=len(evaluation.targets),
        baselines=", ".join(BASELINES),
    )


def write_verification_page(verification: Verification, path: str | os.PathLike[str]) -> Path:
    """Write a verification as one HTML file that needs neither network nor server.

    Raises
    ------
    WriteError
        The file cannot be written.
    """
    return _write(
        path,
        "verification.html",
        passed=verification.passed,
        findings=verification.findings,
        facts=verification.facts,
    )


def _write(path: str | os.PathLike[str], template: str, **values: Any) -> Path:
    destination = check_path("path", path)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("fastcam.evaluating"), autoescape=True)
    page = environment.get_template(template).render(**values)
    with replacing(destination) as file:
        file.write(page.encode())
    return destination


def _plots(evaluation: Evaluation) -> list[_Plot]:
    rows: dict[str, list[Summary]] = {}
    for row in evaluation.summary():
        rows.setdefault(row.metric, []).append(row)
    sources = {name: row.source for name, row in METRICS.items()} | {GRID: _GRID_SOURCE}
    return [_Plot(metric, sources[metric], found[0].better, _bars(evaluation, found)) for metric, found in rows.items()]


def _bars(evaluation: Evaluation, rows: list[Summary]) -> list[_Bar]:
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / span

    return [
        _Bar(
            row.method,
            f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})",
            ", ".join(row.better_than) or "none",
            f"{evaluation.milliseconds[row.method]:.1f}",
            row.method in BASELINES,
            place(row.low),
            place(row.high) - place(row.low),
            place(row.mean),
        )
        for row in rows
    ]
