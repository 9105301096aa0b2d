"""CUDA devices: memory, streams and events, through the native module or through CuPy.

Addresses and handles are plain integers, as ONNX Runtime takes them. Only `Device.stream_synchronize` and
`Device.event_synchronize` wait for the device.

In: host arrays and foreign device arrays. Out: device memory, streams and copies. Imports `kernels` and the ground.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple, Protocol

from ...arrays import Bytes
from ...errors import DeviceError
from ...kernels.cuda.interface import DeviceKernels


class Device(Protocol):
    """One device. Methods can be called from any thread that has called `activate`."""

    index: int
    """Number of the device in this process."""

    dlpack_type: int
    """Type of its arrays in DLPack: 2, kDLCUDA."""

    def activate(self) -> None:
        """Make it the device of the calling thread."""

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes of device memory, 256-byte aligned.

        Raises
        ------
        DeviceMemoryError
            There are not as many free.
        """

    def free(self, pointer: int) -> None:
        """Free memory from `allocate`; no work in flight may use it."""

    def allocate_pinned(self, size: int) -> int:
        """Return the address of ``size`` bytes of page-locked host memory.

        Raises
        ------
        DeviceMemoryError
            There are not as many free.
        """

    def free_pinned(self, pointer: int) -> None:
        """Free memory from `allocate_pinned`."""

    def view(self, pointer: int, size: int, *, writes: bool) -> Bytes:
        """Return pinned memory as bytes for one access: to write to it, or to read what was copied to it."""

    def stream_create(self) -> int:
        """Return a stream that does not wait for the legacy default stream."""

    def stream_destroy(self, stream: int) -> None:
        """Destroy a stream."""

    def stream_synchronize(self, stream: int) -> None:
        """Wait for all work on the stream."""

    def stream_wait_event(self, stream: int, event: int) -> None:
        """Make work that is enqueued on the stream from now on wait for the event."""

    def event_create(self) -> int:
        """Return an event without timing."""

    def event_destroy(self, event: int) -> None:
        """Destroy an event."""

    def event_record(self, event: int, stream: int) -> None:
        """Record the event: it completes with all work that is enqueued on the stream so far."""

    def event_synchronize(self, event: int) -> None:
        """Wait for the recorded work."""

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        """Enqueue a copy of ``size`` bytes from pinned to device memory."""

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        """Enqueue a copy of ``size`` bytes from device to pinned memory."""

    def copy_between(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of ``size`` bytes within device memory."""


class Backend(NamedTuple):
    """Where devices and kernels come from.

    Attributes
    ----------
    needs : str
        Module that cannot be imported if the backend is missing.
    device, kernels : tuple of str
        Module and name of the class of its devices, and of its kernels, which run on the thread's current device.
    """

    needs: str
    device: tuple[str, str]
    kernels: tuple[str, str]

    def is_there(self) -> bool:
        """Return whether its module can be imported."""
        try:
            importlib.import_module(self.needs, _PACKAGE)
        except ImportError:
            return False
        return True

    def open(self, index: int) -> tuple[Device, DeviceKernels]:
        """Return the device of this number and the kernels."""
        module, name = self.device
        device: Device = getattr(importlib.import_module(module, _PACKAGE), name)(index)
        return device, _kernels(*self.kernels)


@functools.cache
def _kernels(module: str, name: str) -> DeviceKernels:
    """Return the kernels of a backend, one shared instance: they may compile themselves, which takes seconds."""
    kernels: DeviceKernels = getattr(importlib.import_module(module, _PACKAGE), name)()
    return kernels


_PACKAGE = __package__.partition(".")[0]
BACKENDS = (
    Backend(
        ".kernels.cuda._cuda", (".explaining.devices.native", "NativeDevice"), (".kernels.cuda.native", "CudaKernels")
    ),
    Backend("cupy", (".explaining.devices.cupy_device", "CupyDevice"), (".kernels.cuda.nvrtc", "NvrtcKernels")),
)


def find_backend() -> Backend | None:
    """Return the first backend that is installed."""
    return next((backend for backend in BACKENDS if backend.is_there()), None)


def open_device(index: int) -> tuple[Device, DeviceKernels]:
    """Return a device and its kernels.

    Raises
    ------
    DeviceError
        Neither backend is installed, or no device has this number.
    """
    backend = find_backend()
    if backend is None:
        raise DeviceError(NO_KERNELS)
    return backend.open(index)


NO_KERNELS = (
    "there are no kernels for CUDA: this build of fastcam has none, and CuPy is missing. "
    'Run pip install "fastcam[gpu]", or build fastcam where nvcc is installed'
)
