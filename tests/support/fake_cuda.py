"""A CUDA device made of host memory, which detects missing synchronisation.

Work that is enqueued runs when a host wait needs it and not before, so that a premature read finds nothing yet. In
addition, vector clocks (Mattern 1989) over streams, events and the host determine for any two accesses of a byte
whether one is ordered before the other; if not and one is a write, that is a `Fault`, as is an access to
unallocated memory. So a mistake is found whatever the timing.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from networks import Array

from fastcam.errors import DeviceMemoryError
from fastcam.explaining import devices, providers
from fastcam.explaining.devices.memory import host_bytes
from fastcam.explaining.engines import opening
from fastcam.kernels.cuda.interface import DeviceArray, DeviceKernels, DevicePrepare, DeviceRender
from fastcam.kernels.reference import normalized, positive_share, resized, weighted_sum

Clock = dict[Any, int]
_HOST = "host"
_ALIGNMENT = 256
# As float32 it is NaN: unwritten memory cannot pass for a result.
_POISON = 0xFF


class Fault(BaseException):
    """An access that a real device might make too early or too late. Not an Exception: nothing should handle it."""


@dataclass
class _Access:
    start: int
    end: int
    actor: Any
    time: int
    writes: bool
    what: str


@dataclass
class _Memory:
    data: Array
    start: int
    size: int
    is_pinned: bool
    is_live: bool = True
    accesses: list[_Access] = field(default_factory=list)


class _Point(NamedTuple):
    """A point in a stream: everything enqueued before it."""

    stream: int
    position: int
    clock: Clock


class _Stream:
    def __init__(self) -> None:
        self.items: list[Callable[[], None] | _Point] = []
        self.done = 0
        self.clock: Clock = {}


class FakeDevice:
    """See `fastcam.explaining.devices.Device`; ``log`` holds every call in order.

    Parameters
    ----------
    capacity : int
        Bytes of device memory.
    """

    index = 0
    dlpack_type = 1  # kDLCPU: NumPy takes its arrays

    def __init__(self, capacity: int = 2**30) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.capacity = capacity
        self.dropped: set[tuple[str, int]] = set()
        self._counts: dict[str, int] = {}
        self._memory: dict[int, _Memory] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Point | None] = {}
        self._host: Clock = {_HOST: 0}
        self._next = 1000
        self._has_failed = False
        self._lock = threading.RLock()

    def count(self, *names: str) -> int:
        """Return how often these were called."""
        return sum(entry[0] in names for entry in self.log)

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return sum(item.size for item in self._memory.values() if item.is_live and not item.is_pinned)

    def activate(self) -> None:
        self.log.append(("activate",))

    def allocate(self, size: int) -> int:
        with self._called("allocate", size):
            if self.used + size > self.capacity:
                raise DeviceMemoryError(f"{size} bytes are not free")
            return self._allocated(size, is_pinned=False)

    def free(self, pointer: int) -> None:
        with self._called("free", pointer):
            self._freed(pointer)

    def allocate_pinned(self, size: int) -> int:
        with self._called("allocate_pinned", size):
            return self._allocated(size, is_pinned=True)

    def free_pinned(self, pointer: int) -> None:
        with self._called("free_pinned", pointer):
            self._freed(pointer)

    def view(self, pointer: int, size: int, *, writes: bool) -> Array:
        with self._called("view", pointer, size):
            self._host[_HOST] += 1
            self._check(_HOST, self._host, pointer, size, writes, "the host's access")
            return host_bytes(pointer, size)

    def stream_create(self) -> int:
        with self._called("stream_create"):
            self._streams[self._number()] = _Stream()
            return self._next

    def stream_destroy(self, stream: int) -> None:
        with self._called("stream_destroy", stream):
            self._drain(_Point(stream, len(self._streams[stream].items), {}))
            del self._streams[stream]

    def stream_synchronize(self, stream: int) -> None:
        with self._called("stream_synchronize", stream) as is_done:
            if is_done:
                self._wait_on_host(self._here(stream))

    def stream_wait_event(self, stream: int, event: int) -> None:
        with self._called("stream_wait_event", stream, event) as is_done:
            point = self._events[event]
            # As on CUDA, an event that was never recorded stands for nothing.
            if is_done and point is not None:
                self._streams[stream].items.append(point)
                _join(self._streams[stream].clock, point.clock)

    def event_create(self) -> int:
        with self._called("event_create"):
            self._events[self._number()] = None
            return self._next

    def event_destroy(self, event: int) -> None:
        with self._called("event_destroy", event):
            del self._events[event]

    def event_record(self, event: int, stream: int) -> None:
        with self._called("event_record", event, stream) as is_done:
            if is_done:
                self._events[event] = self._here(stream)

    def event_synchronize(self, event: int) -> None:
        with self._called("event_synchronize", event) as is_done:
            point = self._events[event]
            if is_done and point is not None:
                self._wait_on_host(point)

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        self._copy("copy_in", device, host, size, stream)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        self._copy("copy_out", host, device, size, stream)

    def copy_between(self, target: int, source: int, size: int, stream: int) -> None:
        self._copy("copy_between", target, source, size, stream)

    def enqueue(
        self,
        stream: int,
        what: str,
        reads: Sequence[DeviceArray],
        writes: Sequence[DeviceArray],
        work: Callable[[], None],
    ) -> None:
        """Enqueue ``work`` on a stream; it runs when it has to."""
        with self._called(what, stream):
            self._enqueue(
                stream,
                what,
                [(array.pointer, array_bytes(array)) for array in reads],
                [(array.pointer, array_bytes(array)) for array in writes],
                work,
            )

    def host_waits(self) -> int:
        """Return how often the host waited for the device."""
        return self.count("event_synchronize", "stream_synchronize", "session_synchronize")

    def wait_as_a_session_does(self, stream: int) -> None:
        """Wait for a stream, as ONNX Runtime does after a run that is not told otherwise."""
        with self._called("session_synchronize", stream):
            self._wait_on_host(self._here(stream))

    def happens_before(self, first: Clock, second: Clock) -> bool:
        """Whether the second clock knows everything that the first one knows."""
        return all(second.get(actor, 0) >= time for actor, time in first.items())

    def clock_of(self, stream: int) -> Clock:
        """Return what is ordered before the end of a stream."""
        return dict(self._streams[stream].clock)

    @contextmanager
    def _called(self, name: str, *arguments: Any) -> Iterator[bool]:
        with self._lock:
            number = self._counts[name] = self._counts.get(name, -1) + 1
            is_done = (name, number) not in self.dropped
            self.log.append((name, *arguments))
            yield is_done

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _allocated(self, size: int, *, is_pinned: bool) -> int:
        data = np.full(size + _ALIGNMENT, _POISON, np.uint8)
        start = -(-data.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        # NumPy may reuse the addresses of freed arrays: none are ever freed.
        self._memory[start] = _Memory(data, start, size, is_pinned)
        return start

    def _freed(self, pointer: int) -> None:
        memory = self._memory[pointer]
        self._host[_HOST] += 1
        self._check(_HOST, self._host, pointer, memory.size, writes=True, what="freeing")
        memory.is_live = False
        memory.data[:] = _POISON

    def _here(self, stream: int) -> _Point:
        state = self._streams[stream]
        _join(state.clock, self._host)
        return _Point(stream, len(state.items), dict(state.clock))

    def _copy(self, what: str, target: int, source: int, size: int, stream: int) -> None:
        def work() -> None:
            host_bytes(target, size)[:] = host_bytes(source, size)

        with self._called(what, target, source, size, stream):
            self._enqueue(stream, what, [(source, size)], [(target, size)], work)

    def _enqueue(
        self,
        stream: int,
        what: str,
        reads: Sequence[tuple[int, int]],
        writes: Sequence[tuple[int, int]],
        work: Callable[[], None],
    ) -> None:
        state = self._streams[stream]
        # A stream runs what is enqueued after the host has done what it did before.
        _join(state.clock, self._host)
        state.clock[stream] = state.clock.get(stream, 0) + 1
        for ranges, is_write in ((reads, False), (writes, True)):
            for pointer, size in ranges:
                self._check(stream, state.clock, pointer, size, is_write, what)
        state.items.append(work)

    def _wait_on_host(self, point: _Point) -> None:
        _join(self._host, point.clock)
        self._drain(point)

    def _drain(self, point: _Point) -> None:
        """Run everything up to a point, and nothing else."""
        state = self._streams.get(point.stream)
        while state is not None and state.done < point.position:
            item = state.items[state.done]
            if isinstance(item, _Point):
                self._drain(item)
            else:
                item()
            # What it holds is let go, as a device does.
            state.items[state.done] = _nothing
            state.done += 1

    def _check(self, actor: Any, clock: Clock, pointer: int, size: int, writes: bool, what: str) -> None:
        memory = next(
            (m for m in self._memory.values() if m.start <= pointer and pointer + size <= m.start + m.size), None
        )
        if memory is None or not memory.is_live:
            self._fail(f"{what} uses memory that is not allocated")
            return
        access = _Access(pointer, pointer + size, actor, clock.get(actor, 0), writes, what)
        kept = []
        for past in memory.accesses:
            overlaps = past.start < access.end and access.start < past.end
            is_before = past.actor == actor or clock.get(past.actor, 0) >= past.time
            if overlaps and (past.writes or writes) and not is_before:
                self._fail(f"{what} on {actor} is not ordered after {past.what} on {past.actor}")
            is_covered = access.start <= past.start and past.end <= access.end
            if not (is_covered and is_before and (writes or (not past.writes and past.actor == actor))):
                kept.append(past)
        memory.accesses = [*kept, access]

    def _fail(self, message: str) -> None:
        """Raise the first fault; faults that follow during teardown are only consequences."""
        if not self._has_failed:
            self._has_failed = True
            raise Fault(message)


def _nothing() -> None:
    pass


def _join(clock: Clock, other: Clock) -> None:
    for actor, time in other.items():
        clock[actor] = max(clock.get(actor, 0), time)


def array_bytes(array: DeviceArray) -> int:
    return int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize


def contents(array: DeviceArray) -> Array:
    """Return the memory of a fake device as an array."""
    return host_bytes(array.pointer, array_bytes(array)).view(np.dtype(array.dtype)).reshape(array.shape)


class FakeKernels(DeviceKernels):
    """The specification, on the memory of a fake device."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def workspace_bytes(self, activations: Any, maps: int, weighting: Any, *, channels_last: bool) -> int:
        return 64 * int(activations[0]) * maps

    def render(self, call: DeviceRender, stream: int) -> None:
        def work() -> None:
            with np.errstate(invalid="ignore", over="ignore"):
                sums = weighted_sum(contents(call.activations), contents(call.weights), call.weighting)
                raw = sums.astype(np.float32).astype(np.float64)
            finite = np.asarray(np.isfinite(raw).all(axis=(2, 3)))
            maps = normalized(np.where(finite[..., None, None], np.maximum(raw, 0), 0), call.normalize)
            contents(call.finite)[...] = finite
            contents(call.evidence)[...] = positive_share(np.where(finite[..., None, None], raw, 0))
            contents(call.maps)[...] = maps
            if call.heatmaps is not None:
                contents(call.heatmaps)[...] = resized(maps, (call.heatmaps.shape[2], call.heatmaps.shape[3]))
            contents(call.workspace)[...] = _POISON

        n, k = call.finite.shape
        needed = self.workspace_bytes(call.activations.shape, k, call.weighting, channels_last=False)
        assert call.workspace.shape[0] >= needed
        assert call.activations.shape[0] == call.weights.shape[0] == call.maps.shape[0] == n
        heatmaps = [call.heatmaps] if call.heatmaps is not None else []
        written = [call.maps, *heatmaps, call.finite, call.evidence, call.workspace]
        for array in (call.activations, call.weights, *written):
            assert array.pointer % 16 == 0
        self._device.enqueue(stream, "render", [call.activations, call.weights], written, work)

    def prepare(self, call: DevicePrepare, stream: int) -> None:
        def work() -> None:
            channels = call.images.shape[3]
            pixels = contents(call.images)[..., :: -1 if call.reversed_order else 1].astype(np.float32)
            mean, scale = (np.array(values[:channels], np.float32) for values in (call.mean, call.scale))
            batch = (pixels - mean) * scale
            contents(call.input)[...] = batch if call.channels_last else batch.transpose(0, 3, 1, 2)

        self._device.enqueue(stream, "prepare", [call.images], [call.input], work)

    def check_rows(self, rows: DeviceArray, finite: DeviceArray, stream: int) -> None:
        def work() -> None:
            contents(finite)[...] = np.isfinite(contents(rows)).reshape(len(contents(rows)), -1).all(axis=1)

        self._device.enqueue(stream, "check_rows", [rows], [finite], work)


