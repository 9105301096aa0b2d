"""Class names in all common formats, and what `finetune` stores in its Keras files."""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArgumentError, ModelError
from .preprocessing import Preprocessing

# An additional member of the .keras archive, which Keras ignores.
MEMBER = "fastcam.json"


@dataclass(frozen=True)
class Labels:
    """What `finetune` stores in its file, for `export` to find.

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
    """Read the labels of a Keras file; None if it has none.

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
                "member and pass the names as classes"
            ) from None


def _names(classes: object) -> tuple[str, ...]:
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise ValueError(f"classes are {classes!r}")
    return tuple(map(str, classes))


def class_names(source: object) -> list[str]:
    """Return class names by index from any common format.

    Parameters
    ----------
    source
        A sequence of names; a mapping of indices to names (Hugging Face's ``id2label``, Ultralytics' ``names``,
        keras.applications' class index with its pairs of WordNet id and name) or of names to indices (Keras'
        ``class_indices``); or the path of a UTF-8 file that holds one name per line, or one of these as JSON, or a
        Hugging Face ``config.json``.

    Raises
    ------
    ArgumentError
        The source holds something else, the indices are not 0, 1, 2 ..., or the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        source = _read_names(Path(source))
    if isinstance(source, Mapping):
        return _checked(_by_index(source))
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise ArgumentError(
            f"classes={source!r}: give a list or mapping of names, or the path of a file that holds them"
        )
    return _checked(list(source))


def stored_names(properties: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the class names in a model's metadata.

    Ultralytics' ``names``, "{0: 'person', 1: 'car'}", or PaddlePaddle's ``character``, one per line.
    """
    lines = properties.get("character", "").splitlines()
    if lines and all(line.isprintable() and line for line in lines):
        return tuple(lines)
    try:
        return tuple(class_names(ast.literal_eval(properties["names"])))
    except (KeyError, ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def config_names(config: object) -> tuple[str, ...] | None:
    """Return the class names of a Hugging Face configuration; None if it only numbers its classes."""
    labels = getattr(config, "id2label", None)
    if not isinstance(labels, Mapping) or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in labels.values()):
        return None
    try:
        return tuple(class_names(labels))
    except ArgumentError:
        return None


def _read_names(path: Path) -> object:
    try:
        # Editors may write a byte order mark before the first line and an empty line after the last.
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise ArgumentError(f"classes={str(path)!r} is not a readable UTF-8 text file: {error}") from error
    if path.suffix.lower() != ".json":
        return text.splitlines()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"classes={str(path)!r} is not valid JSON: {error}") from None
    if isinstance(content, Mapping):
        return next((content[key] for key in _KEYS_OF_NAMES if isinstance(content.get(key), Mapping | list)), content)
    return content


# Where configurations keep the names.
_KEYS_OF_NAMES = ("id2label", "names", "class_indices", "classes")


def _by_index(mapping: Mapping[Any, Any]) -> list[Any]:
    """Return the names in the order of their indices, whichever of the two is the key."""
    # Names may be digits as well: {"0": 0, "1": 1}.
    keyed = all(_is_index(key) for key in mapping) and not all(isinstance(name, int) for name in mapping.values())
    pairs = [(int(key), name) if keyed else (name, key) for key, name in mapping.items()]
    indices = [int(index) for index, _ in pairs if _is_index(index)]
    if sorted(indices) != list(range(len(pairs))):
        raise ArgumentError(
            f"classes: a mapping needs the indices 0 to {len(mapping) - 1} on one side and names on the other, not "
            f"{dict(list(mapping.items())[:3])!r} ..."
        )
    names = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    # {"0": ["n01440764", "tench"], ...}
    return [name[1] if isinstance(name, list | tuple) and len(name) == 2 else name for name in names]


def _is_index(value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) is not None)


def _checked(names: list[Any]) -> list[str]:
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise ArgumentError(f"classes must be names, got {name!r} ({type(name).__name__})")
    return names
