"""Which kernels of `csrc/cam_kernels.cuh` a call launches, with how many blocks and which arguments.

The same for every backend that runs them: `cuda`, `nvrtc`, and the emulation that tests them on the CPU. The division
into blocks depends only on the shape of one image, so an image's result does not depend on its batch.

First launch: `SumPlan`. Second: `_plan_view`. The structures are those of the kernels' source, field by field.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

from ...errors import KernelError
from ..boundary import Weighting
from .interface import DeviceArray, DeviceKernels, DeviceOverlay, DevicePrepare, DeviceRender, DeviceType

PARTS = {"any": 0, "float32": 1, "float16": 2, "bfloat16": 3}
"""Value of the macro CAM_PART that compiles the kernels for one type of activations, or those for all."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "int64": 8}
_FLOATS: dict[str, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
_WEIGHTINGS = ("channel", "pooled", "element")
_NORMALIZATIONS = {None: 0, "max": 1, "minmax": 2}

_SUM = struct.Struct("@3Q14i0Q")
_VIEW = struct.Struct("@8Qd12i0Q")
_PREPARE = struct.Struct("@2Q2q3i6f0Q")
_CHECK = struct.Struct("@2Qq0Q")

_THREADS = 256
_WARP = 32
_MOST_BLOCKS = 2**31 - 1
_MOST_PIXELS = 2**27
"""Pixels of a map: positions within eight channels are 32-bit numbers in the kernels."""

_SHARED_BYTES = 48 * 1024
"""Shared memory of a block that needs no opt-in from the driver."""

_SLICE_BYTES = 64 * 1024
"""What a block should read: enough to amortise its start and end, little enough to occupy a device at batch size 1."""

_COMBINED_FLOATS = 16 * 1024
"""About this many floats of partial maps are added by each block of the second launch: 64 KiB from the L2 cache."""

_WEIGHT_FLOATS = {"channel": 8 * 1024, "pooled": 6 * 1024}
"""Weights of a slice in shared memory, in addition to its other contents."""

_READ_PER_WRITTEN = 8
"""Bytes of activations read for each byte of partial sums written."""

_CACHED_PIXELS = 6 * 1024
"""Largest map that the second launch keeps in shared memory."""

_VIEW_BLOCKS = 1024
"""Blocks for a small batch: several per multiprocessor of a large device."""

_VIEW_PIXELS = 2048
"""Minimum pixels of the heatmap per block, so that adding the parts of the map is worthwhile."""

_VIEW_ROWS = 512
_VIEW_COLUMNS = 1024


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel's name, blocks, threads and bytes of shared memory per block, and its only argument."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    arguments: bytes


@dataclass(frozen=True)
class SumPlan:
    """How the first launch divides one image; the fields of the structure SumCall by their names.

    ``blocks`` is the number per image, ``parts`` the number of partial sums of each map in the workspace.
    """

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    slices: int
    slice_channels: int
    tiles: int
    tile_blocks: int
    tile_size: int
    group: int
    rows: int
    parts: int
    scratch_size: int


class LaunchedKernels(DeviceKernels):
    """The kernels of the common source; a backend implements how to launch one of them."""

    @abstractmethod
    def _launch(self, launch: Launch, stream: int) -> None:
        """Enqueue a launch; raise `KernelError` if that fails."""

    def workspace_bytes(
        self, activations: tuple[int, int, int, int], maps: int, weighting: Weighting, *, channels_last: bool
    ) -> int:
        """See `DeviceKernels`; sufficient for every combination of types."""
        n, c, h, w = activations
        if 0 in (n, maps):
            return 0
        _check_sizes(activations)
        parts = max(
            plan_sum(c, h * w, maps, values, weights, weighting, channels_last).parts
            for values in _FLOATS
            for weights in _FLOATS
        )
        return n * maps * parts * h * w * 4

    def render(self, call: DeviceRender, stream: int) -> None:
        """See `DeviceKernels`."""
        for launch in plan_render(call):
            self._launch(launch, stream)

    def prepare(self, call: DevicePrepare, stream: int) -> None:
        """See `DeviceKernels`."""
        for launch in _plan_prepare(call):
            self._launch(launch, stream)

    def check_rows(self, rows: DeviceArray, finite: DeviceArray, stream: int) -> None:
        """See `DeviceKernels`."""
        for launch in _plan_check(rows, finite):
            self._launch(launch, stream)


@lru_cache(maxsize=256)
def plan_sum(
    channels: int, pixels: int, maps: int, values: DeviceType, weights: DeviceType, weighting: Weighting, last: bool
) -> SumPlan:
    """Divide one image.

    Parameters
    ----------
    channels, pixels, maps
        C, h * w and K, at least 1.
    values, weights
        Types of the activations and the weights.
    weighting
        As in `DeviceRender`.
    last
        Whether the channels are last in memory.
    """
    plan = _plan_last if last else _plan_first
    return plan(channels, pixels, maps, values, weights, weighting)


def plan_render(call: DeviceRender) -> list[Launch]:
    """Validate a call and return its launches: two, or none for an empty batch."""
    n, c, h, w = _check_render(call)
    k = call.weights.shape[1]
    if 0 in (n, k):
        return []
    plan = plan_sum(c, h * w, k, call.activations.dtype, call.weights.dtype, call.weighting, call.channels_last)
    needed = n * k * plan.parts * h * w * 4
    if math.prod(call.workspace.shape) < needed:
        raise KernelError(f"workspace: {call.workspace.shape[0]} bytes of {needed}; workspace_bytes returns its size")
    arguments = _SUM.pack(
        call.activations.pointer,
        call.weights.pointer,
        call.workspace.pointer,
        c,
        h * w,
        k,
        plan.slices,
        plan.slice_channels,
        plan.tiles,
        plan.tile_blocks,
        plan.tile_size,
        plan.group,
        plan.rows,
        plan.parts,
        _FLOATS[call.activations.dtype],
        _FLOATS[call.weights.dtype],
        plan.scratch_size,
    )
    total = Launch(plan.kernel, _count_blocks(n * plan.blocks), plan.threads, plan.shared_bytes, arguments)
    return [total, _plan_view(call, plan.parts)]


def _plan_first(
    channels: int, pixels: int, maps: int, values: DeviceType, weights: DeviceType, weighting: Weighting
) -> SumPlan:
    size = _BYTES[values]
    whole = 16 // size
    packed = channels * pixels % whole == 0 and pixels >= whole and (weighting != "element" or values == weights)
    at_once, count = _choose_kernel(maps, weighting, whole, packed, pixels)
    group = count // math.gcd(pixels, count)
    packs = group * pixels // count
    tiles = -(-packs // _THREADS)
    tile_size = -(-packs // tiles)
    unfolded = 1 if tiles == 1 else group
    stride = at_once if at_once < 8 else at_once + 4

    channel_bytes = pixels * size
    if weighting != "channel":
        channel_bytes += pixels * min(maps, at_once) * _BYTES[weights]
    if weighting != "pooled":
        channel_bytes = -(-channel_bytes // tiles)
    wanted = max(
        _SLICE_BYTES // channel_bytes,
        _READ_PER_WRITTEN * 4 * maps * unfolded // size,
        -(-channels // max(1, _COMBINED_FLOATS // (pixels * unfolded))),
    )
    most = channels if weighting == "element" else _WEIGHT_FLOATS[weighting] // stride // group * group
    slice_channels = _divide(channels, wanted, most, group)
    slices = -(-channels // slice_channels)

    rows = min(_THREADS // tile_size, slice_channels // group)
    scratch = min(at_once, 2) * rows * tile_size * count
    stored = 0 if weighting == "element" else slice_channels * stride
    floats = stored + scratch if weighting == "pooled" else max(stored, scratch)
    tile_blocks = 1 if weighting == "pooled" else tiles
    return SumPlan(
        kernel=f"cam_{weighting}_{values if packed else 'any'}_first_{at_once}",
        blocks=-(-maps // at_once) * tile_blocks * slices,
        threads=_round_up(rows * tile_size, _WARP),
        shared_bytes=4 * floats,
        slices=slices,
        slice_channels=slice_channels,
        tiles=tiles,
        tile_blocks=tile_blocks,
        tile_size=tile_size,
        group=group,
        rows=rows,
        parts=slices * unfolded,
        scratch_size=scratch if weighting == "pooled" else floats,
    )


def _plan_last(
    channels: int, pixels: int, maps: int, values: DeviceType, weights: DeviceType, weighting: Weighting
) -> SumPlan:
    size = _BYTES[values]
    whole = 16 // size
    packed = channels % whole == 0 and (weighting != "element" or values == weights)
    at_once, count = _choose_kernel(maps, weighting, whole, packed, None)
    warps = _THREADS // _WARP
    turn = warps * (2 if weighting == "element" or at_once * count > 16 else 4)  # pixels that a block takes at a time
    unit = _WARP * count
    value_bytes = size if weighting == "channel" else size + min(maps, at_once) * _BYTES[weights]

    wanted = max(
        _SLICE_BYTES // (turn * value_bytes),
        _READ_PER_WRITTEN * 4 * maps // size,
        -(-channels // max(1, _COMBINED_FLOATS // pixels)),
    )
    stored = {"channel": at_once, "pooled": at_once + warps, "element": 0}[weighting]  # floats of a channel
    most = _SHARED_BYTES // 4 // stored // unit * unit if stored else channels
    slice_channels = _divide(channels, wanted, most, unit)
    slices = -(-channels // slice_channels)

    tile = max(_SLICE_BYTES // (slice_channels * value_bytes), 16 * at_once // size)
    tile_size = _round_up(min(pixels, tile), turn)
    tiles = -(-pixels // tile_size)
    tile_blocks = 1 if weighting == "pooled" else tiles
    return SumPlan(
        kernel=f"cam_{weighting}_{values if packed else 'any'}_last_{at_once}",
        blocks=-(-maps // at_once) * tile_blocks * slices,
        threads=_THREADS,
        shared_bytes=4 * slice_channels * stored,
        slices=slices,
        slice_channels=slice_channels,
        tiles=tiles,
        tile_blocks=tile_blocks,
        tile_size=tile_size,
        group=1,
        rows=1,
        parts=slices,
        scratch_size=0,
    )


def _choose_kernel(maps: int, weighting: Weighting, whole: int, packed: bool, pixels: int | None) -> tuple[int, int]:
    """Return how many maps and elements a thread sums at once; `whole` is the number of elements in 16 bytes."""
    if not packed:
        return 4, 1
    if weighting == "pooled" or 1 < maps <= 4 or (weighting == "element" and maps > 1):
        return 4, whole
    if maps == 1:
        return 1, whole
    # With more maps there are registers for four elements; if these belong to two channels, for eight maps.
    return (8 if pixels is not None and (maps <= 8 or pixels % 4) else 16), 4


def _plan_view(call: DeviceRender, parts: int) -> Launch:
    n, _, h, w = call.activations.shape
    k = call.weights.shape[1]
    height, width = _view_size(call)
    columns = min(_round_up(width, 4), _VIEW_COLUMNS)
    across = max(1, -(-width // _VIEW_COLUMNS))
    wanted = min(-(-_VIEW_BLOCKS // (n * k)), -(-height * width // _VIEW_PIXELS))
    bands = max(1, -(-wanted // across))
    rows = min(-(-height // bands), _VIEW_ROWS)
    tiles = across * (-(-height // rows) if rows else 1)
    cached = h * w <= _CACHED_PIXELS
    overlay = call.overlay
    shared = 8 * (columns + rows) + 20 * (_THREADS // _WARP) + 4 * h * w * cached + (8 * 1024 if overlay else 0)
    arguments = _VIEW.pack(
        call.workspace.pointer,
        call.maps.pointer,
        call.heatmaps.pointer if call.heatmaps else 0,
        overlay.images.pointer if overlay else 0,
        overlay.palette.pointer if overlay else 0,
        overlay.out.pointer if overlay else 0,
        call.finite.pointer,
        call.evidence.pointer,
        overlay.alpha if overlay else 0.0,
        k,
        parts,
        h,
        w,
        height,
        width,
        rows,
        columns,
        across,
        tiles,
        _NORMALIZATIONS[call.normalize],
        cached,
    )
    return Launch("cam_view", _count_blocks(n * k * tiles), _THREADS, shared, arguments)


def _plan_prepare(call: DevicePrepare) -> list[Launch]:
    _check_type("images", call.images, ("uint8",))
    _check_type("input", call.input, ("float32",))
    if len(call.images.shape) != 4 or call.images.shape[3] not in (1, 3):
        raise KernelError(f"images: shape {call.images.shape}; give (N, H, W, 3) or (N, H, W, 1)")
    n, h, w, c = call.images.shape
    _check_shape("input", call.input, (n, h, w, c) if call.channels_last else (n, c, h, w))
    values = n * h * w * c
    if values == 0:
        return []
    arguments = _PREPARE.pack(
        call.images.pointer,
        call.input.pointer,
        values,
        h * w,
        c,
        call.channels_last,
        call.reversed_order,
        *call.mean,
        *call.scale,
    )
    return [Launch("cam_prepare", _count_blocks(-(-values // (4 * _THREADS))), _THREADS, 0, arguments)]


def _plan_check(rows: DeviceArray, finite: DeviceArray) -> list[Launch]:
    _check_type("rows", rows, ("float32",))
    _check_type("finite", finite, ("int32",))
    if not rows.shape:
        raise KernelError("rows: no axis; give (N, ...)")
    _check_shape("finite", finite, rows.shape[:1])
    n, *rest = rows.shape
    if n == 0:
        return []
    arguments = _CHECK.pack(rows.pointer, finite.pointer, math.prod(rest))
    return [Launch("cam_check_rows", _count_blocks(n), _THREADS, 4 * _THREADS // _WARP, arguments)]


def _check_render(call: DeviceRender) -> tuple[int, int, int, int]:
    """Return the shape of the activations."""
    _check_type("activations", call.activations, tuple(_FLOATS))
    _check_type("weights", call.weights, tuple(_FLOATS))
    if call.weighting not in _WEIGHTINGS:
        raise KernelError(f"weighting: {call.weighting!r}; choose one of {', '.join(map(repr, _WEIGHTINGS))}")
    if call.normalize not in _NORMALIZATIONS:
        raise KernelError(f"normalize: {call.normalize!r}; choose one of {', '.join(map(repr, _NORMALIZATIONS))}")
    if len(call.activations.shape) != 4:
        raise KernelError(f"activations: shape {call.activations.shape}; give (N, C, h, w)")
    n, c, h, w = shape = call.activations.shape
    _check_sizes(shape)
    if len(call.weights.shape) < 2:
        raise KernelError(f"weights: shape {call.weights.shape}; give (N, K, ...)")
    k = call.weights.shape[1]
    _check_shape("weights", call.weights, (n, k, c) if call.weighting == "channel" else (n, k, c, h, w))
    for name, array, kind, expected in (
        ("maps", call.maps, "float32", (n, k, h, w)),
        ("finite", call.finite, "int32", (n, k)),
        ("evidence", call.evidence, "float32", (n, k)),
        ("workspace", call.workspace, "uint8", call.workspace.shape[:1]),
    ):
        _check_type(name, array, (kind,))
        _check_shape(name, array, expected)
    if call.heatmaps is not None:
        _check_type("heatmaps", call.heatmaps, ("float32",))
        if len(call.heatmaps.shape) != 4 or 0 in call.heatmaps.shape[2:]:
            raise KernelError(f"heatmaps: shape {call.heatmaps.shape}; give (N, K, H, W), H and W at least 1")
        _check_shape("heatmaps", call.heatmaps, (n, k, *call.heatmaps.shape[2:]))
    if call.overlay is not None:
        _check_overlay(call.overlay, n, k, call.heatmaps)
    return n, c, h, w


def _check_overlay(overlay: DeviceOverlay, n: int, k: int, heatmaps: DeviceArray | None) -> None:
    for name, array in (("images", overlay.images), ("palette", overlay.palette), ("overlays", overlay.out)):
        _check_type(name, array, ("uint8",))
    size = heatmaps.shape[2:] if heatmaps else overlay.images.shape[1:3]
    if len(size) != 2 or 0 in size:
        raise KernelError(f"images: shape {overlay.images.shape}; give (N, H, W, 3), H and W at least 1")
    _check_shape("images", overlay.images, (n, *size, 3))
    _check_shape("palette", overlay.palette, (256, 3))
    _check_shape("overlays", overlay.out, (n, k, *size, 3))
    if not 0 <= overlay.alpha <= 1:
        raise KernelError(f"alpha: {overlay.alpha}; give 0 (the image) .. 1 (the colour)")


def _check_sizes(activations: tuple[int, ...]) -> None:
    _, c, h, w = activations
    if 0 in (c, h, w):
        raise KernelError(f"activations: shape {activations}; C, h and w must be at least 1")
    if h * w > _MOST_PIXELS or c >= 2**31:
        raise KernelError(f"activations: shape {activations}; the kernels take maps of up to {_MOST_PIXELS} pixels")


def _check_type(name: str, array: DeviceArray, allowed: tuple[str, ...]) -> None:
    if array.dtype not in allowed:
        raise KernelError(f"{name}: dtype {array.dtype}; give {' or '.join(allowed)}")
    if array.pointer % 16:
        raise KernelError(f"{name}: address {array.pointer:#x}; it must be a multiple of 16")


def _check_shape(name: str, array: DeviceArray, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise KernelError(f"{name}: shape {array.shape}; it needs {expected}")


def _view_size(call: DeviceRender) -> tuple[int, int]:
    """Return (H, W) of what is drawn; zeros if nothing is."""
    if call.heatmaps is not None:
        return call.heatmaps.shape[2], call.heatmaps.shape[3]
    return (call.overlay.images.shape[1], call.overlay.images.shape[2]) if call.overlay else (0, 0)


def _count_blocks(blocks: int) -> int:
    if blocks > _MOST_BLOCKS:
        raise KernelError(f"{blocks} blocks, more than a launch takes: split the batch")
    return blocks


def _divide(total: int, wanted: int, most: int, unit: int) -> int:
    """Return the size, in whole units, of equal parts of `total`: `wanted` or a little more, but not above `most`."""
    parts = max(1, total // wanted, -(-total // most))
    return min(_round_up(-(-total // parts), unit), total)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