class FakeBinding:
    """The buffers that `FakeSession` was bound to."""

    def __init__(self) -> None:
        self.inputs: dict[str, DeviceArray] = {}
        self.outputs: dict[str, DeviceArray] = {}

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: Any, pointer: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.inputs[name] = DeviceArray(pointer, tuple(shape), np.dtype(dtype).name)

    def bind_output(self, name: str, kind: str, index: int, dtype: Any, shape: Any, pointer: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.outputs[name] = DeviceArray(pointer, tuple(shape), np.dtype(dtype).name)


class FakeSession:
    """A session of the CPU that looks like one of the CUDA provider's, on the memory of a fake device.

    Attributes
    ----------
    largest : int or None
        Number of images beyond which it fails as ONNX Runtime does when memory runs out.
    graphs : dict
        Buffers by number of the CUDA graph that was captured with them.
    """

    def __init__(self, device: FakeDevice, session: Any, providers: Sequence[Any]) -> None:
        self._device = device
        self._session = session
        self._providers = [name if isinstance(name, str) else name[0] for name in providers]
        self.options = dict(next((item[1] for item in providers if not isinstance(item, str)), {}))
        self.largest: int | None = None
        self.graphs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [*self._providers, "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        self._device.log.append(("io_binding",))
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        stream = int(self.options["user_compute_stream"])
        inputs, outputs = dict(binding.inputs), dict(binding.outputs)
        rows = inputs["target"].shape[0]
        if self.largest is not None and rows > self.largest:
            raise RuntimeError(
                "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 1048576"
            )
        if self.options.get("enable_cuda_graph") == "1":
            number = options.get_run_config_entry("gpu_graph_id")
            # A graph replays the addresses of its capture, whatever is bound now.
            inputs, outputs = self.graphs.setdefault(number, (inputs, outputs))

        def work() -> None:
            feeds = {name: contents(array).copy() for name, array in inputs.items()}
            with np.errstate(all="ignore"):
                found = self._session.run(list(outputs), feeds)
            for array, value in zip(outputs.values(), found, strict=True):
                contents(array)[...] = value

        self._device.enqueue(stream, "model", list(inputs.values()), list(outputs.values()), work)
        if options.get_run_config_entry("disable_synchronize_execution_providers") != "1":
            self._device.wait_as_a_session_does(stream)


def session_factory(device: FakeDevice) -> Callable[..., FakeSession]:
    """Return the replacement for `onnxruntime.InferenceSession`."""
    real = onnxruntime.InferenceSession

    def make(path: Any, options: Any, providers: Sequence[Any], enable_fallback: int) -> FakeSession:
        assert enable_fallback == 0
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        quiet.intra_op_num_threads = 1
        return FakeSession(device, real(path, quiet, providers=["CPUExecutionProvider"]), providers)

    return make


def install(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``Explainer(..., device="cuda")`` run on a fake device."""
    monkeypatch.setattr(providers, "find_problem", lambda index: None)
    monkeypatch.setattr(opening, "_idle_streams", defaultdict(list))
    monkeypatch.setattr(devices, "open_device", lambda index: (device, FakeKernels(device)))
    monkeypatch.setattr(onnxruntime, "InferenceSession", session_factory(device))
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
