"""What `finetune` reports while it works, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fitting import Row

Step = Literal["photos", "features", "head", "blocks", "network"]


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of `finetune`.

    Attributes
    ----------
    step : {"photos", "features", "head", "blocks", "network"}
        The current step: reading photos, computing the backbone's features, or training the head, the last blocks or
        the whole network.
    done, total : int
        Photos or epochs.
    logs : mapping of str to float
        After an epoch "loss", "accuracy", "val_loss" and "val_accuracy"; otherwise empty.
    """

    step: Step
    done: int
    total: int
    logs: Mapping[str, float]


@dataclass(frozen=True)
class TrainingResult:
    """The result of `finetune`.

    Attributes
    ----------
    path : Path
        The .keras file.
    folder : Path
        Contains training.json (all settings and figures), curves.png, confusion.png, and a cache for the next training
        on the same photos.
    classes : tuple of str
    accuracy : float
        Fraction of the validation photos that are classified correctly, 0..1. The best epoch was chosen on the same
        photos.
    confusion : tuple of tuples of int
        Number of validation photos by true class (row) and predicted class (column).
    history : mapping of str to tuple of mappings
        For each step of training one mapping per epoch: "loss", "accuracy", "val_loss", "val_accuracy", "seconds".
    photos, held_out : int
        Number of photos for training and for validation.
    skipped : tuple of str
        Files that are not readable pictures, each with the reason.
    seconds : mapping of str to float
        Duration of every step that this run performed.
    """

    path: Path
    folder: Path
    classes: tuple[str, ...]
    accuracy: float
    confusion: tuple[tuple[int, ...], ...]
    history: Mapping[str, tuple[Row, ...]]
    photos: int
    held_out: int
    skipped: tuple[str, ...]
    seconds: Mapping[str, float]
