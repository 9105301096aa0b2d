"""A device through `_cuda`, the native module."""

from __future__ import annotations

from collections.abc import Callable

from ...arrays import Bytes
from ...errors import DeviceError, DeviceMemoryError
from ...kernels.cuda import _cuda
from .memory import host_bytes

_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


class NativeDevice:
    """See `Device`."""

    dlpack_type = 2

    def __init__(self, index: int) -> None:
        count = _cuda.device_count()
        if not 0 <= index < count:
            raise DeviceError(f"there is no CUDA device {index}: this process sees {count}, numbered from 0")
        self.index = index
        self.free = _cuda.free
        self.free_pinned = _cuda.free_pinned
        self.stream_create = _cuda.create_stream
        self.stream_destroy = _cuda.destroy_stream
        self.stream_synchronize = _cuda.synchronize_stream
        self.stream_wait_event = _cuda.wait_event
        self.event_create = _cuda.create_event
        self.event_destroy = _cuda.destroy_event
        self.event_record = _cuda.record_event
        self.event_synchronize = _cuda.synchronize_event
        self.copy_in = _cuda.copy_to_device
        self.copy_out = _cuda.copy_to_host
        self.copy_between = _cuda.copy_on_device

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
    except DeviceError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise DeviceMemoryError(f"{size} bytes {where} are not free ({error})") from error
