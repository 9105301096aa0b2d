"""The engine for CUDA devices: model and kernels run on one stream without waiting in between.

A batch passes through three streams: its pixels are uploaded on the first, the model and the kernels run on the second,
which is ONNX Runtime's, and scores and maps are downloaded on the third. Events order them. A call keeps two batches in
flight, so that one computes while the next is uploaded and the previous one downloaded, and waits once per batch.

Batches are filled up to a power of two: ONNX Runtime measures the convolution algorithms for each new shape, which
takes longer than computing the padding.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import deque
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays import Indices
from ...errors import (
    ArgumentError,
    DeviceError,
    DeviceMemoryError,
    FastcamError,
    FileFormatError,
    ImageError,
    ModelError,
    TargetError,
)
from ...kernels.boundary import Weighting
from ...kernels.cuda.interface import DeviceArray, DeviceKernels, DevicePrepare, DeviceRender, DeviceType
from .. import runs
from ..devices import Device
from ..devices.exchange import DeviceTensor, Foreign, borrow
from ..explained_model import DEFAULT_METHOD, ExplainedModel
from ..methods import FUSED, find_method
from . import Results, Task
from .drawing import HostPen, check_answered, check_scores, fuse, maps_not_finite, mean_evidence
from .inputs import Inputs, Source
from .lanes import BufferMap, Entry, Lane, LanePool, arrange

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnxruntime


# Maximum number of batches in flight per call, and of all calls together.
_DEPTH = 2
_MOST_LANES = 6
# Methods that are drawn on the device. The file pools the gradients of the default one itself.
_WEIGHTINGS: dict[str, Weighting] = {**FUSED, DEFAULT_METHOD: "channel"}
_TYPES: dict[str, DeviceType] = {"tensor(float)": "float32", "tensor(int64)": "int64"}
# What ONNX Runtime and its libraries say when they run out of memory.
_OUT_OF_MEMORY = ("out of memory", "failed to allocate memory", "alloc_failed", "smaller than requested bytes")


@dataclass(frozen=True)
class _Shape:
    """Everything that the buffers of a batch depend on.

    Attributes
    ----------
    rows : int
        Images that the buffers hold.
    maps : int
        Maps of each.
    source : {"pixels", "input"}
        Whether pictures are uploaded, or the model's input.
    fetched : tuple of str
    method : str
    size : tuple of int or None
    on_device : bool
        Whether the results stay on the device.
    raw : bool
        Whether maps before their ReLU are wanted, which the host draws.
    """

    rows: int
    maps: int
    source: Source
    fetched: tuple[str, ...]
    method: str
    size: tuple[int, ...] | None
    on_device: bool
    raw: bool = False

    @property
    def is_drawn(self) -> bool:
        """Whether the device's kernels draw the maps."""
        return self.method in _WEIGHTINGS and not self.raw

    @property
    def has_heatmaps(self) -> bool:
        """Whether they also draw heatmaps: those of several layers are averaged on the host."""
        return self.size is not None and len(self.fetched) == 4


@dataclass(frozen=True)
class _Batch:
    """A batch in flight: images ``start`` to ``start + count``, in a lane of this shape."""

    lane: Lane
    shape: _Shape
    start: int
    count: int


@dataclass(frozen=True)
class _Call:
    """The arguments of `CudaEngine.explain`, and what follows from them."""

    inputs: Inputs
    foreign: Foreign | None
    targets: Indices
    task: Task
    kept: Results | None

    @property
    def checks_input(self) -> bool:
        """Whether the model's input comes from another library, unchecked for NaN."""
        return self.foreign is not None and self.inputs.source == "input"


