"""The CUDA kernels' bandwidth compared with that of the device's memory.

``python -m bench.gpu_kernel`` prints a table and writes results/gpu_kernel.json. It needs a CUDA device, and fastcam
built with nvcc; if CuPy is installed too, it also measures the kernels compiled by NVRTC.

Each sample is the time between two events on the stream, around the two launches of one `render`, after the L2
cache was overwritten. GB/s are the bytes of activations and weights read, and of maps, heatmaps and overlays written,
divided by that time; partial sums do not count. The ceiling is an on-device copy of 1 GiB, read and written,
interleaved with them. Before timing, the last image of each workload is compared with the specification.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcam.errors import FastcamError
from fastcam.kernels import reference
from fastcam.kernels.boundary import Weighting
from fastcam.kernels.cuda.interface import DeviceArray, DeviceKernels, DeviceOverlay, DeviceRender, DeviceType

from .harness import Timing, save, table

PACKAGES = ("fastcam", "numpy", "cupy-cuda13x", "nvidia-cuda-nvrtc")
COPIED_BYTES = 1 << 30
SIZE = (224, 224)
ROUNDS = 30


@dataclass(frozen=True)
class Workload:
    """Activations of `images` x `shape`, for `maps` targets each, to heatmaps of SIZE or to maps only."""

    images: int
    shape: tuple[int, int, int]
    maps: int = 1
    dtype: DeviceType = "float32"
    last: bool = False
    weighting: Weighting = "channel"
    draws: str = "maps"  # or "heatmaps", or "overlays" too

    @property
    def label(self) -> str:
        """Its label in tables."""
        c, h, w = self.shape
        layout = "NHWC" if self.last else "NCHW"
        return f"{self.images}x{c}x{h}x{w} {self.dtype} {layout} {self.weighting} K={self.maps} {self.draws}"


WORKLOADS = (
    Workload(1, (512, 14, 14), draws="heatmaps"),
    Workload(1, (512, 14, 14), 15, draws="heatmaps"),
    Workload(1, (2048, 7, 7), draws="overlays"),
    Workload(64, (2048, 7, 7), draws="heatmaps"),
    Workload(64, (512, 14, 14), draws="overlays"),
    Workload(1024, (512, 14, 14)),
    Workload(1024, (512, 14, 14), 4),
    Workload(1024, (512, 14, 14), 15),
    Workload(1024, (512, 14, 14), last=True),
    Workload(1024, (512, 14, 14), 15, last=True),
    Workload(2048, (512, 14, 14), dtype="float16"),
    Workload(2048, (512, 14, 14), dtype="bfloat16", last=True),
    Workload(1024, (2048, 7, 7)),
    Workload(2048, (2048, 7, 7), dtype="float16"),
    Workload(128, (256, 56, 56)),
    Workload(512, (512, 14, 14), weighting="pooled"),
    Workload(512, (512, 14, 14), weighting="element"),
)


class Runtime:
    """A stream, and memory that is freed together."""

    def __init__(self) -> None:
        from fastcam.kernels.cuda import _cuda

        self.calls = _cuda
        self.stream = _cuda.create_stream()
        # Long enough for the launches to be enqueued meanwhile, so that no interpreter time is measured.
        self._flushed = max(8 * _cuda.l2_bytes(0), COPIED_BYTES // 2)
        self._flush = _cuda.allocate(self._flushed)
        self._events = [_cuda.create_event(timed=True) for _ in range(2)]
        self._blocks: list[int] = []

    def allocate(self, shape: tuple[int, ...], dtype: DeviceType) -> DeviceArray:
        """Return memory that `released` frees."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "int64": 8}[dtype]
        pointer = self.calls.allocate(max(math.prod(shape) * width, 1))
        self._blocks.append(pointer)
        return DeviceArray(pointer, shape, dtype)

    def upload(self, array: NDArray[Any], dtype: DeviceType, shape: tuple[int, ...] | None = None) -> DeviceArray:
        """Copy an array, repeated along its first axis if `shape` is longer."""
        place = self.allocate(shape or array.shape, dtype)
        for first in range(0, place.shape[0], len(array)):
            part = np.ascontiguousarray(array[: place.shape[0] - first])
            target = place.pointer + first * array[:1].nbytes
            self.calls.copy_to_device(target, part.ctypes.data, part.nbytes, self.stream)
            self.calls.synchronize_stream(self.stream)
        return place

    def download(self, array: DeviceArray, dtype: type[np.generic]) -> NDArray[Any]:
        """Copy to the host, after all enqueued work."""
        result = np.empty(array.shape, dtype)
        self.calls.copy_to_host(result.ctypes.data, array.pointer, result.nbytes, self.stream)
        self.calls.synchronize_stream(self.stream)
        return result

    def time(self, run: Callable[[], None]) -> float:
        """Return seconds on the device, with a cold L2 cache."""
        start, end = self._events
        self.calls.fill(self._flush, 0, self._flushed, self.stream)
        self.calls.record_event(start, self.stream)
        run()
        self.calls.record_event(end, self.stream)
        self.calls.synchronize_event(end)
        return self.calls.elapsed_ms(start, end) / 1e3

    @contextmanager
    def released(self) -> Iterator[None]:
        """Free at the end whatever was allocated inside."""
        try:
            yield
        finally:
            self.calls.synchronize_stream(self.stream)
            blocks, self._blocks = self._blocks, []
            for pointer in blocks:
                self.calls.free(pointer)


