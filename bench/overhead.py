"""What a heatmap costs on top of the prediction.

``python -m bench.overhead`` times scores + heatmap (an Explainer called with a preprocessed batch) and the plain
forward pass of the same model that was exported, both in ONNX Runtime in this process, in turns, and writes
results/overhead.json. Before it times, it checks that both give the same scores and that there is a heatmap.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

import fastcam

from .harness import Timing, interleave, save, table
from .networks import NETWORKS

PACKAGES = ("fastcam", "numpy", "onnxruntime")


@dataclass(frozen=True)
class Workload:
    """Images in a batch, maps of each, and how often to time it: turns, and samples in a turn."""

    network: str
    batch: int
    targets: str | None
    rounds: int
    burst: int


WORKLOADS = (
    Workload("EfficientNet-Lite0", 1, None, 40, 12),
    Workload("EfficientNet-Lite0", 1, "top5", 40, 12),
    Workload("EfficientNet-Lite0", 16, None, 15, 3),
    Workload("VGG16", 1, None, 15, 4),
    Workload("VGG16", 1, "top15", 15, 4),
    Workload("VGG16", 16, None, 12, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    rows: list[list[object]] = []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for network in dict.fromkeys(workload.network for workload in WORKLOADS):
            plain, explainer = _open(network, Path(folder), threads)
            for workload in WORKLOADS:
                if workload.network == network:
                    timings = _time(workload, plain, explainer)
                    rows.append(_row(workload, timings))
                    results.append({**asdict(workload), "threads": threads, "seconds": _samples(timings)})
    print(table(["network", "batch", "targets", "plain ms", "with heatmap ms", "ratio of medians"], rows))
    print(f"written to {save('overhead', PACKAGES, results)}")


def _open(network: str, folder: Path, threads: int) -> tuple[onnxruntime.InferenceSession, fastcam.Explainer]:
    source = NETWORKS[network]()
    onnx.save(source, folder / "plain.onnx")
    fastcam.export(source, folder / "explained.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    plain = onnxruntime.InferenceSession(folder / "plain.onnx", options)
    return plain, fastcam.Explainer(folder / "explained.onnx", threads=threads)


def _time(workload: Workload, plain: onnxruntime.InferenceSession, explainer: fastcam.Explainer) -> dict[str, Timing]:
    images = np.random.default_rng(1).normal(size=(workload.batch, 3, 224, 224)).astype(np.float32)
    _validate(plain, explainer, images[:1])
    contestants = {
        "plain": lambda: plain.run(None, {"images": images}),
        "heatmap": lambda: explainer(images, workload.targets),
    }
    return interleave(contestants, rounds=workload.rounds, burst=workload.burst, settle=2 if workload.batch == 1 else 1)


def _validate(plain: onnxruntime.InferenceSession, explainer: fastcam.Explainer, images: NDArray[np.float32]) -> None:
    found = explainer(images)
    (probabilities,) = plain.run(None, {"images": images})
    if not np.allclose(found.probabilities, probabilities, rtol=1e-3, atol=1e-6):
        raise SystemExit("the exported model gives other scores than its source")
    if not (np.isfinite(found.heatmaps).all() and found.heatmaps.max() > 0.5):
        raise SystemExit("the heatmap is empty")


def _row(workload: Workload, timings: dict[str, Timing]) -> list[object]:
    plain, heatmap = timings["plain"].median, timings["heatmap"].median
    return [
        workload.network,
        workload.batch,
        workload.targets or "top1",
        f"{plain * 1e3:.2f}",
        f"{heatmap * 1e3:.2f}",
        f"{heatmap / plain:.3f}",
    ]


def _samples(timings: dict[str, Timing]) -> dict[str, tuple[float, ...]]:
    return {name: timing.samples for name, timing in timings.items()}


if __name__ == "__main__":
    main()
