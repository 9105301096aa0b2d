"""Whether a long-running service grows.

``python -m bench.memory`` explains 10,000 batches in one process and prints its resident memory on the way; the samples
go to results/memory.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import psutil

import fastcam

from .harness import save, table
from .networks import NETWORKS

PACKAGES = ("fastcam", "numpy", "onnxruntime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--explanations", type=int, default=10_000)
    parser.add_argument("--warmup", type=int, default=200)
    arguments = parser.parse_args()
    process = psutil.Process()
    images = np.random.default_rng(1).normal(size=(1, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explained.onnx"
        fastcam.export(NETWORKS["EfficientNet-Lite0"](), path)
        explainer = fastcam.Explainer(path)
    for _ in range(arguments.warmup):
        explainer(images, "top3")
    every = max(1, arguments.explanations // 10)
    samples = [(0, process.memory_info().rss)]
    for done in range(1, arguments.explanations + 1):
        explainer(images, "top3")
        if done % every == 0:
            samples.append((done, process.memory_info().rss))
    first = samples[0][1]
    print(
        table(
            ["explanations", "MB", "growth %"],
            [[n, f"{b / 1e6:.1f}", f"{100 * (b / first - 1):.2f}"] for n, b in samples],
        )
    )
    print(f"written to {save('memory', PACKAGES, samples)}")


if __name__ == "__main__":
    main()
