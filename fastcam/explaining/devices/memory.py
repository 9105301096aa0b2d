"""Blocks of memory that free themselves, and the layout of arrays in them."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ...arrays import Bytes
from ...kernels.cuda.interface import DeviceArray, DeviceType
from . import Device

# The alignment of cudaMalloc, a multiple of the widest load of any kernel.
_ALIGNMENT = 256


def host_bytes(pointer: int, size: int) -> Bytes:
    """Return host memory that another object owns as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


class Block:
    """Memory that is freed with the object; no work in flight may use it then.

    Attributes
    ----------
    pointer : int
        Its address.
    size : int
        Bytes.
    """

    def __init__(self, device: Device, size: int, *, pinned: bool = False) -> None:
        allocate, free = (device.allocate_pinned, device.free_pinned) if pinned else (device.allocate, device.free)
        self.size = size
        self.pointer = allocate(size)
        self.free = weakref.finalize(self, _free, device, free, self.pointer)
        # At interpreter exit the driver may be gone; it frees everything itself.
        self.free.atexit = False


def _free(device: Device, free: Callable[[int], None], pointer: int) -> None:
    device.activate()
    free(pointer)


class Slot(NamedTuple):
    """The place of an array in a block."""

    offset: int
    shape: tuple[int, ...]
    dtype: DeviceType

    @property
    def row_bytes(self) -> int:
        """Bytes of one item of the first axis."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """Offset of the end of the array."""
        return self.offset + self.shape[0] * self.row_bytes

    def at(self, pointer: int, rows: int | None = None) -> DeviceArray:
        """Return the array in the block at this address, or its first ``rows`` rows."""
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        return DeviceArray(pointer + self.offset, shape, self.dtype)


def lay_out(arrays: Iterable[tuple[str, tuple[int, ...], DeviceType]], start: int = 0) -> tuple[dict[str, Slot], int]:
    """Place arrays (name, shape, type) one after the other; return where, and the offset of the end of the last."""
    slots = {}
    for name, shape, dtype in arrays:
        slots[name] = slot = Slot(start, shape, dtype)
        start = -(-slot.end // _ALIGNMENT) * _ALIGNMENT
    return slots, start
