"""The two devices pass calls on to stand-ins for the driver, with arguments in CUDA's order."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastcam.errors import DeviceError, DeviceMemoryError
from fastcam.explaining import devices
from fastcam.explaining.devices.memory import lay_out


class _CudaError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA error {status}")
        self.status = status


class _Recorder(types.ModuleType):
    """A module whose functions record their calls, and raise or return what a test set."""

    def __init__(self, name: str, results: dict[str, Any], **constants: Any) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []
        self.results = results
        self.__dict__.update(constants)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            result = self.results.get(name)
            if isinstance(result, Exception):
                raise result
            return result

        return call


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Recorder]:
    module = _Recorder("fastcam.kernels.cuda._cuda", {"device_count": 2, "allocate": 4096, "allocate_pinned": 8192})
    monkeypatch.setitem(sys.modules, "fastcam.kernels.cuda._cuda", module)
    monkeypatch.setattr("fastcam.kernels.cuda._cuda", module, raising=False)
    sys.modules.pop("fastcam.explaining.devices.native", None)
    yield module
    sys.modules.pop("fastcam.explaining.devices.native", None)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Recorder]:
    results = {
        "getDeviceCount": 2,
        "malloc": 4096,
        "hostAlloc": 8192,
        "streamCreateWithFlags": 7,
        "eventCreateWithFlags": 8,
    }
    module = _Recorder(
        "cupy.cuda.runtime",
        results,
        streamNonBlocking=1,
        eventDisableTiming=2,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        memcpyDeviceToDevice=3,
        CUDARuntimeError=_CudaError,
    )
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cuda.__dict__["runtime"] = module
    for name, value in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.runtime", module)):
        monkeypatch.setitem(sys.modules, name, value)
    sys.modules.pop("fastcam.explaining.devices.cupy_device", None)
    yield module
    sys.modules.pop("fastcam.explaining.devices.cupy_device", None)


def _call_all(device: Any) -> None:
    device.activate()
    device.free(1)
    device.free_pinned(2)
    device.stream_create()
    device.stream_destroy(3)
    device.stream_synchronize(4)
    device.stream_wait_event(5, 6)
    device.event_create()
    device.event_destroy(7)
    device.event_record(8, 9)
    device.event_synchronize(10)
    device.copy_in(11, 12, 13, 14)
    device.copy_out(15, 16, 17, 18)
    device.copy_between(19, 20, 21, 22)


def test_the_native_device(native: _Recorder) -> None:
    device = importlib.import_module("fastcam.explaining.devices.native").NativeDevice(1)
    native.calls.clear()
    _call_all(device)
    assert native.calls == [
        ("set_device", 1),
        ("free", 1),
        ("free_pinned", 2),
        ("create_stream",),
        ("destroy_stream", 3),
        ("synchronize_stream", 4),
        ("wait_event", 5, 6),
        ("create_event",),
        ("destroy_event", 7),
        ("record_event", 8, 9),
        ("synchronize_event", 10),
        ("copy_to_device", 11, 12, 13, 14),
        ("copy_to_host", 15, 16, 17, 18),
        ("copy_on_device", 19, 20, 21, 22),
    ]
    assert (device.allocate(100), device.allocate_pinned(100)) == (4096, 8192)
    native.results["allocate"] = DeviceError("allocate: out of memory (cudaErrorMemoryAllocation)")
    with pytest.raises(DeviceMemoryError, match=r"100 bytes of the memory of CUDA device 1 are not free \(allocate:"):
        device.allocate(100)
    native.results["allocate"] = DeviceError("unspecified launch failure (cudaErrorLaunchFailure)")
    with pytest.raises(DeviceError, match="launch failure") as caught:
        device.allocate(100)
    assert not isinstance(caught.value, DeviceMemoryError)
    _check_device(device)


def test_the_device_of_cupy(runtime: _Recorder) -> None:
    device = importlib.import_module("fastcam.explaining.devices.cupy_device").CupyDevice(1)
    runtime.calls.clear()
    _call_all(device)
    assert runtime.calls == [
        ("setDevice", 1),
        ("free", 1),
        ("freeHost", 2),
        ("streamCreateWithFlags", 1),
        ("streamDestroy", 3),
        ("streamSynchronize", 4),
        ("streamWaitEvent", 5, 6, 0),
        ("eventCreateWithFlags", 2),
        ("eventDestroy", 7),
        ("eventRecord", 8, 9),
        ("eventSynchronize", 10),
        # Target, source, bytes, kind, stream, as cudaMemcpyAsync.
        ("memcpyAsync", 11, 12, 13, 1, 14),
        ("memcpyAsync", 15, 16, 17, 2, 18),
        ("memcpyAsync", 19, 20, 21, 3, 22),
    ]
    assert (device.allocate(100), device.allocate_pinned(100)) == (4096, 8192)
    runtime.results["malloc"] = _CudaError(2)
    with pytest.raises(DeviceMemoryError, match="100 bytes of the memory of CUDA device 1 are not free"):
        device.allocate(100)
    runtime.results |= {"malloc": _CudaError(700), "eventSynchronize": _CudaError(700)}
    for call in (device.allocate, device.event_synchronize):
        with pytest.raises(DeviceError, match=r"CUDA failed: .*700"):
            call(100)
    _check_device(device)


def _check_device(device: Any) -> None:
    """Pinned memory is viewed in place, and a device implements the protocol."""
    data = np.arange(10, dtype=np.uint8)
    np.testing.assert_array_equal(device.view(data.ctypes.data + 2, 4, writes=False), [2, 3, 4, 5])
    device.view(data.ctypes.data, 1, writes=True)[:] = 9
    assert data[0] == 9
    assert device.dlpack_type == 2
    with pytest.raises(DeviceError, match="there is no CUDA device 2: this process sees 2"):
        type(device)(2)


def test_the_native_module_comes_first(native: _Recorder, runtime: _Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    devices._kernels.cache_clear()
    for name, kind in (("native", "CudaKernels"), ("nvrtc", "NvrtcKernels")):
        module = types.ModuleType(f"fastcam.kernels.cuda.{name}")
        setattr(module, kind, type(kind, (), {}))
        monkeypatch.setitem(sys.modules, f"fastcam.kernels.cuda.{name}", module)
    opened: list[Any] = list(devices.open_device(0))
    assert [type(item).__name__ for item in opened] == ["NativeDevice", "CudaKernels"]
    assert devices.open_device(1)[1] is opened[1]
    monkeypatch.setitem(sys.modules, "fastcam.kernels.cuda._cuda", None)
    opened = list(devices.open_device(0))
    assert [type(item).__name__ for item in opened] == ["CupyDevice", "NvrtcKernels"]
    devices._kernels.cache_clear()


def test_arrays_lie_apart_and_aligned() -> None:
    slots, end = lay_out([("a", (3, 5), "uint8"), ("b", (2, 2), "float32"), ("c", (1,), "int64")], start=256)
    assert {name: slot.offset for name, slot in slots.items()} == {"a": 256, "b": 512, "c": 768}
    assert end == 1024
    array = slots["b"].at(1000, 1)
    assert (array.pointer, array.shape, array.dtype) == (1512, (1, 2), "float32")
