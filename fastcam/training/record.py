"""The folder of a training and its record, training.json: what was trained, and whether it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, WriteError
from ..files import LOCK, digest, refuse_links, replacing, writing
from .photos import TRAINING, VALIDATION, Photos
from .results import TrainingResult
from .settings import Settings

RECORD = "training.json"
CURVES, CONFUSION = "curves.png", "confusion.png"
STAGED, FEATURES, MODEL = "photos", "features", "model.keras"
_STEPS = ("head", "blocks", "network")
_NEW, _RUNNING, _FAILED, _DONE = "new", "running", "failed", "done"

# What must not differ between an interrupted training and its continuation.
_COMPARED = ("settings", "side", "photos_sha256", "weights_sha256", "versions")


def claim_folder(folder: Path) -> None:
    """Create the folder of a training, or check that it is one, so that other people's files are never touched.

    Raises
    ------
    WriteError
        The folder cannot be created, contains links, or contains files that no training wrote.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
    refuse_links(folder, (RECORD, CURVES, CONFUSION, STAGED, FEATURES, MODEL, LOCK, *_STEPS))
    with writing(folder):
        if not (folder / RECORD).exists():
            foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
            if foreign:
                raise WriteError(
                    f"{folder}: was not created by a training and contains {foreign[0]!r}: move it, or choose another "
                    "out"
                )
            _write_record(folder, {"state": _NEW})


def check_interrupted(folder: Path, resume: bool) -> None:
    """Raise WriteError if the record is damaged, or belongs to an interrupted training that should not be resumed."""
    if _read_record(folder).get("state") == _RUNNING and not resume:
        raise WriteError(
            f"{folder}: contains an interrupted training: continue it with resume=True (--resume), or remove the folder"
        )


def gather_facts(settings: Settings, side: int, data: Path, photos: Photos, network: Any) -> dict[str, Any]:
    """Return everything that determines the result, and facts about the photos, as JSON types."""
    return {
        "settings": json.loads(json.dumps(asdict(settings))),
        "side": side,
        "classes": list(photos.classes),
        "photos_sha256": digest_values([photo.staged.name for photo in (*photos.train, *photos.val)]),
        "weights_sha256": digest_values(network.get_weights()),
        "versions": {name: version(name) for name in ("fastcam", "keras", "numpy")},
        "data": str(data),
        "counts": {
            name: [sum(photo.label == label for photo in part) for label in range(len(photos.classes))]
            for name, part in ((TRAINING, photos.train), (VALIDATION, photos.val))
        },
        "held_out": [str(photo.source) for photo in photos.val],
        "skipped": list(photos.skipped),
    }


def open_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Start a training, or continue an interrupted one.

    Raises
    ------
    ArgumentError
        The interrupted training had other settings, photos, weights or versions.
    """
    earlier = _read_record(folder)
    if earlier.get("state") == _RUNNING:
        differing = [name for name in _COMPARED if earlier.get(name) != facts[name]]
        if differing:
            raise ArgumentError(
                f"{folder}: the interrupted training had other {_differences(earlier, facts, differing)}: "
                "use the same, or remove the folder"
            )
    else:
        with writing(folder):
            for step in _STEPS:
                shutil.rmtree(folder / step, ignore_errors=True)
    _write_record(folder, {"state": _RUNNING, **facts})


def close_failed(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record that the training cannot be continued with these settings."""
    _write_record(folder, {"state": _FAILED, **facts})


def close_record(folder: Path, facts: Mapping[str, Any], result: TrainingResult) -> None:
    """Record the result, and remove what was stored for resuming."""
    found = {name: getattr(result, name) for name in ("accuracy", "confusion", "history", "seconds")}
    _write_record(folder, {"state": _DONE, **facts, **found})
    for step in result.history:
        shutil.rmtree(folder / step, ignore_errors=True)


def digest_values(values: Sequence[Any]) -> str:
    """Return the SHA-256 of arrays and JSON values."""
    return digest(value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode() for value in values)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WriteError(f"{path}: cannot be read ({error}): remove {folder} to start again") from error
    if not isinstance(found, dict):
        raise WriteError(f"{path}: is not the record of a training: remove {folder} to start again")
    return found


def _write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    with replacing(folder / RECORD) as file:
        file.write(json.dumps(facts, indent=1).encode())


def _differences(earlier: Mapping[str, Any], facts: Mapping[str, Any], names: Sequence[str]) -> str:
    """Describe what differs; settings one by one."""
    if names[0] != "settings":
        return {"photos_sha256": "photos", "weights_sha256": "weights"}.get(names[0], names[0])
    before, now = earlier.get("settings"), facts["settings"]
    known = before if isinstance(before, dict) else {}
    changed = [f"{name} was {known.get(name)!r}, not {now[name]!r}" for name in now if known.get(name) != now[name]]
    return f"settings ({', '.join(changed)})"
