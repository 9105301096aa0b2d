"""The figures of a training, drawn with matplotlib: learning curves and the confusion matrix."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import replacing

# With more classes than the first limit, numbers are omitted; with more than the second, names too.
_MOST_NUMBERS, _MOST_NAMES = 25, 80


def write_learning_curves(history: Mapping[Any, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw the training and validation loss and accuracy of every epoch.

    Parameters
    ----------
    history : mapping
        For each step of training, the "loss", "accuracy", "val_loss" and "val_accuracy" of its epochs.
    path : Path
        The .png to write.

    Raises
    ------
    WriteError
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rows = [row for step in history.values() for row in step]
    epochs = range(1, len(rows) + 1)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [row[name] for row in rows], color="#8a8f98", marker=".", label="training")
        axes.plot(epochs, [row[f"val_{name}"] for row in rows], color="#d1495b", marker=".", label="validation")
        begin = 0.5
        for step, part in history.items():
            if begin > 1:
                axes.axvline(begin, color="#c8ccd2", linestyle=":")
            axes.annotate(step, (begin, 1), (2, 3), ("data", "axes fraction"), "offset points", color="#555")
            begin += len(part)
        axes.set(xlabel="epoch", ylabel=name, xlim=(0.5, len(rows) + 0.5), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.02)
    axes.legend(loc="best", framealpha=0.8, edgecolor="none")
    _save(figure, path)


def write_confusion_matrix(confusion: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Draw how often photos of each class (row) were classified as each class (column).

    Parameters
    ----------
    confusion : ndarray
        int64 (classes,classes), counts.
    classes : sequence of str
    path : Path
        The .png to write.

    Raises
    ------
    WriteError
    """
    from matplotlib.figure import Figure

    count = len(classes)
    side = min(max(4.0, 2.2 + 0.42 * count), 14.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= _MOST_NAMES:
        # A class may be called "$100 bill", which is not mathematics.
        axes.set_xticks(range(count), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(count), classes, parse_math=False)
    if count <= _MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(number), ha="center", va="center", color=colour)
    share = np.trace(confusion) / max(confusion.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{share:.1%} of {confusion.sum()} validation photos")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        # Characters missing from matplotlib's font become boxes.
        warnings.filterwarnings("ignore", "Glyph")
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)
