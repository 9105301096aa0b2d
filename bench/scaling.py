"""How the cost of a heatmap grows: with batch size, image size, channels, classes and threads.

Plain forward pass and scores + heatmap in turn, as in `overhead`, for a small VGG with one size varied.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import fastcam

from . import plots
from .contestants import Models
from .harness import Case, Measurement, Pace, Record, Settings, figures, interleave, markdown
from .networks import Vgg, drawn_images, small, tiny
from .runtimes import ONNX_RUNTIME, RUNTIMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "batch size 1..64, image size, channels, number of classes, threads"
PACKAGES = ("fastcam", "numpy", "onnxruntime")
PLAIN, EXPLAINED = "plain forward pass", "scores + heatmap"


@dataclass(frozen=True)
class Workload:
    """A network and how it is called."""

    network: Vgg
    threads: int
    batch: int = 1
    targets: int = 1


def cases(settings: Settings) -> list[Case]:
    base = replace(tiny() if settings.quick else small(), classes=100)
    threads = settings.threads
    axes: dict[str, list[tuple[float, Workload]]] = {
        "images in a batch": [(n, Workload(base, threads, batch=n)) for n in (1, 2, 4, 8, 16, 32, 64)],
        "classes explained": [(k, Workload(base, threads, targets=k)) for k in (1, 2, 5, 10, 20, 50, 100)],
        "height and width of the image": [
            (side, Workload(replace(base, side=side), threads)) for side in (32, 64, 128, 256)
        ],
        "channels of the explained layer": [
            (times * base.blocks[-1][0], Workload(_wider(base, times), threads)) for times in (0.5, 1, 2, 4)
        ],
        "threads": [(count, Workload(base, count)) for count in _powers_of_two(threads)],
    }
    if settings.quick:
        axes = {axis: workloads[:2] for axis, workloads in list(axes.items())[:2]}
    # Every second point first: a run that is cut short still shows the trend.
    points = [
        (axis, size, workload, number) for axis, found in axes.items() for number, (size, workload) in enumerate(found)
    ]
    return [
        _case(settings, axis, size, workload)
        for axis, size, workload, _ in sorted(points, key=lambda point: point[3] % 2)
    ]


def _wider(network: Vgg, times: float) -> Vgg:
    return replace(network, blocks=tuple((int(filters * times), depth) for filters, depth in network.blocks))


def _powers_of_two(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts


def _case(settings: Settings, axis: str, size: float, workload: Workload) -> Case:
    return Case(f"{axis}: {size:g}", 1.5, lambda allowance: _measure(settings, workload, allowance))


def _measure(settings: Settings, workload: Workload, allowance: float) -> Measurement:
    begin = time.perf_counter()
    network = workload.network
    folder = settings.folder / f"scaling-{time.monotonic_ns()}"
    folder.mkdir()
    models = Models(network, folder, workload.threads)
    images = drawn_images(workload.batch, (network.channels, network.side, network.side))
    plain = RUNTIMES[ONNX_RUNTIME].make(models, images)
    explainer, target = models.explainer, f"top{workload.targets}"
    _validate(explainer(images, target, batch_size=workload.batch))
    contestants: dict[str, Callable[[], object]] = {
        PLAIN: plain,
        EXPLAINED: lambda: explainer(images, target, batch_size=workload.batch),
    }
    plain()
    return Measurement.of(
        interleave(contestants, Pace(allowance - (time.perf_counter() - begin), turn=0.1, settle=0.05))
    )


def _validate(found: fastcam.Explanation) -> None:
    if not found.heatmaps.max() > 0.5:
        sys.exit("the heatmap is empty")


def _axes(record: Record) -> dict[str, list[tuple[float, str]]]:
    """Return sizes and keys by axis, in order."""
    found: dict[str, list[tuple[float, str]]] = {}
    for key in record.cases:
        axis, _, size = key.rpartition(": ")
        found.setdefault(axis, []).append((float(size), key))
    return {axis: sorted(points) for axis, points in found.items()}


def write(record: Record) -> str:
    rows = []
    for points in _axes(record).values():
        for _, key in points:
            medians = record.medians(key)
            low, high = record.spread(key, EXPLAINED)
            explained = f"{figures(medians[EXPLAINED] * 1e3)} ({figures(low * 1e3)}..{figures(high * 1e3)})"
            rows.append([key, figures(medians[PLAIN] * 1e3), explained, f"{medians[EXPLAINED] / medians[PLAIN]:.3f}"])
    return markdown(["", f"{PLAIN}, ms", f"{EXPLAINED}, ms (quartiles)", "ratio"], rows)


def draw(record: Record) -> Figure:
    panels = []
    for axis, points in _axes(record).items():
        names = (PLAIN, EXPLAINED)
        lines = {name: [(size, 1e3 * record.medians(key)[name]) for size, key in points] for name in names}
        panels.append(plots.Curves(axis, axis, lines, EXPLAINED))
    return plots.curves(panels, "ms")
