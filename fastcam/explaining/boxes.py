"""The boxes of a detector: which ones to explain, and what an explanation holds of them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from ..arguments import shown
from ..arrays import Floats, Indices
from ..errors import ArgumentError, TargetError
from ..metadata import MAXIMUM_RANK
from .targets import Target

DEFAULT_THRESHOLD = 0.25
# Boxes that are explained if none are asked for.
_DEFAULT_COUNT = 10
# A missing box of an earlier explanation, -1 in its targets, is asked for by this rank, which nothing else asks for.
ABSENT = -MAXIMUM_RANK
_MOST_RANKS = MAXIMUM_RANK - 1


class Boxes(NamedTuple):
    """The boxes of N images, K each.

    Attributes
    ----------
    corners : ndarray
        (N,K,4) float32: left, top, right and bottom in pixels of the model's input.
    scores : ndarray
        (N,K) float32, probabilities.
    classes : ndarray
        (N,K) int64.
    """

    corners: Floats
    scores: Floats
    classes: Indices


class BoxTargets:
    """Resolves the targets of a detector.

    Parameters
    ----------
    source : str
        The name of the model's file for messages.
    count : int
        Number of entries in the table of scores: one per anchor and class.
    """

    def __init__(self, source: str, count: int) -> None:
        self._source = source
        self._count = count

    def resolve(self, target: Target, count: int) -> Indices:
        """Return entries (1 or N, K) for N = ``count`` images; -r stands for the box of rank r.

        Raises
        ------
        TargetError
            An entry does not exist, or the lists do not fit the images.
        """
        if target is None:
            return -np.arange(1, _DEFAULT_COUNT + 1, dtype=np.int64)[None]
        if isinstance(target, str):
            match = re.fullmatch(r"top(\d{1,9})", target)
            if match is None or not 1 <= int(match[1]) <= _MOST_RANKS:
                raise TargetError(
                    f"target {shown(target)}: {self._source} is a detector: give None or 'top1' to 'top{_MOST_RANKS}' "
                    "for the best boxes, or entries of an explanation's targets"
                )
            return -np.arange(1, int(match[1]) + 1, dtype=np.int64)[None]
        rows = _rows(target)
        if rows is None or len(rows) not in (1, count):
            raise TargetError(
                f"target {shown(target)}: give None, 'top5', entries of an explanation's targets, or a list of these "
                f"for each of the {count} images"
            )
        is_missing = (rows == -1) & (np.ndim(target) == 2)
        if not (is_missing | ((rows >= 0) & (rows < self._count))).all():
            raise TargetError(f"target {shown(target)}: the detector has entries 0..{self._count - 1}")
        return np.where(is_missing, ABSENT, rows)


def _rows(target: Any) -> Indices | None:
    """Return whole numbers as rows (1 or N, K), or None if they are none."""
    try:
        array = np.asarray(target)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything
        return None
    if array.dtype.kind not in "iu" or array.ndim > 2 or not array.size:
        return None
    return np.atleast_2d(array).astype(np.int64)


def check_threshold(threshold: Any, *, has_boxes: bool) -> float | None:
    """Return the lowest score of the boxes to explain; None for files without boxes.

    Raises
    ------
    ArgumentError
        It is not a number of 0..1, or the file has no boxes.
    """
    if threshold is None:
        return DEFAULT_THRESHOLD if has_boxes else None
    if not has_boxes:
        raise ArgumentError(f"threshold={shown(threshold)} applies to detectors: omit it")
    is_number = isinstance(threshold, int | float | np.integer | np.floating) and not isinstance(threshold, bool)
    if not is_number or not 0 <= threshold <= 1:
        raise ArgumentError(f"threshold={shown(threshold)}: give the lowest probability of a box, 0..1")
    return float(threshold)
