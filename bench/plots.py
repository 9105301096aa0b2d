"""The plots of the questions: bars side by side, and lines over a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, OTHER = "#1f6fb4", "#b9bec6"
_INK = "#333333"


@dataclass(frozen=True)
class Panel:
    """Bars with a title; those whose name begins with ``own`` are drawn in colour."""

    title: str
    values: Mapping[str, float]
    own: str = ""
    unit: str = "x"


def bars(panels: Sequence[Panel], label: str, *, columns: int = 2, best: str = "low") -> Figure:
    """Draw panels of horizontal bars, the best on top, each with its value.

    ``best`` says which is the best, the "low" or the "high" value, or "" to keep the order. In ``label``, {own} is the
    contestant to which the others are compared, if it differs between panels.
    """
    figure, axes = _grid(panels, columns, height=lambda panel: 0.3 * len(panel.values) + 1.0)
    for axis, panel in zip(axes, panels, strict=False):
        items = list(panel.values.items())
        if best:
            items.sort(key=lambda item: item[1], reverse=best == "high")
        names, values = zip(*items, strict=True)
        places = range(len(items), 0, -1)
        colours = [OWN if name.startswith(panel.own) else OTHER for name in names]
        axis.barh(places, values, height=0.72, color=colours)
        axis.set_yticks(places, names)
        for tick, name in zip(axis.get_yticklabels(), names, strict=True):
            tick.set_fontweight("bold" if panel.own and name.startswith(panel.own) else "normal")
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                _number(value, panel.unit), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_xlim(0, max(values) * 1.18 or 1)
        axis.set_ylim(0.4, len(items) + 0.6)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.set_xlabel(label.format(own=panel.own), fontsize=8)
        _tidy(axis)
        axis.tick_params(axis="y", length=0)
    return figure


@dataclass(frozen=True)
class Curves:
    """Lines over a size: by name, points (x, y)."""

    title: str
    across: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    own: str = ""


def curves(panels: Sequence[Curves], label: str, *, columns: int = 2) -> Figure:
    """Draw panels of lines, the size in powers of two."""
    figure, axes = _grid(panels, columns, height=lambda panel: 2.6)
    for axis, panel in zip(axes, panels, strict=False):
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        for name, points in panel.lines.items():
            axis.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                ms=4,
                color=OWN if name == panel.own else OTHER,
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(panel.across, fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.legend(frameon=False, fontsize=8)
        _tidy(axis)
    return figure


def _grid(panels: Sequence[Any], columns: int, height: Any) -> tuple[Figure, list[Any]]:
    """Return a figure with axes for each panel, as high as the highest in its row."""
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(map(height, row)) for row in rows]
    figure = Figure(figsize=(5.4 * columns, sum(heights)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).ravel().tolist()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure, axes


def _number(value: float, unit: str) -> str:
    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return f"{text}{unit}" if unit == "x" else f"{text} {unit}".rstrip()


def _tidy(axis: Any) -> None:
    axis.tick_params(labelsize=8, colors=_INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
