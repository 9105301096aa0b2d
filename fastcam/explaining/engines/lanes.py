"""Lanes: the buffers and events of one batch in flight, kept from call to call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ...kernels.cuda.interface import DeviceArray, DeviceType
from ..devices import Device
from ..devices.memory import Block, Slot, lay_out

Entry: TypeAlias = "tuple[str, tuple[int, ...], DeviceType]"


class BufferMap(NamedTuple):
    """Where the arrays of a batch are: uploads, scratch, downloads; uploads and downloads are one copy each.

    Attributes
    ----------
    slots : dict of str to Slot
        In device memory.
    upload : range
        Bytes to upload.
    download : range
        Bytes to download.
    size : int
        Bytes of device memory.
    """

    slots: Mapping[str, Slot]
    upload: range
    download: range
    size: int


def arrange(
    upload: Sequence[Entry], scratch: Sequence[Entry], download: Sequence[Entry], kept: Sequence[Entry]
) -> BufferMap:
    """Lay out uploads, scratch, downloads, and results that may stay on the device."""
    up, up_end = lay_out(upload)
    within, start = lay_out(scratch, up_end)
    down, down_end = lay_out(download, start)
    rest, size = lay_out(kept, down_end)
    return BufferMap({**up, **within, **down, **rest}, range(up_end), range(start, down_end), size)


class Lane:
    """Memory and events for one batch at a time.

    Attributes
    ----------
    uploaded, computed, downloaded : int
        Events.
    bindings : dict
        ONNX Runtime's bindings to the buffers, by keys that the engine chooses; cleared when the buffers move.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.uploaded, self.computed, self.downloaded = (device.event_create() for _ in range(3))
        self.bindings: dict[Any, Any] = {}
        self._memory: Block | None = None
        self._staging: Block | None = None
        self._layout: BufferMap | None = None
        events = (self.uploaded, self.computed, self.downloaded)
        weakref.finalize(self, _destroy, device, events).atexit = False

    def fit(self, layout: BufferMap) -> None:
        """Make room for this layout; the lane must not hold a batch.

        Raises
        ------
        DeviceMemoryError
            There is not enough memory; the lane then has none.
        """
        staged = len(layout.upload) + len(layout.download)
        if self._memory is None or self._memory.size < layout.size:
            self.drop()
            self._memory = Block(self._device, layout.size)
        if self._staging is None or self._staging.size < staged:
            self._staging = None
            self._staging = Block(self._device, staged, pinned=True)
        self._layout = layout

    def drop(self) -> None:
        """Free the memory."""
        self.bindings.clear()
        self._memory = self._staging = self._layout = None

    def on_device(self, name: str, rows: int | None = None) -> DeviceArray:
        """Return an array in device memory, or its first rows."""
        memory, _, layout = self._held()
        return layout.slots[name].at(memory.pointer, rows)

    def stage(self, name: str, rows: int | None = None) -> NDArray[Any]:
        """Return the staging memory of an upload, or of its first rows, to write to at once."""
        return self._staged(name, rows, writes=True)

    def result(self, name: str, rows: int) -> NDArray[Any]:
        """Return the first rows of a download, to read at once."""
        return self._staged(name, rows, writes=False)

    def upload(self, last: str, rows: int, stream: int) -> None:
        """Enqueue the upload; only the first rows of the array ``last``."""
        memory, staging, layout = self._held()
        slot = layout.slots[last]
        self._device.copy_in(memory.pointer, staging.pointer, slot.offset + rows * slot.row_bytes, stream)

    def download(self, stream: int) -> None:
        """Enqueue the download."""
        memory, staging, layout = self._held()
        part = layout.download
        self._device.copy_out(staging.pointer + len(layout.upload), memory.pointer + part.start, len(part), stream)

    def _staged(self, name: str, rows: int | None, *, writes: bool) -> NDArray[Any]:
        _, staging, layout = self._held()
        slot = layout.slots[name]
        shape = slot.shape if rows is None else (rows, *slot.shape[1:])
        # Downloads are staged after uploads.
        offset = (
            slot.offset
            if slot.offset < layout.upload.stop
            else slot.offset - layout.download.start + layout.upload.stop
        )
        data = self._device.view(staging.pointer + offset, shape[0] * slot.row_bytes, writes=writes)
        return data.view(np.dtype(slot.dtype)).reshape(shape)

    def _held(self) -> tuple[Block, Block, BufferMap]:
        """Return memory, staging and layout, which exist once `fit` has been called."""
        return cast("tuple[Block, Block, BufferMap]", (self._memory, self._staging, self._layout))


class LanePool:
    """Lanes for all calls of an engine, created on demand, up to ``most``."""

    def __init__(self, device: Device, most: int) -> None:
        self._device = device
        self._free: list[Lane] = []
        self._unmade = most
        self._abandoned: list[Lane] = []
        self._changed = threading.Condition()

    def take(self, *, wait: bool) -> Lane | None:
        """Return a lane that holds no batch; if there is none, wait for one or return None."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._free or self._unmade)
            if self._free:
                return self._free.pop()
            if not self._unmade:
                return None
            self._unmade -= 1
        try:
            return Lane(self._device)
        except BaseException:
            with self._changed:
                self._unmade += 1
                self._changed.notify()
            raise

    def give_back(self, lane: Lane) -> None:
        """Take a lane back whose batch is complete."""
        with self._changed:
            self._free.append(lane)
            self._changed.notify()

    def abandon(self, lane: Lane) -> None:
        """Never use a lane again, nor free its memory: its device did not confirm that the batch is complete."""
        with self._changed:
            self._abandoned.append(lane)
            self._unmade += 1
            self._changed.notify()

    def drop_idle(self) -> None:
        """Free the memory of all lanes that hold no batch."""
        with self._changed:
            for lane in self._free:
                lane.drop()


def _destroy(device: Device, events: tuple[int, ...]) -> None:
    device.activate()
    for event in events:
        device.event_destroy(event)
