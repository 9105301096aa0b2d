"""What a folder of photos costs from JPEG to overlay, beside the model alone.

``python -m bench.folder`` runs `fastcam.explain_files` over photos on disk and, in turns, the same file's scores and
heatmap weights for as many images that are in memory already, and writes results/folder.json. The model alone has all
threads, and the job's batches; opening the file counts for neither.

``python -m bench.folder --memory 100000`` explains so many photos with a small network, and prints the resident memory
on the way.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
import psutil
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import fastcam

from .harness import save, table
from .networks import lite0, vgg16

PACKAGES = ("fastcam", "numpy", "onnxruntime", "pillow", "tensorflow")
_PHOTOS = ("chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg")
_BATCH = 8
_SIZES = ((500, 375), (320, 240))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="IMAGES")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            _watch_memory(Path(folder), arguments.memory)
        else:
            _compare(Path(folder), arguments.rounds)


def _mobilenet(path: Path) -> None:
    import keras

    fastcam.export(keras.applications.MobileNetV2(weights=None), path, preprocess="symmetric")


# Name, how to export it, images in a turn.
_NETWORKS: dict[str, tuple[Callable[[Path], object], int]] = {
    "VGG16": (lambda path: fastcam.export(vgg16(), path, preprocess="vgg16"), 64),
    "MobileNetV2": (_mobilenet, 512),
    "EfficientNet-Lite0": (lambda path: fastcam.export(lite0(), path, preprocess="imagenet"), 512),
}


def _compare(folder: Path, rounds: int) -> None:
    rows: list[list[object]] = []
    results = {}
    for size in _SIZES:
        make_photos(folder / f"{size[0]}x{size[1]}", max(count for _, count in _NETWORKS.values()), size)
    for name, (export, count) in _NETWORKS.items():
        path = folder / f"{name}.onnx"
        export(path)
        contestants: dict[str, Callable[[], float]] = {"model alone": _alone(path, count)}
        for size in _SIZES:
            photos = sorted((folder / f"{size[0]}x{size[1]}").iterdir())[:count]
            contestants[f"{size[0]}x{size[1]}"] = _job(path, photos, folder / "out", report=False)
            contestants[f"{size[0]}x{size[1]} with report"] = _job(path, photos, folder / "out", report=True)
        samples: dict[str, list[float]] = {key: [] for key in contestants}
        for _ in range(rounds):
            for key, seconds in samples.items():
                seconds.append(contestants[key]())
        results[name] = {"images": count, "seconds": samples}
        medians = {key: median(seconds) for key, seconds in samples.items()}
        for key, middle in medians.items():
            rows.append([f"{name}, {key}", f"{count / middle:.1f}", f"{medians['model alone'] / middle:.3f}"])
    print(table(["job", "images/s", "of the model alone"], rows))
    print(f"written to {save('folder', PACKAGES, results)}")


def _alone(path: Path, count: int) -> Callable[[], float]:
    """Return what runs the file, without anything around it, on ``count`` images, and tells the seconds."""
    explainer = fastcam.Explainer(path, threads=1)
    height, width = explainer.input_size
    noise = np.random.default_rng(0).integers(0, 256, (_BATCH, height, width, 3), dtype=np.uint8)
    images = explainer.prepare(list(noise))
    name = next(iter(explainer.signature[0]))

    def run() -> float:
        # Opened anew, as the job opens the file: two networks in memory at once slow each other down.
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        feed = {name: images}
        session.run(None, feed)
        begin = time.perf_counter()
        for _ in range(count // _BATCH):
            session.run(None, feed)
        return time.perf_counter() - begin

    return run


def _job(path: Path, photos: list[Path], out: Path, *, report: bool) -> Callable[[], float]:
    """Return what explains the photos, and tells the seconds from the first one read to the last file written."""

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        return fastcam.explain_files(path, photos, out, batch=_BATCH, report=report).seconds

    return run


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs of ``size`` (width, height): different cuts of four photos."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    sources = [Image.open(str(files("skimage") / "data" / name)).convert("RGB") for name in _PHOTOS]
    for number in range(count):
        photo = sources[number % len(sources)]
        scale = generator.uniform(0.6, 1) * min(photo.width / size[0], photo.height / size[1])
        width, height = (int(side * scale) for side in size)
        left, top = (int(generator.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
        photo.crop((left, top, left + width, top + height)).resize(size).save(folder / f"{number:06}.jpg", quality=90)


def _watch_memory(folder: Path, count: int) -> None:
    """Explain ``count`` small photos, each a file of its own, and print what stays in memory."""
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
    print(f"written to {save('folder_memory', PACKAGES, samples)}")


def _tiny() -> onnx.ModelProto:
    """Return a classifier of 32x32 images, so that a hundred thousand take minutes."""
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
