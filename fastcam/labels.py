"""What a trained Keras file says of itself: the names of its classes, and what its photos go through."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ArgumentError, ModelError
from .preprocessing import Preprocessing

# A member of the .keras archive, beside Keras' own, which reads past it.
MEMBER = "fastcam.json"


@dataclass(frozen=True)
class Labels:
    """What `finetune` stores in the file, and `export` finds there.

    Attributes
    ----------
    classes : tuple of str
        Names by class index.
    preprocessing : Preprocessing
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing


def write_labels(path: Path, labels: Labels) -> None:
    """Add the labels to a .keras file that has none."""
    record = {"classes": labels.classes, "preprocessing": json.loads(labels.preprocessing.to_json())}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MEMBER, json.dumps(record, ensure_ascii=False))


def read_labels(path: Path) -> Labels | None:
    """Read the labels of a Keras file; None where it has none.

    Raises
    ------
    ModelError
        The labels are damaged.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            return None
        try:
            record = json.loads(archive.read(MEMBER))
            return Labels(_names(record["classes"]), Preprocessing.from_json(json.dumps(record["preprocessing"])))
        except (ArgumentError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"{path}: its member {MEMBER}, with the class names, is damaged ({error}): train again, or remove the "
                "member and give the names as classes"
            ) from None


def _names(classes: Sequence[object]) -> tuple[str, ...]:
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise ValueError(f"classes are {classes!r}")
    return tuple(map(str, classes))
