"""Which classes to explain: names, indices and ranks, resolved for a model's classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from ..arguments import shown
from ..arrays import Indices
from ..errors import TargetError, suggest
from ..metadata import MAXIMUM_RANK

Target: TypeAlias = "int | str | Sequence[int | str] | Sequence[Sequence[int | str]] | Indices | None"


class Targets:
    """Resolves the targets of a model with these classes.

    Parameters
    ----------
    source : str
        The name of the model's file for messages.
    classes : tuple of str or None
        Names by index.
    count : int
        Number of classes.
    """

    def __init__(self, source: str, classes: tuple[str, ...] | None, count: int) -> None:
        self._source = source
        self._classes = classes
        self._count = count

    def resolve(self, target: Target, count: int) -> Indices:
        """Return class indices (1 or N, K) for N = ``count`` images.

        -r stands for the class of rank r, which the file determines itself.

        Raises
        ------
        TargetError
            A class does not exist, or the lists do not fit the images.
        """
        if target is None:
            return np.array([[-1]], np.int64)
        if isinstance(target, str) and target not in (self._classes or ()):
            ranks = _top_ranks(target, self._count)
            if ranks is not None:
                return ranks
        rows = _target_rows(target)
        if len(rows) not in (1, count):
            raise TargetError(f"target holds {len(rows)} lists for {count} images: give one, or one per image")
        lengths = {len(row) for row in rows}
        if len(lengths) != 1 or 0 in lengths:
            raise TargetError(
                f"target holds lists of {sorted(lengths)} classes: give every image the same number, 1 or more"
            )
        return np.array([[self._class_index(item) for item in row] for row in rows], np.int64)

    def _class_index(self, item: Any) -> int:
        if isinstance(item, str):
            return self._class_by_name(item)
        if isinstance(item, bool | np.bool_) or not isinstance(item, int | np.integer):
            raise TargetError(f"target {shown(item)} is neither a class index nor a class name")
        if not 0 <= item < self._count:
            raise TargetError(f"target {item} is out of range: the model has classes 0..{self._count - 1}")
        return int(item)

    def _class_by_name(self, name: str) -> int:
        """Return the class with this name; if no class has it and it is a number, the class with this index."""
        if name not in (self._classes or ()) and re.fullmatch("[0-9]{1,9}", name):
            return self._class_index(int(name))
        if self._classes is None:
            raise TargetError(f"target {name!r}: {self._source} has no class names; export it with classes=[...]")
        found = [index for index, known in enumerate(self._classes) if known == name]
        if len(found) > 1:
            raise TargetError(f"target {name!r} names the classes {found}: give the index")
        if not found:
            raise TargetError(
                f"the model has no class {name!r}: {suggest(name, self._classes) or 'see Explainer.classes'}".rstrip()
            )
        return found[0]


def _top_ranks(target: str, class_count: int) -> Indices | None:
    """Return the ranks that "top3" means as (1,3) negative numbers, or None for any other string."""
    match = re.fullmatch(r"top(\d{1,9})", target)
    if match is None:
        return None
    count = int(match[1])
    if not 1 <= count <= min(class_count, MAXIMUM_RANK):
        raise TargetError(
            f"target {shown(target)}: the model ranks its best 1..{min(class_count, MAXIMUM_RANK)} classes"
        )
    return -np.arange(1, count + 1, dtype=np.int64)[None]


def _target_rows(target: Any) -> list[list[Any]]:
    """Return one list of classes for all images, or one per image."""
    items = target.tolist() if isinstance(target, np.ndarray) else target
    if isinstance(items, str | int | np.integer):
        return [[items]]
    if not isinstance(items, list | tuple) or not items:
        raise TargetError(
            f"target {shown(target)}: give None, 'top3', a class, a list of classes, or one list per image"
        )
    nested = [isinstance(item, list | tuple) or (isinstance(item, np.ndarray) and item.ndim > 0) for item in items]
    if all(nested):
        return [list(item) for item in items]
    if any(nested):
        raise TargetError(f"target {shown(target)} mixes classes and lists: give one list per image, or one for all")
    return [list(items)]
