"""Mutated models and pictures: whatever the input, only FastcamError is raised, and no file is left behind."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from mutations import (
    STRUCTURAL,
    change_input_shape,
    drop_input,
    drop_node,
    drop_weights,
    flip_bytes,
    rename_output,
    residual,
)
from networks import small_classifier

import fastcam

_ROUNDS = 150
_MUTATIONS = 1000
_FEW_MUTATIONS = 200


@pytest.mark.parametrize("source", [lambda: small_classifier().to_model(), residual], ids=["vgg", "residual"])
def test_export_takes_anything(source: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    refused = exported = 0
    for seed in range(_ROUNDS):
        pick = random.Random(seed)
        model = source()
        destination = tmp_path / "out.onnx"
        if seed % 3 == 0:
            (tmp_path / "in.onnx").write_bytes(flip_bytes(model.SerializeToString(), pick))
        else:
            for _ in range(pick.choice([1, 1, 2])):
                pick.choice(STRUCTURAL)(model, pick)
            (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
        try:
            fastcam.export(tmp_path / "in.onnx", destination, gradients=pick.choice(["pooled", "full"]))
            exported += 1
            destination.unlink()
        except fastcam.FastcamError:
            refused += 1
        assert [file.name for file in tmp_path.iterdir()] == ["in.onnx"], seed
    assert refused > _ROUNDS / 4
    assert exported > _ROUNDS / 20


def test_explainer_takes_anything(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "good.onnx", classes=list("abcde"))
    good = (tmp_path / "good.onnx").read_bytes()
    image = np.ones((2, 3, 12, 12), np.float32)
    refused = explained = 0
    for seed in range(_ROUNDS):
        pick = random.Random(seed)
        data = good
        if seed % 2:
            data = flip_bytes(good, pick)
        else:
            model = onnx.load_from_string(good)
            pick.choice([drop_node, drop_weights, drop_input, change_input_shape, rename_output])(model, pick)
            data = model.SerializeToString()
        (tmp_path / "bad.onnx").write_bytes(data)
        try:
            fastcam.Explainer(tmp_path / "bad.onnx", threads=1)(image, [0, 4])
            explained += 1
        except fastcam.FastcamError:
            refused += 1
    assert refused > _ROUNDS / 4
    assert explained > _ROUNDS / 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the bounds on memory and time are POSIX's")
@pytest.mark.parametrize("script", sorted(path.name for path in Path(__file__).with_name("support").glob("fuzz_*.py")))
@pytest.mark.parametrize(
    ("first", "count"),
    [
        (0, _FEW_MUTATIONS),
        *(pytest.param(part * _MUTATIONS, _MUTATIONS, marks=pytest.mark.nightly) for part in range(4)),
    ],
)
def test_thousands_of_mutations_neither_crash_nor_hang(script: str, first: int, count: int, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(Path(__file__).with_name("support") / script), str(tmp_path), str(first)]
    done = subprocess.run([*command, str(count)], check=False, capture_output=True, text=True, timeout=550)
    seed = (tmp_path / "seed").read_text(encoding="utf-8")
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    used, refused = map(int, done.stdout.splitlines()[-1].split())
    assert used + refused > 0.8 * count
    assert min(used, refused) > count / 20
