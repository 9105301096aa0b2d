"""Mutated explained models given to Explainer: see `fuzzing`."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from fuzz_export import mutated
from fuzzing import Attempt, fuzz
from mutations import flip_bytes, residual
from networks import small_classifier

import fastcam


def explained_models(folder: Path) -> list[bytes]:
    """Return exported files of two networks, with pooled and with full gradients, of one layer and of two."""
    found = []
    for source in (small_classifier().to_model(), residual()):
        for options in ({}, {"gradients": "full"}, {"classes": list("abcde")}):
            fastcam.export(source, folder / "sound.onnx", preprocess="scale", **options)
            found.append((folder / "sound.onnx").read_bytes())
        layers = fastcam.Explainer(folder / "sound.onnx").candidates[:2]
        fastcam.export(source, folder / "sound.onnx", layer=list(layers), preprocess="scale")
        found.append((folder / "sound.onnx").read_bytes())
    (folder / "sound.onnx").unlink()
    return found


def prepare(folder: Path) -> Attempt:
    """Return what opens and uses a mutation."""
    models = explained_models(folder)
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    def attempt(seed: int, pick: random.Random) -> bool:
        sound = pick.choice(models)
        data = sound if seed % 3 == 0 else mutated(sound, pick)
        if data is None:
            return False
        (folder / "in.onnx").write_bytes(flip_bytes(data, pick) if seed % 3 < 2 else data)
        explanation = fastcam.Explainer(folder / "in.onnx", threads=1)([photo] * 2, [0, 4])
        if not np.isfinite(explanation.heatmaps).all():
            raise AssertionError(f"seed {seed}: heatmaps that are not finite")
        explanation[1].overlay(1)
        return True

    return attempt


if __name__ == "__main__":
    fuzz(prepare)