@dataclass
class Inputs:
    """A few images of a workload on the host, repeated on the device, and the call that renders them."""

    call: DeviceRender
    activations: NDArray[np.float32]
    weights: NDArray[np.float32]
    moved_bytes: int = field(default=0)


def make_inputs(runtime: Runtime, kernels: DeviceKernels, workload: Workload) -> Inputs:
    """Random activations, zero for the ReLU's half, and weights."""
    rng = np.random.default_rng(0)
    (c, h, w), n, k = workload.shape, workload.images, workload.maps
    few = min(n, 8)
    memory = (h, w, c) if workload.last else (c, h, w)
    drawn, stored = _cast(np.maximum(rng.standard_normal((few, *memory), np.float32), 0), workload.dtype)
    shape = (k, c) if workload.weighting == "channel" else (k, *memory)
    weights = rng.standard_normal((few, *shape), np.float32)
    activations = runtime.upload(stored, workload.dtype, (n, *memory))
    uploaded = runtime.upload(weights, "float32", (n, *shape))
    logical = (n, k, c) if workload.weighting == "channel" else (n, k, c, h, w)
    needed = kernels.workspace_bytes((n, c, h, w), k, workload.weighting, channels_last=workload.last)
    call = DeviceRender(
        activations=DeviceArray(activations.pointer, (n, c, h, w), workload.dtype),
        channels_last=workload.last,
        weights=DeviceArray(uploaded.pointer, logical, "float32"),
        weighting=workload.weighting,
        normalize="max",
        maps=runtime.allocate((n, k, h, w), "float32"),
        heatmaps=None if workload.draws == "maps" else runtime.allocate((n, k, *SIZE), "float32"),
        overlay=_make_overlay(runtime, rng, n, k) if workload.draws == "overlays" else None,
        finite=runtime.allocate((n, k), "int32"),
        evidence=runtime.allocate((n, k), "float32"),
        workspace=runtime.allocate((needed,), "uint8"),
    )
    moved = stored[:1].nbytes * n + weights[:1].nbytes * n + 4 * math.prod(call.maps.shape)
    moved += 4 * math.prod(call.heatmaps.shape) if call.heatmaps else 0
    moved += (k + 1) * n * math.prod(SIZE) * 3 if call.overlay else 0
    if workload.last:
        drawn = np.moveaxis(drawn, -1, 1)
    return Inputs(call, drawn, weights, moved)


def _make_overlay(runtime: Runtime, rng: np.random.Generator, n: int, k: int) -> DeviceOverlay:
    images = runtime.upload(rng.integers(0, 256, (1, *SIZE, 3), np.uint8), "uint8", (n, *SIZE, 3))
    palette = runtime.upload(rng.integers(0, 256, (256, 3), np.uint8), "uint8")
    return DeviceOverlay(images, palette, 0.5, runtime.allocate((n, k, *SIZE, 3), "uint8"))


