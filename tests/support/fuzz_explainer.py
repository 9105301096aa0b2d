"""Mutated explained models given to Explainer, in a separate process, like `fuzz_export`.

``python tests/support/fuzz_explainer.py FOLDER FIRST COUNT`` prints how many explained an image and how many were
rejected.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import numpy as np
from fuzz_export import SECONDS_EACH, limit_memory, mutated
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


def run(folder: Path, first: int, count: int) -> tuple[int, int]:
    """Open and use mutations number ``first`` and following; return how many explained and how many were rejected."""
    models = explained_models(folder)
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    explained = refused = 0
    for seed in range(first, first + count):
        (folder / "seed").write_text(str(seed), encoding="utf-8")
        signal.alarm(SECONDS_EACH)
        pick = random.Random(seed)
        sound = pick.choice(models)
        data = sound if seed % 3 == 0 else mutated(sound, pick)
        if data is None:
            continue
        (folder / "in.onnx").write_bytes(flip_bytes(data, pick) if seed % 3 < 2 else data)
        try:
            explanation = fastcam.Explainer(folder / "in.onnx", threads=1)([photo] * 2, [0, 4])
            if not np.isfinite(explanation.heatmaps).all():
                raise AssertionError(f"seed {seed}: heatmaps that are not finite")
            explanation[1].overlay(1)
            explained += 1
        except fastcam.FastcamError:
            refused += 1
    return explained, refused


if __name__ == "__main__":
    limit_memory()
    print(*run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
