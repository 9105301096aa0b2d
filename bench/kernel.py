"""The kernels compared with the memory bandwidth, and with NumPy, cv2 and torch.

Bandwidth: bytes of activations and weights divided by the time of a whole `render` at layer size, for batches far
larger than the last-level cache. The ceiling is `read_bandwidth.cpp`, compiled for this machine, on the same memory
with the same number of threads: the fastest of several prefetch distances. A NumPy reduction would not do: it runs on
one thread and adds.

Heatmaps: one image, from activations to a heatmap or an overlay of 224 x 224.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastcam import kernels
from fastcam.kernels import reference
from fastcam.kernels.boundary import Weighting

from . import plots
from .harness import Case, Measurement, Pace, Record, Settings, Timing, figures, interleave, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "GB/s against the memory's, and one heatmap compared with NumPy, cv2 and torch"
PACKAGES = ("fastcam", "numpy", "opencv-python-headless", "torch")
PREFETCH_DISTANCES = (0, 512, 1024, 4096)
SIZE = (224, 224)
_RENDER = "render"


@dataclass(frozen=True)
class Workload:
    """Activations of `images` x `shape`, for `maps` targets each."""

    images: int
    shape: tuple[int, int, int]
    maps: int
    dtype: str = "float32"
    layout: str = "NCHW"
    weighting: Weighting = "channel"

    @property
    def label(self) -> str:
        """Its label in tables."""
        c, h, w = self.shape
        return f"{self.images}x{c}x{h}x{w} {self.dtype} {self.layout} {self.weighting} K={self.maps}"


WORKLOADS = (
    Workload(512, (512, 14, 14), 1),
    Workload(512, (512, 14, 14), 15),
    Workload(512, (512, 14, 14), 1, layout="NHWC"),
    Workload(512, (512, 14, 14), 15, layout="NHWC"),
    Workload(1024, (512, 14, 14), 1, dtype="float16"),
    Workload(1024, (512, 14, 14), 15, dtype="float16"),
    Workload(1024, (512, 14, 14), 1, dtype="float16", layout="NHWC"),
    Workload(1024, (1280, 7, 7), 1),
    Workload(64, (256, 56, 56), 1),
    Workload(256, (512, 14, 14), 1, weighting="pooled"),
    Workload(256, (512, 14, 14), 1, weighting="element"),
)


class ReadBandwidth:
    """`read_bandwidth.cpp`, compiled for this processor."""

    def __init__(self, threads: int) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++")
        if compiler is None:
            sys.exit("bench.kernel needs a C++ compiler: install one, or name it in CXX")
        self._threads = threads
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "read_bandwidth.so"
            source = Path(__file__).with_name("read_bandwidth.cpp")
            options = ["-std=c++17", "-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *options, "-o", library, source], check=True)
            self._fold = ctypes.CDLL(str(library)).fold_memory
        self._fold.restype = ctypes.c_uint64
        self._fold.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]

    def bytes_of(self, array: NDArray[Any]) -> int:
        """How much of the array is read: all except a remainder of a few hundred bytes."""
        step = 256 * self._threads
        return array.nbytes // step * step

    def read(self, array: NDArray[Any], prefetch_ahead: int = 0) -> int:
        """Exclusive or of all 64-bit words."""
        return int(self._fold(array.ctypes.data, self.bytes_of(array), self._threads, prefetch_ahead))

    def validate(self, array: NDArray[Any]) -> None:
        """Check that every byte is read."""
        words = np.frombuffer(array.reshape(-1).view(np.uint8)[: self.bytes_of(array)], np.uint64)
        expected = int(np.bitwise_xor.reduce(words))
        for prefetch_ahead in PREFETCH_DISTANCES:
            if self.read(array, prefetch_ahead) != expected:
                sys.exit("read_bandwidth.cpp did not read every byte")


def make_inputs(workload: Workload) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random activations, zero for the ReLU's half, and weights; in the workload's memory layout."""
    rng = np.random.default_rng(0)
    c, h, w = workload.shape
    n, k = workload.images, workload.maps
    weights_shape = (n, k, c) if workload.weighting == "channel" else (n, k, c, h, w)
    memory_shape = (n, c, h, w) if workload.layout == "NCHW" else (n, h, w, c)
    # A few images repeated: drawing all of them takes longer than the benchmark.
    drawn = np.maximum(rng.standard_normal((8, *memory_shape[1:]), np.float32), 0).astype(workload.dtype)
    activations = np.tile(drawn, (-(-n // 8), 1, 1, 1))[:n]
    weights = np.tile(
        rng.standard_normal((8, *weights_shape[1:]), np.float32), (-(-n // 8), *[1] * (len(weights_shape) - 1))
    )[:n]
    if workload.layout == "NHWC":
        activations = activations.transpose(0, 3, 1, 2)
    return activations, np.ascontiguousarray(weights)


def check(activations: NDArray[Any], weights: NDArray[Any], weighting: Weighting, maps: NDArray[np.float32]) -> None:
    """Check the last image's maps against the specification."""
    expected = reference.KERNELS.render(activations[-1:], weights[-1:], weighting=weighting).maps[0]
    error = float(np.linalg.norm(maps[-1] - expected) / np.linalg.norm(expected))
    if not error <= 1e-5:
        sys.exit(f"wrong maps: relative error {error}")


def measure_bandwidth(workload: Workload, threads: int, allowance: float) -> Measurement:
    """Time `render` and plain reading, interleaved."""
    begin = time.perf_counter()
    reader = ReadBandwidth(threads)
    activations, weights = make_inputs(workload)
    largest = max((activations, weights), key=lambda array: array.nbytes)
    memory = largest.transpose(0, 2, 3, 1) if workload.layout == "NHWC" and largest is activations else largest
    outputs = kernels.render(activations, weights, weighting=workload.weighting, threads=threads)
    check(activations, weights, workload.weighting, outputs.maps)
    reader.validate(memory)

    def render() -> None:
        kernels.render(
            activations,
            weights,
            weighting=workload.weighting,
            threads=threads,
            maps_out=outputs.maps,
            heatmaps_out=outputs.heatmaps,
        )

    def reading(prefetch_ahead: int) -> Callable[[], object]:
        return lambda: reader.read(memory, prefetch_ahead)

    timings = interleave(
        {_RENDER: render, **{f"read, prefetch {ahead}": reading(ahead) for ahead in PREFETCH_DISTANCES}},
        # No threads spin here.
        Pace(allowance - (time.perf_counter() - begin), least=5, turn=0.1, settle=0),
    )
    facts = {
        "rendered_bytes": activations.nbytes + weights.nbytes,
        "read_bytes": reader.bytes_of(memory),
        "maps": workload.images * workload.maps,
        "kernels": kernels.describe(),
    }
    return Measurement.of(timings, facts=facts)


def numpy_heatmap(activations: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.float32]:
    """Grad-CAM of one image and class in typical NumPy code, float32 throughout."""
    cam = np.maximum(np.tensordot(weights[0, 0], activations[0], 1), 0)
    cam /= cam.max()
    for axis, outputs in enumerate(SIZE):
        inputs = cam.shape[axis]
        at = np.clip((np.arange(outputs, dtype=np.float32) + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
        low = at.astype(np.intp)
        high = np.minimum(low + 1, inputs - 1)
        fraction = np.expand_dims(at - low, 1 - axis)
        cam = cam.take(low, axis) * (1 - fraction) + cam.take(high, axis) * fraction
    return cam.astype(np.float32, copy=False)


def numpy_overlay(
    heatmap: NDArray[np.float32], image: NDArray[np.uint8], palette: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Colour and blend."""
    colors = palette[np.rint(255 * heatmap).astype(np.uint8)]
    return np.rint(0.5 * image + 0.5 * colors).astype(np.uint8)


def cv2_contestants(
    activations: NDArray[Any], weights: NDArray[Any], image: NDArray[np.uint8], palette: NDArray[np.uint8]
) -> dict[str, Callable[[], Any]]:
    """The pipeline of most Grad-CAM code: NumPy for the sum, cv2 for the rest. Empty if cv2 is missing."""
    try:
        import cv2
    except ImportError:
        return {}
    table_of_colors = palette.reshape(256, 1, 3)

    def heatmap() -> Any:
        cam = np.maximum(np.tensordot(weights[0, 0], activations[0], 1), 0)
        return cv2.resize(cam / cam.max(), SIZE[::-1], interpolation=cv2.INTER_LINEAR)

    def overlay() -> Any:
        colors = cv2.applyColorMap((heatmap() * 255 + 0.5).astype(np.uint8), table_of_colors)
        return cv2.addWeighted(image, 0.5, colors, 0.5, 0)

    return {"cv2 heatmap": heatmap, "cv2 overlay": overlay}


def torch_heatmap(activations: NDArray[Any], weights: NDArray[Any]) -> dict[str, Callable[[], Any]]:
    """The same in torch, without gradients. Empty if torch is missing."""
    try:
        import torch
    except ImportError:
        return {}
    maps, alphas = torch.from_numpy(activations), torch.from_numpy(weights)

    def heatmap() -> Any:
        with torch.inference_mode():
            cam = torch.relu(torch.einsum("nkc,nchw->nkhw", alphas, maps))
            cam /= cam.amax((2, 3), keepdim=True)
            return torch.nn.functional.interpolate(cam, SIZE, mode="bilinear")[0, 0].numpy()

    return {"torch heatmap": heatmap}


def measure_heatmaps(shape: tuple[int, int, int], allowance: float) -> Measurement:
    """Time one heatmap and one overlay of 224 x 224 by each pipeline."""
    activations, weights = make_inputs(Workload(1, shape, 1))
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (1, *SIZE, 3), np.uint8)
    palette = rng.integers(0, 256, (256, 3), np.uint8)
    outputs = kernels.render(activations, weights, size=SIZE, images=images, palette=palette)
    buffers: dict[str, Any] = {"maps_out": outputs.maps, "heatmaps_out": outputs.heatmaps}
    contestants: dict[str, Callable[[], Any]] = {
        "fastcam heatmap": lambda: kernels.render(activations, weights, size=SIZE, **buffers).heatmaps[0, 0],
        "numpy heatmap": lambda: numpy_heatmap(activations, weights),
        **torch_heatmap(activations, weights),
        "fastcam overlay": lambda: (
            kernels.render(
                activations,
                weights,
                size=SIZE,
                images=images,
                palette=palette,
                overlays_out=outputs.overlays,
                **buffers,
            ).overlays
        ),
        "numpy overlay": lambda: numpy_overlay(numpy_heatmap(activations, weights), images[0], palette),
        **cv2_contestants(activations, weights, images[0], palette),
    }
    expected = reference.KERNELS.render(activations, weights, size=SIZE).heatmaps[0, 0]
    for name, run in contestants.items():
        if name.endswith("heatmap") and not np.abs(run() - expected).max() <= 1e-4:
            sys.exit(f"{name}: wrong values")
    return Measurement.of(interleave(contestants, Pace(allowance, least=5, turn=0.05, settle=0.02), repeats=20))


def cases(settings: Settings) -> list[Case]:
    shapes = ((1280, 7, 7), (512, 14, 14), (2048, 7, 7))
    if settings.quick:
        return [_bandwidth_case(Workload(16, (32, 7, 7), 2), settings.threads), _heatmap_case(shapes[0])]
    heatmaps = [_heatmap_case(shape) for shape in shapes]
    return [*heatmaps, *(_bandwidth_case(workload, settings.threads) for workload in WORKLOADS)]


def _bandwidth_case(workload: Workload, threads: int) -> Case:
    return Case(workload.label, 5, lambda allowance: measure_bandwidth(workload, threads, allowance))


def _heatmap_case(shape: tuple[int, int, int]) -> Case:
    key = f"one image, activations {'x'.join(map(str, shape))}"
    return Case(key, 3, lambda allowance: measure_heatmaps(shape, allowance))


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of a workload: of the kernel, and of the fastest plain reading."""

    rendered: float
    read: float

    @classmethod
    def of(cls, record: Record, key: str) -> Bandwidth:
        """Compute it from medians."""
        medians, facts = record.medians(key), record.cases[key]["facts"]
        fastest = min(seconds for name, seconds in medians.items() if name != _RENDER)
        return cls(facts["rendered_bytes"] / medians[_RENDER] / 1e9, facts["read_bytes"] / fastest / 1e9)


def _kinds(record: Record) -> tuple[list[str], list[str]]:
    """Return the bandwidth cases, and those of single heatmaps."""
    bandwidth = [key for key, case in record.cases.items() if _RENDER in case["samples"]]
    return bandwidth, [key for key in record.cases if key not in bandwidth]


def write(record: Record) -> str:
    bandwidth, single = _kinds(record)
    parts = []
    if bandwidth:
        rows = []
        for key in bandwidth:
            found = Bandwidth.of(record, key)
            samples = record.cases[key]["samples"][_RENDER]
            low, high = Timing(tuple(samples)).spread
            each = record.medians(key)[_RENDER] / record.cases[key]["facts"]["maps"]
            rows.append([
                key, f"{found.rendered:.1f}", f"{found.read:.1f}", f"{found.rendered / found.read:.0%}",
                figures(each * 1e6), f"{figures(low * 1e3)}..{figures(high * 1e3)}",
            ])  # fmt: skip
        header = ["images x activations", "GB/s", "plain reading, GB/s", "share", "us per map", "ms, quartiles"]
        parts.append(markdown(header, rows))
    if single:
        names = list(dict.fromkeys(name for key in single for name in record.cases[key]["samples"]))
        rows = [
            [
                name,
                *(figures(record.medians(key)[name] * 1e6) if name in record.medians(key) else "-" for key in single),
            ]
            for name in names
        ]
        parts.append(markdown(["us for one 224 x 224", *single], rows))
    return "\n\n".join(parts)


def draw(record: Record) -> Figure:
    bandwidth, single = _kinds(record)
    panels = []
    if bandwidth:
        shares = {key: 100 * found.rendered / found.read for key in bandwidth for found in [Bandwidth.of(record, key)]}
        panels.append(plots.Panel("kernel's share of the measured read bandwidth, %", shares, unit="%"))
    if single:
        micros = {name: 1e6 * seconds for name, seconds in record.medians(single[0]).items()}
        panels.append(plots.Panel(f"{single[0]}, us", micros, "fastcam", unit=""))
    return plots.bars(panels, "", best="")
