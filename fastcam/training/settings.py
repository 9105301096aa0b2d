"""The settings of a training, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import check_flag, check_integer, check_number, shown
from ..errors import ArgumentError

# The smallest value of each integer.
_LEAST = {"epochs": 1, "fine_epochs": 1, "batch_size": 1, "patience": 1, "unfreeze": 0, "augmentations": 0, "seed": 0}
# Each real number: whether a value is allowed, and how to say so.
_REAL: Mapping[str, tuple[Any, str]] = {
    "learning_rate": (lambda value: value > 0, "a number above 0"),
    "fine_learning_rate": (lambda value: value > 0, "a number above 0"),
    "validation_split": (lambda value: 0 < value < 1, "a number above 0 and below 1"),
    "dropout": (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
}


@dataclass(frozen=True)
class Settings:
    """The arguments of `finetune` that determine the result, as JSON types; raises ArgumentError."""

    backbone: str
    weights: str | None
    size: int | None
    hidden: Sequence[int]
    dropout: float
    epochs: int
    learning_rate: float
    unfreeze: int
    fine_epochs: int
    fine_learning_rate: float
    batch_size: int
    patience: int
    augmentations: int
    class_weights: bool
    validation_split: float
    seed: int

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            name: check_integer(name, getattr(self, name), least) for name, least in _LEAST.items()
        }
        for name, (allowed, wanted) in _REAL.items():
            checked[name] = check_number(name, getattr(self, name), allowed, wanted)
        if self.size is not None:
            checked["size"] = check_integer("size", self.size, 1)
        checked["class_weights"] = check_flag("class_weights", self.class_weights)
        checked["hidden"] = self._checked_hidden()
        if not isinstance(self.backbone, str):
            raise ArgumentError(f"backbone={shown(self.backbone)}: give the name of a classifier of keras.applications")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.weights is None and self.unfreeze:
            raise ArgumentError("weights=None trains the whole network from scratch: omit unfreeze")

    def _checked_hidden(self) -> tuple[int, ...]:
        try:
            return tuple(check_integer("hidden", units, 1) for units in self.hidden)
        except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
            raise ArgumentError(
                f"hidden={shown(self.hidden)}: give the number of units of each layer, 1 or more"
            ) from None
