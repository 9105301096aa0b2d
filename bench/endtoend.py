"""The cost of a folder of photos from JPEG to overlay, compared with the model alone and a pytorch-grad-cam script.

`fastcam.explain_files` over photos on disk and, in turns, the same file's scores and heatmap weights for the same
number of images already in memory. The model alone has all threads and the job's batch size; opening the file counts
for neither. The script follows pytorch-grad-cam's tutorials: read, resize, explain in batches, overlay, write, with the
same VGG16 in torch.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import fastcam

from . import plots, shims
from .harness import Case, Measurement, Record, Settings, figures, markdown
from .networks import Vgg, export_keras, lite0, tiny, vgg16
from .peers import why_missing
from .runtimes import open_session

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "images/s from a folder of JPEGs to overlays on disk, against the model alone"
PACKAGES = ("fastcam", "numpy", "onnxruntime", "pillow", "torch", "grad-cam", "opencv-python-headless")
ALONE, JOB, REPORT, SCRIPT = "model alone", "fastcam.explain_files", "with report.html", "script, pytorch-grad-cam"
_PHOTOS = ("chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg")
_BATCH = 8
_SIZE, _SMALL = (500, 375), (320, 240)

# A run of a contestant: seconds per image.
Run = Callable[[], float]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        network = tiny()
        return [Case("tiny", 5, _measuring(settings, "tiny", _exporting(network), 16, network))]
    # The number of photos fills batches for two processors evenly: a lone last batch would run on one of them.
    return [
        Case("VGG16", 200, _measuring(settings, "VGG16", _exporting(vgg16()), 64, vgg16())),
        Case("EfficientNet-Lite0", 30, _measuring(settings, "EfficientNet-Lite0", _export_lite0, 192, None)),
        Case("MobileNetV2", 40, _measuring(settings, "MobileNetV2", _export_mobilenet, 192, None)),
        Case(
            "MobileNetV2, photos of 320 x 240",
            40,
            _measuring(settings, "MobileNetV2-small", _export_mobilenet, 192, None, _SMALL),
        ),
    ]


def _exporting(network: Vgg) -> Callable[[Path], object]:
    return lambda path: fastcam.export(network.to_onnx(), path, preprocess="imagenet")


def _export_lite0(path: Path) -> None:
    fastcam.export(lite0(), path, preprocess="imagenet")


def _export_mobilenet(path: Path) -> None:
    export_keras("MobileNetV2", path)


def _measuring(
    settings: Settings,
    name: str,
    export: Callable[[Path], object],
    count: int,
    network: Vgg | None,
    size: tuple[int, int] = _SIZE,
) -> Callable[[float], Measurement]:
    return lambda allowance: _measure(settings, name, export, count, network, size, allowance)


def _measure(
    settings: Settings,
    name: str,
    export: Callable[[Path], object],
    count: int,
    network: Vgg | None,
    size: tuple[int, int],
    allowance: float,
) -> Measurement:
    begin = time.perf_counter()
    path, out = settings.folder / f"{name}.onnx", settings.folder / "out"
    export(path)
    photos = make_photos(settings.folder / f"photos-{name}", count, size)
    contestants: dict[str, Run] = {
        ALONE: _alone(path, count, settings.threads),
        JOB: _job(path, photos, out, report=False),
        REPORT: _job(path, photos, out, report=True),
    }
    missing: dict[str, str] = {}
    if network is not None:
        try:
            # Five times slower: fewer photos.
            contestants[SCRIPT] = _script(network, photos[: max(_BATCH, count // 3)], out, settings.threads)
        except Exception as error:  # noqa: BLE001  # whatever the peer raises is reported
            missing[SCRIPT] = why_missing(error)
    for run in contestants.values():
        run()
    samples: dict[str, list[float]] = {key: [] for key in contestants}
    rounds = 0
    # The runs time themselves: preparation does not count.
    while rounds < 3 or (time.perf_counter() - begin) * (rounds + 2) / (rounds + 1) < allowance:
        for key, values in samples.items():
            values.append(contestants[key]())
        rounds += 1
    facts = {"images": count, "photos": f"{size[0]} x {size[1]} JPEG", "batch": _BATCH}
    return Measurement(samples, facts, missing, unit="s/image")


def _alone(path: Path, count: int, threads: int) -> Run:
    """Return a function that runs only the file."""
    explainer = fastcam.Explainer(path, threads=1)
    height, width = explainer.input_size
    channels = [3, height, width] if explainer.input_layout == "NCHW" else [height, width, 3]
    images = np.random.default_rng(0).normal(size=(_BATCH, *channels)).astype(np.float32)
    name = next(iter(explainer.signature[0]))

    def run() -> float:
        # Opened again, as the job opens the file: two networks in memory at once slow each other down.
        session = open_session(path, threads)
        feed = {name: images}
        session.run(None, feed)
        begin = time.perf_counter()
        for _ in range(count // _BATCH):
            session.run(None, feed)
        return (time.perf_counter() - begin) / (count // _BATCH * _BATCH)

    return run


def _job(path: Path, photos: Sequence[Path], out: Path, *, report: bool) -> Run:
    """Return a function that explains the photos, from reading the first one to writing the last file."""

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        seconds = fastcam.explain_files(path, list(photos), out, batch_size=_BATCH, report=report).seconds
        if len(list((out / "overlays").iterdir())) != len(photos):
            sys.exit("fastcam.explain_files did not write an overlay for each photo")
        return seconds / len(photos)

    return run


def _script(network: Vgg, photos: Sequence[Path], out: Path, threads: int) -> Run:
    """Return a function that explains the photos with pytorch-grad-cam, batch by batch."""
    shims.install()
    import torch
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image

    torch.set_num_threads(threads)
    features, head = network.to_torch()
    method = GradCAM(torch.nn.Sequential(*features, *head), [features[-1]])
    mean, scale = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        begin = time.perf_counter()
        for start in range(0, len(photos), _BATCH):
            batch = photos[start : start + _BATCH]
            pictures = [np.asarray(Image.open(photo).convert("RGB"), np.float32) / 255 for photo in batch]
            resized = [_resized(picture, (network.side, network.side)) for picture in pictures]
            tensor = torch.from_numpy(np.stack([(each - mean) / scale for each in resized]).transpose(0, 3, 1, 2))
            # None: the top class of each.
            for photo, picture, heatmap in zip(batch, pictures, method(tensor.contiguous(), None), strict=True):
                overlay = show_cam_on_image(picture, _resized(heatmap, picture.shape[:2]), use_rgb=True)
                Image.fromarray(overlay).save(out / photo.name)
        return (time.perf_counter() - begin) / len(photos)

    return run


def _resized(picture: Any, size: tuple[int, int]) -> Any:
    import cv2

    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_LINEAR)


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write JPEGs of ``size`` (width, height): different crops of four photos."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    sources = [Image.open(str(files("skimage") / "data" / name)).convert("RGB") for name in _PHOTOS]
    paths = []
    for number in range(count):
        photo = sources[number % len(sources)]
        scale = generator.uniform(0.6, 1) * min(photo.width / size[0], photo.height / size[1])
        width, height = (int(side * scale) for side in size)
        left, top = (int(generator.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
        paths.append(folder / f"{number:06}.jpg")
        photo.crop((left, top, left + width, top + height)).resize(size).save(paths[-1], quality=90)
    return paths


def shares(record: Record, key: str) -> dict[str, float]:
    """Return images/s relative to the model alone."""
    medians = record.medians(key)
    return {name: medians[ALONE] / seconds for name, seconds in medians.items()}


def write(record: Record) -> str:
    rows: list[list[object]] = []
    for key in record.cases:
        for name, share in shares(record, key).items():
            low, high = record.spread(key, name)
            rate = 1 / record.medians(key)[name]
            rows.append(
                [f"{key}, {name}", f"{figures(rate)} ({figures(1 / high)}..{figures(1 / low)})", f"{share:.3f}"]
            )
    return markdown(["photos of 500 x 375 unless noted", "images/s (quartiles)", "of the model alone"], rows)


def draw(record: Record) -> Figure:
    panels = []
    for key in record.cases:
        rates = {name: 1 / seconds for name, seconds in record.medians(key).items()}
        panels.append(plots.Panel(f"{key}, images/s", rates, JOB, unit=""))
    return plots.bars(panels, "images/s", best="high")
