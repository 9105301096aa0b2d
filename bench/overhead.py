"""The cost of a heatmap on top of the prediction.

Scores + heatmap (an Explainer called with a preprocessed batch) and the plain forward pass of the same network, both in
ONNX Runtime in this process, in turn. Before timing, both must give the same scores, and the heatmap must not be
empty. The plain network of keras.applications is the part of the exported file that computes the logits; the
question `export` compares its speed with other exporters' files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnx.utils import extract_model

import fastcam

from . import plots
from .harness import Case, Measurement, Pace, Record, Settings, figures, interleave, markdown
from .networks import CLASSES, Floats, drawn_images, export_keras, lite0, tiny, vgg16
from .runtimes import open_session

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "scores + heatmap compared with the plain forward pass in the same runtime"
PACKAGES = ("fastcam", "numpy", "onnxruntime", "tensorflow", "tensorflow-cpu", "keras")
PLAIN = "plain"
_COUNTS = (1, 5, CLASSES)
_BATCHES = (1, 4, 16)
# The function that writes the explained file, and about how many seconds an image takes on two cores.
_NETWORKS: dict[str, tuple[Callable[[Path], object], float]] = {
    "VGG16": (lambda path: fastcam.export(vgg16().to_onnx(), path), 0.28),
    "MobileNetV2": (lambda path: export_keras("MobileNetV2", path), 0.02),
    "ResNet50": (lambda path: export_keras("ResNet50", path), 0.07),
    "EfficientNetB0": (lambda path: export_keras("EfficientNetB0", path), 0.035),
    "EfficientNet-Lite0": (lambda path: fastcam.export(lite0(), path), 0.02),
}
_TINY: dict[str, tuple[Callable[[Path], object], float]] = {
    "tiny": (lambda path: fastcam.export(tiny().to_onnx(), path), 0.0)
}


def cases(settings: Settings) -> list[Case]:
    networks = _TINY if settings.quick else _NETWORKS
    return [
        # The first case of a network waits for the export. Three rounds and a warm-up of each contestant.
        Case(
            f"{network}, batch {batch}",
            2 + (15 if batch == 1 else 0) + 4 * seconds * batch * (1 + len(_COUNTS)),
            _measuring(settings, network, export, batch),
        )
        for batch in _BATCHES
        for network, (export, seconds) in networks.items()
    ]


def _measuring(
    settings: Settings, network: str, export: Callable[[Path], object], batch: int
) -> Callable[[float], Measurement]:
    return lambda allowance: _measure(settings, network, export, batch, allowance)


def _measure(
    settings: Settings, network: str, export: Callable[[Path], object], batch: int, allowance: float
) -> Measurement:
    begin = time.perf_counter()
    explained, plain = (settings.folder / f"{network}-{kind}.onnx" for kind in ("explained", "plain"))
    if not explained.exists():
        export(explained)
        _extract_logits(explained, plain)
    session = open_session(plain, settings.threads)
    explainer = fastcam.Explainer(explained, threads=settings.threads)
    name = session.get_inputs()[0].name
    images = drawn_images(batch, session.get_inputs()[0].shape[1:])
    _validate(session, explainer, images[:1])
    contestants: dict[str, Callable[[], object]] = {PLAIN: lambda: session.run(None, {name: images})}
    contestants |= {f"K = {count}": _explaining(explainer, images, count) for count in _COUNTS}
    for run in contestants.values():
        run()
    return Measurement.of(interleave(contestants, Pace(allowance - (time.perf_counter() - begin), turn=0.3)))


def _explaining(explainer: fastcam.Explainer, images: Floats, count: int) -> Callable[[], object]:
    return lambda: explainer(images, None if count == 1 else f"top{count}")


def _extract_logits(explained: Path, plain: Path) -> None:
    inputs = [value.name for value in onnx.load(explained, load_external_data=False).graph.input]
    extract_model(explained, plain, [name for name in inputs if name != "target"], ["logits"])


def _validate(plain: onnxruntime.InferenceSession, explainer: fastcam.Explainer, images: Floats) -> None:
    found = explainer(images)
    (logits,) = plain.run(None, {plain.get_inputs()[0].name: images})
    if not np.allclose(found.logits, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max()):
        sys.exit("the explained file gives different scores than its forward part")
    if not (np.isfinite(found.heatmaps).all() and found.heatmaps.max() > 0.5):
        sys.exit("the heatmap is empty")


def overheads(record: Record, key: str) -> dict[str, float]:
    """Return the ratio of medians to the plain pass, by number of classes."""
    medians = record.medians(key)
    return {name: seconds / medians[PLAIN] for name, seconds in medians.items() if name != PLAIN}


def write(record: Record) -> str:
    names = [f"K = {count}" for count in _COUNTS]
    rows = []
    for key in record.cases:
        low, high = record.spread(key, PLAIN)
        plain = f"{figures(record.medians(key)[PLAIN] * 1e3)} ({figures(low * 1e3)}..{figures(high * 1e3)})"
        found = overheads(record, key)
        rows.append([key, plain, *(f"{found[name]:.3f}" for name in names)])
    return markdown(["network", "plain forward pass, ms (quartiles)", *(f"with {name}" for name in names)], rows)


def draw(record: Record) -> Figure:
    panels = []
    for count in _COUNTS:
        name = f"K = {count}"
        shares = {key: 100 * (overheads(record, key)[name] - 1) for key in record.cases}
        panels.append(
            plots.Panel(f"heatmaps of {count} classes" if count > 1 else "heatmap of the top class", shares, unit="%")
        )
    return plots.bars(panels, "% on top of the plain forward pass", columns=3, best="")
