"""A device through CuPy, where the native module is absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupy.cuda import runtime

from ...arrays import Bytes
from ...errors import DeviceError, DeviceMemoryError
from .memory import host_bytes

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class CupyDevice:
    """See `Device`."""

    dlpack_type = 2

    def __init__(self, index: int) -> None:
        count = _translated(runtime.getDeviceCount)()
        if not 0 <= index < count:
            raise DeviceError(f"there is no CUDA device {index}: this process sees {count}, numbered from 0")
        self.index = index
        self.free = _translated(runtime.free)
        self.free_pinned = _translated(runtime.freeHost)
        self.stream_destroy = _translated(runtime.streamDestroy)
        self.stream_synchronize = _translated(runtime.streamSynchronize)
        self.event_destroy = _translated(runtime.eventDestroy)
        self.event_record = _translated(runtime.eventRecord)
        self.event_synchronize = _translated(runtime.eventSynchronize)

    def activate(self) -> None:
        """See `Device`."""
        _translated(runtime.setDevice)(self.index)

    def allocate(self, size: int) -> int:
        """See `Device`."""
        return _allocated(runtime.malloc, size, f"of the memory of CUDA device {self.index}")

    def allocate_pinned(self, size: int) -> int:
        """See `Device`."""
        return _allocated(lambda size: runtime.hostAlloc(size, 0), size, "of page-locked host memory")

    def view(self, pointer: int, size: int, *, writes: bool) -> Bytes:
        """See `Device`."""
        return host_bytes(pointer, size)

    def stream_create(self) -> int:
        """See `Device`."""
        return int(_translated(runtime.streamCreateWithFlags)(runtime.streamNonBlocking))

    def stream_wait_event(self, stream: int, event: int) -> None:
        """See `Device`."""
        _translated(runtime.streamWaitEvent)(stream, event, 0)

    def event_create(self) -> int:
        """See `Device`."""
        return int(_translated(runtime.eventCreateWithFlags)(runtime.eventDisableTiming))

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        """See `Device`."""
        _translated(runtime.memcpyAsync)(device, host, size, runtime.memcpyHostToDevice, stream)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        """See `Device`."""
        _translated(runtime.memcpyAsync)(host, device, size, runtime.memcpyDeviceToHost, stream)

    def copy_between(self, target: int, source: int, size: int, stream: int) -> None:
        """See `Device`."""
        _translated(runtime.memcpyAsync)(target, source, size, runtime.memcpyDeviceToDevice, stream)


def _translated(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call with CuPy's errors as DeviceError."""

    def translated(*arguments: int) -> Any:
        try:
            return call(*arguments)
        except runtime.CUDARuntimeError as error:
            raise DeviceError(f"CUDA failed: {error}. Check whether nvidia-smi runs, and update the driver") from error

    return translated


def _allocated(allocate: Callable[[int], int], size: int, where: str) -> int:
    try:
        return int(allocate(size))
    except runtime.CUDARuntimeError as error:
        if error.status != _OUT_OF_MEMORY:
            raise DeviceError(f"CUDA failed: {error}") from error
        raise DeviceMemoryError(f"{size} bytes {where} are not free ({error})") from error
