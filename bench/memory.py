"""The memory of a long-running service.

``python -m bench.memory`` explains 10,000 batches in one process and prints its resident memory along the way; the
samples go to results/memory.json. ``python -m bench.memory --folder 100000`` does so for a folder with that many
photos, each a separate file, and a small network.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

import fastcam

from .endtoend import make_photos
from .harness import save, table
from .networks import lite0

PACKAGES = ("fastcam", "numpy", "onnxruntime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--explanations", type=int, default=10_000)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--folder", type=int, metavar="PHOTOS")
    arguments = parser.parse_args()
    if arguments.folder:
        with tempfile.TemporaryDirectory() as folder:
            _watch_folder(Path(folder), arguments.folder)
    else:
        _watch_calls(arguments.explanations, arguments.warmup)


def _watch_calls(explanations: int, warmup: int) -> None:
    process = psutil.Process()
    images = np.random.default_rng(1).normal(size=(1, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explained.onnx"
        fastcam.export(lite0(), path)
        explainer = fastcam.Explainer(path)
    for _ in range(warmup):
        explainer(images, "top3")
    every = max(1, explanations // 10)
    samples = [(0, process.memory_info().rss)]
    for done in range(1, explanations + 1):
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


def _watch_folder(folder: Path, count: int) -> None:
    """Explain ``count`` small photos, each a separate file, and print the resident memory."""
    path = folder / "small.onnx"
    fastcam.export(_tiny(), path, preprocess="scale")
    make_photos(folder / "seeds", 64, (64, 48))
    seeds = [seed.read_bytes() for seed in sorted((folder / "seeds").iterdir())]
    for number in range(count):
        place = folder / "photos" / f"{number // 1000:04}" / f"{number:06}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(seeds[number % len(seeds)])
    process = psutil.Process()
    samples: list[tuple[int, int, float]] = []
    begin = time.perf_counter()

    def watch(progress: fastcam.JobProgress) -> None:
        if progress.done % max(1, count // 10) == 0 or progress.done == min(1000, count // 10):
            samples.append((progress.done, process.memory_info().rss, time.perf_counter() - begin))

    fastcam.explain_files(path, folder / "photos", folder / "out", progress=watch)
    samples.append((count, process.memory_info().rss, time.perf_counter() - begin))
    rows = [[done, f"{rss / 1e6:.1f}", f"{seconds:.0f}"] for done, rss, seconds in samples]
    print(table(["images", "MB", "s"], rows))
    print(f"written to {save('memory_folder', PACKAGES, samples)}")


def _tiny() -> onnx.ModelProto:
    """Return a classifier of 32x32 images, so that a hundred thousand take only minutes."""
    generator = np.random.default_rng(0)
    weights = {"kernel": generator.normal(size=(8, 3, 3, 3)), "dense": generator.normal(size=(8, 5))}
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["features"]),
        helper.make_node("Relu", ["features"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


if __name__ == "__main__":
    main()
