"""The kernels on a CUDA device, for the tests marked `gpu`: skipped with the reason if there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from device_support import DeviceMemory, HostedKernels, numpy_type
from numpy.typing import NDArray

from fastcam.errors import DeviceError
from fastcam.kernels.cuda.interface import DeviceArray, DeviceType
from fastcam.kernels.cuda.launches import LaunchedKernels


class RuntimeMemory(DeviceMemory):
    """Memory and a stream of the module `_cuda`."""

    def __init__(self) -> None:
        from fastcam.kernels.cuda import _cuda

        self._cuda = _cuda
        self.stream = _cuda.create_stream()
        self._blocks: list[int] = []

    def allocate(self, shape: Sequence[int], dtype: DeviceType) -> DeviceArray:
        size = math.prod(shape) * numpy_type(dtype).itemsize
        pointer = self._cuda.allocate(max(size, 1))
        self._blocks.append(pointer)
        self._cuda.fill(pointer, 0xFF, size, self.stream)
        return DeviceArray(pointer, tuple(shape), dtype)

    def upload(self, array: NDArray[Any], dtype: DeviceType | None = None) -> DeviceArray:
        kind: Any = dtype or array.dtype.name
        place = self.allocate(array.shape, kind)
        dense = np.ascontiguousarray(array)
        self._cuda.copy_to_device(place.pointer, dense.ctypes.data, dense.nbytes, self.stream)
        self._cuda.synchronize_stream(self.stream)
        return place

    def download(self, array: DeviceArray) -> NDArray[Any]:
        result = np.empty(array.shape, numpy_type(array.dtype))
        self._cuda.copy_to_host(result.ctypes.data, array.pointer, result.nbytes, self.stream)
        self._cuda.synchronize_stream(self.stream)
        return result

    def release(self) -> None:
        blocks, self._blocks = self._blocks, []
        for pointer in blocks:
            self._cuda.free(pointer)


class CupyMemory(DeviceMemory):
    """Memory and a stream of CuPy."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.stream = self._stream.ptr
        self._blocks: list[Any] = []

    def allocate(self, shape: Sequence[int], dtype: DeviceType) -> DeviceArray:
        return self.upload(np.full(math.prod(shape) * numpy_type(dtype).itemsize, 0xFF, np.uint8), dtype, shape)

    def upload(
        self, array: NDArray[Any], dtype: DeviceType | None = None, shape: Sequence[int] | None = None
    ) -> DeviceArray:
        with self._stream:
            block = self._cupy.asarray(np.ascontiguousarray(array))
        self._stream.synchronize()
        self._blocks.append(block)
        kind: Any = dtype or array.dtype.name
        return DeviceArray(block.data.ptr, tuple(array.shape if shape is None else shape), kind)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        self._stream.synchronize()
        result = np.empty(array.shape, numpy_type(array.dtype))
        if result.size:
            self._cupy.cuda.runtime.memcpy(result.ctypes.data, array.pointer, result.nbytes, 2)
        return result

    def release(self) -> None:
        self._blocks.clear()


class DeviceBackend(HostedKernels):
    """The kernels on a device, their memory released after each call."""

    memory: RuntimeMemory | CupyMemory

    def _render(self, *arguments: Any) -> int | None:
        try:
            return super()._render(*arguments)
        finally:
            self.memory.release()


def backend(name: str) -> DeviceBackend:
    """The backend "cuda" or "nvrtc"; skips the test if it cannot run."""
    kernels, memory = _BACKENDS[name]()
    return DeviceBackend(name, kernels, memory)


@cache
def _open_cuda() -> tuple[LaunchedKernels, RuntimeMemory]:
    pytest.importorskip("fastcam.kernels.cuda._cuda", reason="fastcam was built without nvcc", exc_type=ImportError)
    from fastcam.kernels.cuda import _cuda
    from fastcam.kernels.cuda import native as cuda

    try:
        _cuda.device_count()
    except DeviceError as error:
        pytest.skip(f"no CUDA device: {error}")
    return cuda.CudaKernels(), RuntimeMemory()


@cache
def _open_nvrtc() -> tuple[LaunchedKernels, CupyMemory]:
    cupy = pytest.importorskip("cupy", reason="needs CuPy and a GPU: pip install fastcam[gpu]", exc_type=ImportError)
    from fastcam.kernels.cuda.nvrtc import NvrtcKernels

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    return NvrtcKernels(), CupyMemory()


_BACKENDS: dict[str, Callable[[], tuple[LaunchedKernels, Any]]] = {"cuda": _open_cuda, "nvrtc": _open_nvrtc}
