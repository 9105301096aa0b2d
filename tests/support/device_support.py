"""A `DeviceKernels` behind the interface of the CPU backends, so that the same cases test both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcam.arrays import Floats, Pixels
from fastcam.kernels.boundary import Kernels, MapCall, Overlay
from fastcam.kernels.cuda.interface import (
    DeviceArray,
    DeviceKernels,
    DeviceOverlay,
    DevicePrepare,
    DeviceRender,
    DeviceType,
)


class DeviceMemory(ABC):
    """Device memory for one call of a test, with uploads and downloads."""

    stream = 0

    @abstractmethod
    def allocate(self, shape: Sequence[int], dtype: DeviceType) -> DeviceArray:
        """Memory filled with NaN or other implausible values."""

    @abstractmethod
    def upload(self, array: NDArray[Any], dtype: DeviceType | None = None) -> DeviceArray:
        """A copy, in the array's own order."""

    @abstractmethod
    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A copy, after all work on the stream; bfloat16 as uint16."""


def numpy_type(dtype: DeviceType) -> np.dtype[Any]:
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


class HostedKernels(Kernels):
    """Uploads, runs, downloads."""

    def __init__(self, name: str, kernels: DeviceKernels, memory: DeviceMemory) -> None:
        self._name = name
        self.device = kernels
        self.memory = memory

    def first_not_finite(self, array: Floats) -> int | None:
        finite = self.memory.allocate(array.shape[:1], "int32")
        self.device.check_rows(self.memory.upload(array), finite, self.memory.stream)
        found = np.flatnonzero(self.memory.download(finite) != 1)
        return int(found[0]) if found.size else None

    def describe(self) -> dict[str, str | int]:
        return {"backend": self._name, "instruction_set": "cuda", "threads": 1}

    def _default_threads(self) -> int:
        return 1

    def _render(self, call: MapCall, heatmaps: Floats, overlay: Overlay | None, threads: int) -> int | None:
        activations = self._upload_images(call.activations, call.channels_last)
        weights = self._upload_images(call.weights, call.channels_last and call.weighting != "channel")
        maps, drawn, finite, overlays, evidence = self.render_arrays(
            activations,
            weights,
            call.channels_last,
            weighting=call.weighting,
            normalize=call.normalize,
            size=(heatmaps.shape[2], heatmaps.shape[3]),
            overlay=overlay,
        )
        call.maps[...] = maps
        call.evidence[...] = evidence
        heatmaps[...] = drawn
        if overlay is not None:
            overlay.out[...] = overlays
        bad = np.flatnonzero(finite.reshape(-1) != 1)
        for flat in bad:
            index = np.unravel_index(int(flat), finite.shape)
            assert not maps[index].any()
            assert not drawn[index].any()
        return int(bad[0]) if bad.size else None

    def render_arrays(
        self,
        activations: DeviceArray,
        weights: DeviceArray,
        channels_last: bool,
        *,
        weighting: Any = "channel",
        normalize: Any = None,
        size: tuple[int, int] | None = None,
        overlay: Overlay | None = None,
    ) -> tuple[Floats, Floats, NDArray[np.int32], Pixels, Floats]:
        """Run with outputs and a workspace of exactly the right size."""
        memory = self.memory
        n, c, h, w = activations.shape
        k = weights.shape[1]
        nothing = memory.allocate((0,), "uint8")
        needed = self.device.workspace_bytes((n, c, h, w), k, weighting, channels_last=channels_last)
        drawn = None if overlay is None else self._upload_overlay(overlay)
        call = DeviceRender(
            activations=activations,
            channels_last=channels_last,
            weights=weights,
            weighting=weighting,
            normalize=normalize,
            maps=memory.allocate((n, k, h, w), "float32"),
            heatmaps=None if size is None else memory.allocate((n, k, *size), "float32"),
            overlay=drawn,
            finite=memory.allocate((n, k), "int32"),
            evidence=memory.allocate((n, k), "float32"),
            workspace=memory.allocate((needed,), "uint8"),
        )
        self.device.render(call, memory.stream)
        return (
            memory.download(call.maps),
            memory.download(call.heatmaps or nothing),
            memory.download(call.finite),
            memory.download(drawn.out if drawn else nothing),
            memory.download(call.evidence),
        )

    def _upload_overlay(self, overlay: Overlay) -> DeviceOverlay:
        upload = self.memory.upload
        out = self.memory.allocate(overlay.out.shape, "uint8")
        return DeviceOverlay(upload(np.ascontiguousarray(overlay.images)), upload(overlay.palette), overlay.alpha, out)

    def _upload_images(self, array: NDArray[Any], channels_last: bool) -> DeviceArray:
        """Dense from image to image; the logical shape, whatever the order in memory."""
        ordered = np.ascontiguousarray(np.moveaxis(array, -3, -1) if channels_last else array)
        uploaded = self.memory.upload(ordered)
        return DeviceArray(uploaded.pointer, array.shape, uploaded.dtype)

    def prepare_resized(self, images: Pixels, channels_last: bool, **how: Any) -> Floats:
        n, h, w, c = images.shape
        shape = (n, h, w, c) if channels_last else (n, c, h, w)
        call = DevicePrepare(
            self.memory.upload(images), self.memory.allocate(shape, "float32"), channels_last=channels_last, **how
        )
        self.device.prepare(call, self.memory.stream)
        return self.memory.download(call.input)

    def _view(
        self, maps: Floats, size: tuple[int, int], heatmaps: Floats | None, overlay: Overlay | None, threads: int
    ) -> int | None:
        raise NotImplementedError("a device draws only what it has computed")

    def _prepare(
        self, image: Pixels, levels: Floats, input_out: Floats, *, reversed_order: bool, channels_last: bool
    ) -> None:
        raise NotImplementedError("a device takes pictures of the network's size")