class CudaEngine:
    """See `Engine`.

    Parameters
    ----------
    model : ExplainedModel
    session : onnxruntime.InferenceSession
        Opened with ``stream`` as its stream.
    device, kernels, stream
        The device, its kernels, and the stream for both.
    threads : int or None
        Threads of the host's kernels.
    captures : bool
        Whether the session captures CUDA graphs: each lane and batch shape then has its own graph.
    largest_batch, largest_targets : int or None
        Limits of one run.

    Raises
    ------
    FileFormatError
        The file leaves the shape of an output open, so that no buffer can be made for it.
    """

    def __init__(
        self,
        model: ExplainedModel,
        session: onnxruntime.InferenceSession,
        device: Device,
        kernels: DeviceKernels,
        stream: int,
        *,
        threads: int | None = None,
        captures: bool = False,
        largest_batch: int | None = None,
        largest_targets: int | None = None,
    ) -> None:
        self._model = model
        self._session = session
        self._device = device
        self._kernels = kernels
        self._stream = stream
        self._captures = captures
        self._largest_targets = largest_targets
        self._largest = largest_batch
        self._depth = _DEPTH
        self._host = HostPen(model, threads)
        self._up, self._down = device.stream_create(), device.stream_create()
        self._lanes = LanePool(device, _MOST_LANES)
        self._layouts: dict[_Shape, BufferMap] = {}
        self._graphs = itertools.count(1)
        # One thread enqueues at a time. While a graph is captured, no other thread may use the device.
        self._enqueuing = threading.Lock()
        self._calling: AbstractContextManager[Any] = threading.Lock() if captures else nullcontext()
        for name, value in model.outputs.items():
            if not all(isinstance(side, int) for side in model.output_shape(name, 1, 1)):
                raise FileFormatError(
                    f"{model.path}: its output {name!r} has the dynamic shape {list(value.shape)}, but a GPU "
                    'needs a fixed one: export the model again with input_size=..., or use device="cpu"'
                )
        weakref.finalize(self, _destroy, device, (self._up, self._down)).atexit = False

    def explain(self, inputs: Inputs, targets: Indices, task: Task) -> Results:
        """See `Engine`.

        A batch that does not fit into memory is halved, and so are all later ones.

        Raises
        ------
        DeviceError
            Not even a single image fits into memory.
        """
        self._check(targets, task)
        with self._calling:
            self._device.activate()
            call = self._read(inputs, targets, task)
            results: Results | None = None
            under_way: deque[_Batch] = deque()
            start = 0
            try:
                while start < len(inputs) or under_way:
                    item = None
                    if start < len(inputs) and len(under_way) < self._depth:
                        item = self._begin(call, start, wait=not under_way)
                    if item is not None:
                        under_way.append(item)
                        start += item.count
                    elif under_way:
                        results = self._finish(call, under_way.popleft(), results)
            finally:
                for item in under_way:
                    # The current error says more than that of a device that no longer responds.
                    with suppress(FastcamError), self._awaited(item.lane):
                        pass
        assert results is not None  # noqa: S101  # there is at least one image
        return results

    def _check(self, targets: Indices, task: Task) -> None:
        if self._largest_targets is not None and targets.shape[1] > self._largest_targets:
            raise TargetError(
                f"{targets.shape[1]} classes per image: TensorRT's engine was built for at most {self._largest_targets}"
            )
        if task.on_device and (task.method not in _WEIGHTINGS or len(task.fetched) > 4 or task.raw):
            raise ArgumentError(
                f"on_device: only maps of one layer by {' or '.join(_WEIGHTINGS)}, neither signed nor contrasted, are "
                "drawn on the device: leave on_device out"
            )

    def _read(self, inputs: Inputs, targets: Indices, task: Task) -> _Call:
        """Borrow another library's array, ordered after its stream, and allocate results that stay on the device."""
        array = inputs.device_array
        foreign = None if array is None else borrow(array, self._device, self._up)
        kept = self._room(len(inputs), targets.shape[1], task) if task.on_device else None
        return _Call(inputs, foreign, targets, task, kept)

    def _room(self, n: int, k: int, task: Task) -> Results:
        h, w = self._model.output_shape(task.fetched[2], n, k)[2:]
        shapes = ((n, k, *(task.size or (h, w))), (n, k, h, w))
        heatmaps, maps = (DeviceTensor(self._device, shape, np.float32) for shape in shapes)
        targets = DeviceTensor(self._device, (n, k), np.int64)
        logits = DeviceTensor(self._device, (n, self._model.table_size), np.float32)
        return Results(heatmaps, maps, targets, logits, DeviceTensor(self._device, (n, k), np.float32))

    def _begin(self, call: _Call, start: int, *, wait: bool) -> _Batch | None:
        """Enqueue the batch that starts at this image; None if something else has to finish first."""
        lane = self._lanes.take(wait=wait)
        if lane is None:
            return None
        task = call.task
        rows = self._rows(len(call.inputs) - start, task.batch)
        shape = _Shape(
            rows,
            call.targets.shape[1],
            call.inputs.source,
            task.fetched,
            task.method,
            task.size,
            call.kept is not None,
            task.raw,
        )
        item = _Batch(lane, shape, start, min(rows, len(call.inputs) - start))
        try:
            lane.fit(self._layout(shape))
            self._enqueue(call, item)
        except DeviceMemoryError as error:
            self._let_go(lane)
            lane.drop()
            self._lanes.give_back(lane)
            self._lanes.drop_idle()
            self._retreat(rows, error, alone=wait)
            return None
        except BaseException:
            self._let_go(lane)
            self._lanes.give_back(lane)
            raise
        return item

    def _let_go(self, lane: Lane) -> None:
        """Wait for the work that a failed batch has enqueued."""
        try:
            for stream in (self._up, self._stream, self._down):
                self._device.stream_synchronize(stream)
        except BaseException:
            self._lanes.abandon(lane)
            raise

    def _retreat(self, rows: int, error: DeviceMemoryError, *, alone: bool) -> None:
        """Use less memory from now on: half the images, then one batch at a time."""
        if rows > 1 and self._model.fixed_batch is None:
            self._largest = min(self._largest or rows, rows // 2)
        elif not alone:
            self._depth = 1
        else:
            raise DeviceError(
                f"{self._model.path}: {rows} image(s) at once do not fit into the memory of device "
                f"{self._device.index} ({error}): free some, or use another device"
            ) from error

    def _rows(self, left: int, batch: int) -> int:
        """Return the number of rows in the buffers of the next batch."""
        if self._model.fixed_batch is not None:
            return self._model.fixed_batch
        most = min(batch, self._largest or batch)
        return min(most, 1 << (left - 1).bit_length())

    def _layout(self, shape: _Shape) -> BufferMap:
        if shape not in self._layouts:
            self._layouts[shape] = self._arranged(shape)
        return self._layouts[shape]

    def _arranged(self, shape: _Shape) -> BufferMap:
        n, k = shape.rows, shape.maps
        image: Entry = ("input", (n, *self._model.image_shape), "float32")
        pixels: Entry = ("pixels", (n, *(self._model.side(axis) for axis in "HWC")), "uint8")
        upload: list[Entry] = [("target", (n, k), "int64"), pixels if shape.source == "pixels" else image]
        scratch = [image] if shape.source == "pixels" else []
        outputs: list[Entry] = [
            (name, self._model.output_shape(name, n, k), _TYPES[self._model.outputs[name].type])
            for name in shape.fetched
        ]
        checks: list[Entry] = [("input_finite", (n,), "int32")]
        if not shape.is_drawn:
            return arrange(upload, scratch, checks + outputs, [])
        drawn: list[Entry] = []
        for position, (_, activations, _) in enumerate(outputs[2::2]):
            _, c, h, w = activations
            workspace = self._kernels.workspace_bytes((n, c, h, w), k, _WEIGHTINGS[shape.method], channels_last=False)
            scratch.append((f"workspace/{position}", (max(1, workspace),), "uint8"))
            checks.append((f"finite/{position}", (n, k), "int32"))
            checks.append((f"evidence/{position}", (n, k), "float32"))
            drawn.append((f"maps/{position}", (n, k, h, w), "float32"))
        if shape.has_heatmaps:
            drawn.append(("heatmaps", (n, k, *(shape.size or ())), "float32"))
        scratch += outputs[2:]
        down = checks + outputs[:2]
        return arrange(upload, scratch, down, drawn) if shape.on_device else arrange(upload, scratch, down + drawn, [])

    def _enqueue(self, call: _Call, item: _Batch) -> None:
        """Stage the batch, then enqueue all its work: upload, model, maps, download."""
        device, lane = self._device, item.lane
        self._stage(call, item)
        with self._enqueuing:
            self._upload(call, item)
            device.event_record(lane.uploaded, self._up)
            device.stream_wait_event(self._stream, lane.uploaded)
            self._prepare(call, item)
            self._run(item, call.task.limit)
            if item.shape.is_drawn:
                self._render(call.task, item)
            if call.kept is not None:
                self._keep(call.kept, item)
            device.event_record(lane.computed, self._stream)
            device.stream_wait_event(self._down, lane.computed)
            lane.download(self._down)
            device.event_record(lane.downloaded, self._down)

    def _stage(self, call: _Call, item: _Batch) -> None:
        """Write the uploads to pinned memory."""
        chunk = slice(item.start, item.start + item.count)
        targets = item.lane.stage("target")
        # Padding rows ask for the top class: leftover values might not be valid class indices.
        targets[item.count :] = -1
        targets[: item.count] = call.targets if len(call.targets) == 1 else call.targets[chunk]
        if call.foreign is None:
            call.inputs.write(item.lane.stage(call.inputs.source, item.count), chunk)

    def _upload(self, call: _Call, item: _Batch) -> None:
        if call.foreign is None:
            item.lane.upload(call.inputs.source, item.count, self._up)
            return
        item.lane.upload("target", item.shape.rows, self._up)
        self._copy_rows(item.lane.on_device(call.inputs.source, item.count), call.foreign.pointer, item.start, self._up)

    def _copy_rows(self, target: DeviceArray, source: int, start: int, stream: int) -> None:
        """Fill an array from the rows of another one, from ``start`` on."""
        size = _bytes(target)
        offset = start * size // target.shape[0]
        self._device.copy_between(target.pointer, source + offset, size, stream)

    def _prepare(self, call: _Call, item: _Batch) -> None:
        """Compute the model's input from pictures; check an input that comes from another library."""
        tensor = item.lane.on_device("input", item.count)
        if call.checks_input:
            self._kernels.check_rows(tensor, item.lane.on_device("input_finite", item.count), self._stream)
        preprocessing = self._model.metadata.preprocessing
        if call.inputs.source == "pixels" and preprocessing is not None:
            self._kernels.prepare(
                DevicePrepare(
                    images=item.lane.on_device("pixels", item.count),
                    input=tensor,
                    channels_last=self._model.metadata.input_layout == "NHWC",
                    reversed_order=preprocessing.order == "BGR",
                    mean=preprocessing.mean,
                    scale=preprocessing.scale,
                ),
                self._stream,
            )

    def _run(self, item: _Batch, limit: runs.TimeLimit) -> None:
        if item.shape not in item.lane.bindings:
            item.lane.bindings[item.shape] = self._bound(item.lane, item.shape)
        try:
            binding, options = item.lane.bindings[item.shape]
            runs.run(lambda options: self._session.run_with_iobinding(binding, options), limit, options)
        except FastcamError:
            raise
        except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
            if any(text in str(error).lower() for text in _OUT_OF_MEMORY):
                raise DeviceMemoryError(str(error)) from error
            raise ModelError(f"{self._model.path}: ONNX Runtime cannot run this model: {error}") from error

    def _bound(self, lane: Lane, shape: _Shape) -> tuple[Any, Any]:
        """Return ONNX Runtime's binding to the buffers of a lane, and the options of a run on them."""
        import onnxruntime

        binding = self._session.io_binding()
        for bind, names in (
            (binding.bind_input, {self._model.input_name: "input", "target": "target"}),
            (binding.bind_output, {name: name for name in shape.fetched}),
        ):
            for name, slot in names.items():
                array = lane.on_device(slot)
                bind(name, "cuda", self._device.index, np.dtype(array.dtype), array.shape, array.pointer)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._captures:
            # A graph keeps the addresses with which it was captured.
            options.add_run_config_entry("gpu_graph_id", str(next(self._graphs)))
        return binding, options

    def _render(self, task: Task, item: _Batch) -> None:
        lane, count = item.lane, item.count
        for position, (activations, weights) in enumerate(_pairs(task.fetched)):
            call = DeviceRender(
                activations=lane.on_device(activations, count),
                channels_last=False,
                weights=lane.on_device(weights, count),
                weighting=_WEIGHTINGS[task.method],
                normalize=task.normalize,
                maps=lane.on_device(f"maps/{position}", count),
                heatmaps=lane.on_device("heatmaps", count) if item.shape.has_heatmaps else None,
                overlay=None,
                finite=lane.on_device(f"finite/{position}", count),
                evidence=lane.on_device(f"evidence/{position}", count),
                workspace=lane.on_device(f"workspace/{position}"),
            )
            self._kernels.render(call, self._stream)

    def _keep(self, kept: Results, item: _Batch) -> None:
        """Copy the results to their final place."""
        for tensor, name in zip(kept.arrays, _drawn_names(item.shape), strict=True):
            source = item.lane.on_device(name, item.count)
            offset = item.start * _bytes(source) // item.count
            self._device.copy_between(tensor.pointer + offset, source.pointer, _bytes(source), self._stream)

    def _finish(self, call: _Call, item: _Batch, results: Results | None) -> Results:
        """Wait for a batch, check it, and add it to the results."""
        with self._awaited(item.lane):
            self._check_input(call, item)
            part = self._part(call.task, item)
            rows = slice(item.start, item.start + item.count)
            wanted = call.targets if len(call.targets) == 1 else call.targets[rows]
            check_answered(self._model, wanted, part.targets, part.logits)
            return call.kept or _placed(results, part, item.start, len(call.inputs))

    @contextmanager
    def _awaited(self, lane: Lane) -> Iterator[None]:
        """Wait until a lane's batch is complete, and return the lane afterwards."""
        try:
            self._device.event_synchronize(lane.downloaded)
        except BaseException:
            self._lanes.abandon(lane)
            raise
        try:
            yield
        finally:
            self._lanes.give_back(lane)

    def _check_input(self, call: _Call, item: _Batch) -> None:
        if not call.checks_input:
            return
        bad = np.flatnonzero(item.lane.result("input_finite", item.count) == 0)
        if bad.size:
            raise ImageError(f"image {item.start + bad[0]} of the batch holds NaN or infinity")

    def _part(self, task: Task, item: _Batch) -> Results:
        """Return the results of one batch, in memory that the lane reuses; raise if they are not finite."""
        lane, count, shape = item.lane, item.count, item.shape
        logits, targets = (lane.result(name, count) for name in shape.fetched[:2])
        if not shape.is_drawn:
            layers = [lane.result(name, count) for name in shape.fetched[2:]]
            return self._host.draw(task, logits, targets, layers, item.start)
        advice = self._model.metadata.overflow_advice
        check_scores(logits, item.start, advice)
        self._host.check_targets(targets)
        layers_count = len(_pairs(shape.fetched))
        for position in range(layers_count):
            bad = np.flatnonzero((lane.result(f"finite/{position}", count) == 0).any(axis=1))
            if bad.size:
                raise maps_not_finite(item.start + int(bad[0]), advice)
        if shape.on_device:
            return Results(None, None, targets, logits, None)
        maps, evidence = (
            [lane.result(f"{name}/{position}", count) for position in range(layers_count)]
            for name in ("maps", "evidence")
        )
        if layers_count > 1:
            return Results(
                *fuse(maps, task.size, task.normalize, find_method(task.method).merge),
                targets,
                logits,
                mean_evidence(evidence),
            )
        heatmaps = lane.result("heatmaps", count) if shape.has_heatmaps else maps[0]
        return Results(heatmaps, maps[0], targets, logits, evidence[0])


def _pairs(fetched: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the two outputs of each layer."""
    return list(zip(fetched[2::2], fetched[3::2], strict=True))


def _drawn_names(shape: _Shape) -> tuple[str, ...]:
    """Return the arrays of a lane that contain the fields of `Results`."""
    return "heatmaps" if shape.has_heatmaps else "maps/0", "maps/0", "targets", "logits", "evidence/0"


def _bytes(array: DeviceArray) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _placed(results: Results | None, part: Results, start: int, count: int) -> Results:
    """Copy a batch's part into the results of all ``count`` images, which the first batch allocates."""
    if results is None:
        results = Results._make(
            [*(np.empty((count, *array.shape[1:]), array.dtype) for array in part.arrays), None, None]
        )
    for whole, array in zip(results.arrays, part.arrays, strict=True):
        whole[start : start + len(array)] = array
    return results


def _destroy(device: Device, streams: tuple[int, ...]) -> None:
    device.activate()
    for stream in streams:
        device.stream_destroy(stream)
