"""Mutated folders of results given to what reads them again: see `fuzzing`."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Attempt, fuzz
from mutations import flip_bytes
from networks import small_classifier
from PIL import Image

import fastcam

_ODD: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1e400,
    float("nan"),
    "",
    "\u202e<script>",
    "../..",
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
]
_FILES = ("results.jsonl", "run.json")


def _job(folder: Path) -> Path:
    """Return a folder with the results of four pictures."""
    photos = folder / "photos"
    photos.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    fastcam.export(small_classifier().to_model(), folder / "m.onnx", preprocess="scale", classes=list("abcde"))
    fastcam.explain_files(folder / "m.onnx", photos, folder / "sound")
    return folder / "sound"


def _change_value(value: Any, pick: random.Random) -> Any:
    """Return JSON with one of its values replaced or removed."""
    if isinstance(value, dict) and value and pick.random() < 0.8:
        key = pick.choice(list(value))
        if pick.random() < 0.15:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: _change_value(value[key], pick)}
    if isinstance(value, list) and value and pick.random() < 0.8:
        place = pick.randrange(len(value))
        return [*value[:place], _change_value(value[place], pick), *value[place + 1 :]]
    return pick.choice(_ODD)


def _mutate(folder: Path, pick: random.Random) -> None:
    path = folder / pick.choice(_FILES)
    data = path.read_bytes()
    if pick.random() < 0.3:
        path.write_bytes(flip_bytes(data, pick))
        return
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    place = pick.randrange(len(lines))
    lines[place] = json.dumps(_change_value(json.loads(lines[place]), pick)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


_READERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "report": lambda bad, sound, out: fastcam.write_report(bad),
    "drift": lambda bad, sound, out: fastcam.compare_results(sound, bad),
    "merge": lambda bad, sound, out: fastcam.merge_results([bad], out),
}


def prepare(folder: Path) -> Attempt:
    """Return what reads a mutation."""
    sound, bad, out = _job(folder), folder / "bad", folder / "merged"

    def attempt(seed: int, pick: random.Random) -> bool:
        for other in (bad, out):
            shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(sound, bad)
        _mutate(bad, pick)
        _READERS[pick.choice(list(_READERS))](bad, sound, out)
        return True

    return attempt


if __name__ == "__main__":
    fuzz(prepare)
