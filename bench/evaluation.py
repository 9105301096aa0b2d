"""Deletion and insertion: fastcam beside xplique, on the same network, images and heatmaps, from interleaved runs.

python -m bench.evaluation [--images 8] [--rounds 3] [--vgg16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastcam
from fastcam.arrays import Doubles, Floats
from fastcam.evaluating.case import Case
from fastcam.evaluating.metrics import METRICS, SETTINGS

from . import shims
from .networks import drawn_images, small, vgg16

_CLASS, _STEPS = 3, 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vgg16", action="store_true", help="VGG16 instead of a small VGG")
    options = parser.parse_args()
    network = vgg16() if options.vgg16 else small()
    images = drawn_images(options.images, (network.channels, network.side, network.side))
    heatmaps = np.random.default_rng(0).random((options.images, network.side, network.side))
    with tempfile.TemporaryDirectory() as folder:
        fastcam.export(network.to_onnx(), Path(folder) / "explained.onnx")
        explainer = fastcam.Explainer(Path(folder) / "explained.onnx")
        runs = {"fastcam": lambda: _own(explainer, images, heatmaps), "xplique": _xplique(network, images, heatmaps)}
        print(f"load: {os.getloadavg()[0]:.2f}")
        found = {name: run() for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        rate = options.images / statistics.median(values)
        print(f"{name:10} {rate:8.2f} images/s: deletion {found[name][0]:.6f}, insertion {found[name][1]:.6f}")
    print(
        f"ratio {statistics.median(seconds['xplique']) / statistics.median(seconds['fastcam']):.2f}, samples {seconds}"
    )


def _own(explainer: fastcam.Explainer, images: Floats, heatmaps: Doubles) -> tuple[float, float]:
    settings = {name: row.default for name, row in SETTINGS.items()} | {"steps": _STEPS}
    means = []
    for metric in ("deletion", "insertion"):
        values = []
        for number, (image, heatmap) in enumerate(zip(images, heatmaps, strict=True)):
            evidence, target = explainer.evidence(image[None], _CLASS)
            case = Case(evidence, target, 15, heatmap, lambda changed, other: heatmaps[0], None, settings, number)
            values.append(METRICS[metric].compute(case))
        means.append(float(np.mean(values)))
    return means[0], means[1]


def _xplique(network: Any, images: Floats, heatmaps: Doubles) -> Callable[[], tuple[float, float]]:
    shims.install()
    from xplique.metrics import Deletion, Insertion

    model = network.to_keras()
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    labels = np.eye(network.classes, dtype=np.float32)[[_CLASS] * len(images)]

    def run() -> tuple[float, float]:
        deletion, insertion = (
            metric(model, last, labels, batch_size=16, steps=_STEPS, activation="softmax").evaluate(
                heatmaps.astype(np.float32)
            )
            for metric in (Deletion, Insertion)
        )
        return float(deletion), float(insertion)

    return run


if __name__ == "__main__":
    main()
