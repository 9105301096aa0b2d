"""A device through `_cuda`, the native module."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DeviceError, DeviceMemoryError
from ..kernels import _cuda
from . import Bytes
from .memory import host_bytes


class NativeDevice:
    """See `Device`."""

    dlpack_type = 2

    def __init__(self, index: int) -> None:
        count = _cuda.device_count()
        if not 0 <= index < count:
            raise DeviceError(f"there is no CUDA device {index}: this process sees {count}, numbered from 0")
        self.index = index
        self.stream_destroy = _cuda.stream_destroy
        self.stream_synchronize = _cuda.stream_synchronize
        self.stream_wait_event = _cuda.stream_wait_event
        self.event_destroy = _cuda.event_destroy
        self.event_record = _cuda.event_record
        self.event_synchronize = _cuda.event_synchronize
        self.stream_create = _cuda.stream_create
        self.event_create = _cuda.event_create
        self.copy_in = _cuda.copy_in
        self.copy_out = _cuda.copy_out
        self.copy_between = _cuda.copy_between
        self.free = _cuda.free
        self.free_pinned = _cuda.free_pinned

    def activate(self) -> None:
        """See `Device`."""
        _cuda.set_device(self.index)

    def allocate(self, size: int) -> int:
        """See `Device`."""
        return _allocated(_cuda.allocate, size, f"of the memory of CUDA device {self.index}")

    def allocate_pinned(self, size: int) -> int:
        """See `Device`."""
        return _allocated(_cuda.allocate_pinned, size, "of page-locked host memory")

    def view(self, pointer: int, size: int, *, writes: bool) -> Bytes:
        """See `Device`."""
        return host_bytes(pointer, size)


def _allocated(allocate: Callable[[int], int], size: int, where: str) -> int:
    try:
        return allocate(size)
    except MemoryError as error:
        raise DeviceMemoryError(f"{size} bytes {where} are not free ({error})") from error