def _cast(values: NDArray[np.float32], dtype: DeviceType) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Return the values as a type holds them, and its bits."""
    if dtype == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32), bits
    stored = values.astype(dtype)
    return stored.astype(np.float32), stored


def check(runtime: Runtime, inputs: Inputs, workload: Workload) -> None:
    """Check the last image's maps against the specification."""
    maps = runtime.download(inputs.call.maps, np.float32)[-1]
    index = (workload.images - 1) % len(inputs.activations)
    weights = inputs.weights[index : index + 1]
    if workload.weighting != "channel" and workload.last:
        weights = np.moveaxis(weights, -1, -3)
    sums = reference.weighted_sum(inputs.activations[index : index + 1], weights, workload.weighting)
    expected = reference.normalized(np.maximum(sums, 0), "max")[0]
    error = float(np.linalg.norm(maps - expected) / np.linalg.norm(expected))
    if not (error <= 1e-5 and runtime.download(inputs.call.finite, np.int32).all()):
        raise SystemExit(f"{workload.label}: wrong maps, relative error {error}")


def measure(runtime: Runtime, backends: dict[str, DeviceKernels], workload: Workload) -> list[dict[str, Any]]:
    """Time the backends and a copy, interleaved."""
    with runtime.released():
        inputs = make_inputs(runtime, next(iter(backends.values())), workload)
        source, target = (runtime.allocate((COPIED_BYTES,), "uint8").pointer for _ in range(2))
        runs: dict[str, Callable[[], None]] = {
            "copy": lambda: runtime.calls.copy_on_device(target, source, COPIED_BYTES, runtime.stream)
        }
        for name, kernels in backends.items():
            runs[name] = partial(kernels.render, inputs.call, runtime.stream)
            runs[name]()
            check(runtime, inputs, workload)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS + 3):
            for name, run in runs.items():
                seconds = runtime.time(run)
                if turn >= 3:  # warm
                    samples[name].append(seconds)
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    ceiling = 2 * COPIED_BYTES / timings["copy"].median / 1e9
    return [
        {
            "workload": workload.label,
            "backend": name,
            "us": timings[name].median * 1e6,
            "GB/s": inputs.moved_bytes / timings[name].median / 1e9,
            "copy GB/s": ceiling,
            "share": inputs.moved_bytes / timings[name].median / 1e9 / ceiling,
            "samples": {"render": timings[name].samples, "copy": timings["copy"].samples},
        }
        for name in backends
    ]


def open_backends() -> dict[str, DeviceKernels]:
    """Return the kernels compiled by nvcc, and those by NVRTC if CuPy is installed."""
    from fastcam.kernels.cuda.native import CudaKernels

    backends: dict[str, DeviceKernels] = {"nvcc": CudaKernels()}
    if importlib.util.find_spec("cupy") is not None:
        from fastcam.kernels.cuda.nvrtc import NvrtcKernels

        backends["nvrtc"] = NvrtcKernels()
    return backends


def main() -> None:
    try:
        runtime, backends = Runtime(), open_backends()
    except ImportError:
        raise SystemExit("bench.gpu_kernel needs fastcam built with nvcc") from None
    except FastcamError as error:
        raise SystemExit(f"bench.gpu_kernel needs a CUDA device: {error}") from None
    device = {"name": runtime.calls.device_name(0), "compute capability": runtime.calls.compute_capability(0)}
    device |= {"l2 bytes": runtime.calls.l2_bytes(0), "driver and runtime": runtime.calls.versions()}
    print(device["name"])
    results = [result for workload in WORKLOADS for result in measure(runtime, backends, workload)]
    rows = [
        [
            result["workload"],
            result["backend"],
            *(f"{result[name]:.0f}" for name in ("us", "GB/s", "copy GB/s")),
            f"{result['share']:.0%}",
        ]
        for result in results
    ]
    print(table(["workload", "backend", "us", "GB/s", "copy GB/s", "share"], rows))
    print(f"written to {save('gpu_kernel', PACKAGES, {'device': device, 'measurements': results})}")


if __name__ == "__main__":
    main()
