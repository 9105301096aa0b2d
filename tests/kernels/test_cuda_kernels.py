"""Features specific to the CUDA kernels: bfloat16, preparation, the check of rows, the division into blocks, errors.

`test_kernels.py` holds them to the specification. Here they run emulated, in several orders of threads, and on a device
if there is one.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gpu_kernels
import numpy as np
import pytest
import shim_kernels
from device_support import DeviceMemory, HostedKernels
from kernel_support import Case, assert_same, random_case, relative_error
from numpy.typing import NDArray

from fastcam.errors import DeviceError, KernelError, MissingExtraError, NonFiniteError
from fastcam.kernels import reference
from fastcam.kernels.boundary import NORMALIZATIONS
from fastcam.kernels.cuda import nvrtc
from fastcam.kernels.cuda.interface import DeviceArray, DeviceOverlay, DevicePrepare, DeviceRender
from fastcam.kernels.cuda.launches import PARTS, Launch, LaunchedKernels, plan_render, plan_sum
from fastcam.pictures.preparing import prepare, resize_image
from fastcam.preprocessing import Preprocessing

WEIGHTINGS: list[Any] = ["channel", "pooled", "element"]


@pytest.fixture
def shim(shim_library: Path) -> shim_kernels.ShimBackend:
    return shim_kernels.ShimBackend(shim_library)


@pytest.fixture(params=["shim", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "nvrtc"))])
def backend(request: pytest.FixtureRequest) -> Iterator[HostedKernels]:
    if request.param == "shim":
        hosted: Any = request.getfixturevalue("shim")
    else:
        hosted = gpu_kernels.backend(request.param)
    yield hosted
    hosted.memory.release()


def bfloat16(array: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Bits of the values cut to bfloat16, and these values."""
    bits = (array.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


# Shapes that reach every kernel, and every way of dividing: one tile and several, groups of one channel and of several,
# slices, a single pixel, more maps than a block takes.
SHAPES = [
    ((2, 16, 7, 7), 1),
    ((1, 40, 14, 14), 3),
    ((1, 24, 7, 7), 15),
    ((1, 36, 14, 14), 17),
    ((1, 64, 17, 17), 5),
    ((1, 16, 33, 31), 2),
    ((2, 48, 1, 1), 2),
    ((1, 5, 3, 3), 6),
    ((1, 300, 14, 14), 1),
    ((1, 520, 9, 10), 9),
]


@pytest.mark.parametrize("order", ["descending", "shuffled"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True])
def test_order_of_threads_changes_no_bit(
    shim_library: Path, rng: np.random.Generator, weighting: Any, last: bool, order: str
) -> None:
    ascending, other = shim_kernels.ShimBackend(shim_library), shim_kernels.ShimBackend(shim_library, order)
    for shape, k in SHAPES:
        case = random_case(rng, shape, k, weighting=weighting, last=last, size=(20, 30), overlay=True)
        expected = assert_same(ascending, case)
        for a, b in zip(expected, case.run(other), strict=True):
            assert a is not None
            assert b is not None
            assert np.array_equal(a, b)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True])
def test_batch_changes_no_bit(backend: HostedKernels, rng: np.random.Generator, weighting: Any, last: bool) -> None:
    case = random_case(rng, (3, 70, 14, 14), 2, weighting=weighting, last=last)
    together = case.run(backend)
    for n in range(3):
        alone = dataclasses.replace(case, activations=case.activations[n : n + 1], weights=case.weights[n : n + 1])
        assert np.array_equal(alone.run(backend).heatmaps[0], together.heatmaps[n])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_bfloat16(backend: HostedKernels, rng: np.random.Generator, weighting: Any, last: bool, kind: Any) -> None:
    for shape, k in SHAPES:
        case = random_case(rng, shape, k, weighting=weighting, normalize=None)
        bits, values = bfloat16(case.activations)
        weight_bits, weights = bfloat16(case.weights) if kind == "bfloat16" else (case.weights, case.weights)

        def ordered(array: NDArray[Any]) -> NDArray[Any]:
            return np.moveaxis(array, -3, -1) if last and array.ndim > 3 else array

        uploaded = backend.memory.upload(ordered(bits), "bfloat16")
        uploaded_weights = backend.memory.upload(ordered(weight_bits), kind)
        maps, _, finite, *_ = backend.render_arrays(
            dataclasses.replace(uploaded, shape=shape),
            dataclasses.replace(uploaded_weights, shape=weights.shape),
            last,
            weighting=weighting,
        )
        expected = Case(values, weights, weighting, None).run(reference.KERNELS).maps
        assert finite.all()
        assert relative_error(maps, expected) <= 1e-5


def test_every_bfloat16(backend: HostedKernels) -> None:
    """All bit patterns except NaN and infinity, with their signs: weight 1 and, for the negative ones, -1."""
    bits = np.arange(65536, dtype=np.uint32)
    values = (bits << 16).view(np.float32)
    finite = np.isfinite(values) & (values != 0)
    bits, values = bits[finite].astype(np.uint16), values[finite]
    signs = np.array([[[1.0], [-1.0]]], np.float32)
    shape = (1, 1, 1, len(bits))
    activations = backend.memory.upload(bits.reshape(shape), "bfloat16")
    maps, _, good, *_ = backend.render_arrays(activations, backend.memory.upload(signs), False)
    assert good.all()
    assert np.array_equal(maps[0, :, 0], np.stack([np.maximum(values, 0), np.maximum(-values, 0)]))


def _rounded(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = (float(np.float32(255 * value)) for value in values)
    return first, second, third


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("order", "channels"), [("RGB", 3), ("BGR", 3), ("RGB", 1)])
@pytest.mark.parametrize("size", [(4, 8), (5, 7), (1, 1)])
def test_prepare(
    backend: HostedKernels, rng: np.random.Generator, last: bool, order: Any, channels: int, size: tuple[int, int]
) -> None:
    numbers = [(0.4, 0.5, 0.7), (0.3, 0.1, 0.9)] if channels == 3 else [(0.4,) * 3, (0.3,) * 3]
    mean, scale = (_rounded(values) for values in numbers)
    preprocessing = Preprocessing(order=order, mean=mean, scale=scale)
    images = rng.integers(0, 256, (3, *size, 3), np.uint8)
    expected = prepare(list(images), preprocessing, size, "NHWC" if last else "NCHW", channels)
    pictures = images if channels == 3 else np.stack([resize_image(image, size, 1) for image in images])
    found = backend.prepare_resized(pictures, last, reversed_order=order == "BGR", mean=mean, scale=scale)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("columns", [1, 4, 7, 1000, 1001])
def test_check_rows(backend: HostedKernels, rng: np.random.Generator, columns: int) -> None:
    rows = rng.normal(size=(6, columns)).astype(np.float32)
    rows[0] = np.finfo(np.float32).max
    rows[2, -1], rows[3, 0], rows[4, columns // 2] = np.nan, np.inf, -np.inf
    finite = backend.memory.allocate((6,), "int32")
    backend.device.check_rows(backend.memory.upload(rows), finite, backend.memory.stream)
    assert backend.memory.download(finite).tolist() == [1, 1, 0, 0, 0, 1]


def test_overlay_of_a_map_that_is_not_finite(shim: shim_kernels.ShimBackend, rng: np.random.Generator) -> None:
    case = random_case(rng, (2, 8, 4, 4), 2, size=(8, 8), overlay=True)
    case.weights[0, 1, 3] = np.nan
    with pytest.raises(NonFiniteError, match="map 1 of image 0"):
        case.run(shim)  # which demands zeros there


def test_maps_alone(shim: shim_kernels.ShimBackend, rng: np.random.Generator) -> None:
    case = random_case(rng, (2, 8, 5, 4), 3, normalize="max")
    maps, drawn, finite, *_ = shim.render_arrays(
        shim.host.upload(case.activations), shim.host.upload(case.weights), False, normalize="max"
    )
    assert relative_error(maps, case.run(reference.KERNELS).maps) <= 1e-6
    assert drawn.size == 0
    assert finite.tolist() == [[1] * 3] * 2
    shim.host.release()


@pytest.mark.parametrize("size", [(600, 1100), (3, 2051)])
def test_several_tiles_of_a_heatmap(
    shim: shim_kernels.ShimBackend, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    assert_same(shim, random_case(rng, (1, 4, 5, 6), 1, size=size, overlay=True))


def test_map_too_large_for_shared_memory(shim: shim_kernels.ShimBackend, rng: np.random.Generator) -> None:
    for normalize in NORMALIZATIONS:
        assert_same(shim, random_case(rng, (1, 4, 90, 100), 2, normalize=normalize, size=(60, 70)))


# The division into blocks


def test_every_kernel_is_met(shim: shim_kernels.ShimBackend, rng: np.random.Generator) -> None:
    types: list[Any] = ["float32", "float16", "bfloat16"]
    met = {
        plan_sum(shape[1], shape[2] * shape[3], k, values, weights, weighting, last).kernel
        for shape, k in SHAPES
        for values in types
        for weights in types
        for weighting in WEIGHTINGS
        for last in (False, True)
    }
    assert met | {"cam_view", "cam_prepare", "cam_check_rows"} == set(shim.shim.kernel_names())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True])
def test_plans_stay_inside_the_limits(rng: np.random.Generator, weighting: Any, last: bool) -> None:
    types: list[Any] = ["float32", "float16", "bfloat16"]
    for _ in range(2000):
        channels = int(2 ** rng.uniform(0, 14))
        pixels = int(2 ** rng.uniform(0, 22))
        maps = int(2 ** rng.uniform(0, 8))
        plan = plan_sum(channels, pixels, maps, types[rng.integers(3)], types[rng.integers(3)], weighting, last)
        assert plan.threads % 32 == 0
        assert 32 <= plan.threads <= 256
        assert plan.shared_bytes <= 48 * 1024
        assert (plan.slices - 1) * plan.slice_channels < channels <= plan.slices * plan.slice_channels
        assert plan.rows * plan.tile_size <= plan.threads or last
        if not last:
            assert plan.slice_channels % plan.group == 0
            assert channels % plan.group == 0
            assert plan.scratch_size >= plan.rows * plan.tile_size


def test_large_batches_read_little_but_activations() -> None:
    """Partial sums take at most about an eighth of the activations' bytes, even for 15 maps."""
    for channels, side in [(512, 14), (1280, 7), (2048, 7), (256, 56)]:
        for maps in (1, 4, 15):
            for last in (False, True):
                plan = plan_sum(channels, side * side, maps, "float32", "float32", "channel", last)
                assert maps * plan.parts * 7.9 <= channels


# Errors


def arrays(**changes: Any) -> DeviceRender:
    call = DeviceRender(
        activations=DeviceArray(16, (2, 8, 4, 5), "float32"),
        channels_last=False,
        weights=DeviceArray(16, (2, 3, 8), "float32"),
        weighting="channel",
        normalize="max",
        maps=DeviceArray(16, (2, 3, 4, 5), "float32"),
        heatmaps=DeviceArray(16, (2, 3, 9, 9), "float32"),
        overlay=DeviceOverlay(
            DeviceArray(16, (2, 9, 9, 3), "uint8"),
            DeviceArray(16, (256, 3), "uint8"),
            0.5,
            DeviceArray(16, (2, 3, 9, 9, 3), "uint8"),
        ),
        finite=DeviceArray(16, (2, 3), "int32"),
        evidence=DeviceArray(16, (2, 3), "float32"),
        workspace=DeviceArray(16, (1 << 20,), "uint8"),
    )
    return dataclasses.replace(call, **changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"activations": DeviceArray(16, (2, 8, 4, 5), "uint8")}, "activations: dtype uint8"),
    "address": ({"weights": DeviceArray(20, (2, 3, 8), "float32")}, "weights: address 0x14"),
    "axes": ({"activations": DeviceArray(16, (2, 8, 4), "float32")}, "give .N, C, h, w."),
    "empty": ({"activations": DeviceArray(16, (2, 8, 0, 5), "float32")}, "at least 1"),
    "huge": ({"activations": DeviceArray(16, (2, 8, 1 << 14, 1 << 14), "float32")}, "134217728 pixels"),
    "weights": ({"weights": DeviceArray(16, (2, 3, 9), "float32")}, "weights: shape .2, 3, 9.; it needs .2, 3, 8."),
    "weights' axes": ({"weights": DeviceArray(16, (2,), "float32")}, "give .N, K"),
    "gradients": ({"weighting": "pooled"}, "it needs .2, 3, 8, 4, 5."),
    "weighting": ({"weighting": "mean"}, "'mean'; choose one of 'channel'"),
    "normalize": ({"normalize": "sum"}, "'sum'; choose one of None"),
    "maps": ({"maps": DeviceArray(16, (2, 3, 5, 4), "float32")}, "maps: shape"),
    "finite": ({"finite": DeviceArray(16, (2, 3), "int64")}, "finite: dtype int64; give int32"),
    "heatmaps": ({"heatmaps": DeviceArray(16, (2, 9, 9), "float32")}, "heatmaps: shape"),
    "workspace": ({"workspace": DeviceArray(16, (479,), "uint8")}, "workspace: 479 bytes of 480"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, message = REFUSED[name]
    assert len(plan_render(arrays())) == 2
    with pytest.raises(KernelError, match=message):
        plan_render(arrays(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": DeviceArray(16, (2, 9, 8, 3), "uint8")}, "images: shape"),
        ({"palette": DeviceArray(16, (255, 3), "uint8")}, "palette: shape"),
        ({"out": DeviceArray(16, (2, 3, 9, 9, 4), "uint8")}, "overlays: shape"),
        ({"alpha": 1.5}, "alpha: 1.5"),
    ],
)
def test_refused_overlay(changes: dict[str, Any], message: str) -> None:
    overlay = arrays().overlay
    assert overlay is not None
    with pytest.raises(KernelError, match=message):
        plan_render(arrays(overlay=dataclasses.replace(overlay, **changes)))
    empty = dataclasses.replace(overlay, images=DeviceArray(16, (2, 0, 9, 3), "uint8"))
    with pytest.raises(KernelError, match=r"images: shape .*H and W at least 1"):
        plan_render(arrays(heatmaps=None, overlay=empty))


def test_refused_preparation_and_rows(shim: shim_kernels.ShimBackend) -> None:
    images, rows = DeviceArray(16, (1, 2, 2, 4), "uint8"), DeviceArray(16, (), "float32")
    call = DevicePrepare(images, DeviceArray(16, (1, 2, 2, 4), "float32"), True, False, (0,) * 3, (1,) * 3)
    with pytest.raises(KernelError, match="images: shape"):
        shim.device.prepare(call, 0)
    with pytest.raises(KernelError, match="rows: no axis"):
        shim.device.check_rows(rows, DeviceArray(16, (), "int32"), 0)


def test_nothing_to_do(shim: shim_kernels.ShimBackend) -> None:
    empty = DeviceArray(0, (0, 2, 2, 3), "uint8")
    call = DevicePrepare(empty, DeviceArray(0, (0, 2, 2, 3), "float32"), True, False, (0,) * 3, (1,) * 3)
    shim.device.prepare(call, 0)
    shim.device.check_rows(DeviceArray(0, (0, 7), "float32"), DeviceArray(0, (0,), "int32"), 0)
    assert shim.device.workspace_bytes((0, 3, 4, 4), 2, "channel", channels_last=False) == 0
    assert not shim.shim.launches


# The two backends that need a device, as far as they can be tested without one


def test_native_module_without_a_driver() -> None:
    pytest.importorskip("fastcam.kernels.cuda._cuda", reason="fastcam was built without nvcc", exc_type=ImportError)
    from fastcam.kernels.cuda import _cuda
    from fastcam.kernels.cuda import native as cuda

    with pytest.raises(KernelError, match="cam_view: 3 bytes of arguments instead of 120"):
        _cuda.launch("cam_view", 1, 32, 0, b"abc", 0)
    with pytest.raises(KernelError, match="no kernel 'cam_nothing'"):
        _cuda.launch("cam_nothing", 1, 32, 0, b"", 0)
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("asks what is said where there is no CUDA driver, and here is one")
    with pytest.raises(DeviceError, match="CUDA devices: "):
        _cuda.device_count()
    with pytest.raises(KernelError, match=r"cam_check_rows: .*cudaError"):
        cuda.CudaKernels().check_rows(DeviceArray(16, (1, 4), "float32"), DeviceArray(16, (1,), "int32"), 0)


def test_native_module_has_the_kernels_of_the_source(shim: shim_kernels.ShimBackend) -> None:
    pytest.importorskip("fastcam.kernels.cuda._cuda", reason="fastcam was built without nvcc", exc_type=ImportError)
    from fastcam.kernels.cuda import _cuda

    assert sorted(name for name, _ in _cuda.kernels()) == sorted(shim.shim.kernel_names())


class CupyError(RuntimeError):
    """Any of CuPy's."""


class FakeModule:
    """A compiled module, whose kernels the emulation runs."""

    def __init__(self, shim: shim_kernels.ShimKernels, path: str) -> None:
        assert Path(path).read_bytes() == b"cubin"
        self._shim = shim

    def compile(self) -> None:
        pass

    def get_function(self, name: str) -> Any:
        def run(grid: tuple[int], block: tuple[int], args: tuple[Any], shared_mem: int) -> None:
            if name == "cam_prepare":
                raise CupyError("out of resources")
            self._shim._launch(Launch(name, grid[0], block[0], shared_mem, args[0].tobytes()), 0)

        return run


class FakeCupy(types.ModuleType):
    """CuPy as `nvrtc` uses it: the emulation runs its launches."""

    def __init__(self, shim: shim_kernels.ShimKernels) -> None:
        super().__init__("cupy")
        self.streams: list[int] = []
        self.compiled: list[tuple[str, ...]] = []

        @contextmanager
        def stream(pointer: int) -> Iterator[None]:
            self.streams.append(pointer)
            yield

        def compile_program(program: str, options: tuple[str, ...]) -> None:
            self.compiled.append(options)
            if "broken" in program:
                raise CupyError

        self.RawModule = partial(FakeModule, shim)
        self.cuda = types.SimpleNamespace(
            ExternalStream=stream,
            Device=lambda: types.SimpleNamespace(compute_capability="86"),
            driver=types.SimpleNamespace(CUDADriverError=CupyError),
            runtime=types.SimpleNamespace(getDevice=lambda: 0, CUDARuntimeError=CupyError),
            nvrtc=types.SimpleNamespace(
                NVRTCError=CupyError,
                getSupportedArchs=lambda: (75, 80, 86, 90),
                createProgram=lambda text, *_: text,
                compileProgram=compile_program,
                getCUBIN=lambda _: b"cubin",
                getPTX=lambda _: b"ptx",
                getProgramLog=lambda _: "line 1: error",
                destroyProgram=lambda _: None,
            ),
        )


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch, shim: shim_kernels.ShimBackend) -> FakeCupy:
    fake = FakeCupy(shim.shim)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def test_cupy_gets_the_same_launches(
    fake_cupy: FakeCupy, shim: shim_kernels.ShimBackend, rng: np.random.Generator
) -> None:
    kernels = nvrtc.NvrtcKernels()
    memory: DeviceMemory = shim.host
    memory.stream = 4096
    case = random_case(rng, (2, 16, 7, 7), 2, dtypes=(np.float16, np.float32), overlay=True)
    assert_same(HostedKernels("nvrtc", kernels, memory), case)
    shim.host.release()
    assert fake_cupy.streams == [4096, 4096]
    parts = [options[-1] for options in fake_cupy.compiled]
    assert parts == [f"-DCAM_PART={PARTS['float16']}", f"-DCAM_PART={PARTS['any']}"]
    assert all("-arch=sm_86" in options and "-ftz=true" not in options for options in fake_cupy.compiled)
    finite = DeviceArray(16, (1, 1, 1, 3), "uint8")
    with pytest.raises(KernelError, match="cam_prepare: out of resources"):
        kernels.prepare(
            DevicePrepare(finite, DeviceArray(16, (1, 1, 1, 3), "float32"), True, False, (0,) * 3, (1,) * 3), 0
        )


def test_device_newer_than_nvrtc(fake_cupy: FakeCupy) -> None:
    assert nvrtc.compile_part("any", 99) == b"ptx"
    assert "-arch=compute_90" in fake_cupy.compiled[0]


def test_nvrtc_errors(fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvrtc, "source", lambda: "broken")
    with pytest.raises(DeviceError, match="does not compile with -arch=sm_80: line 1: error"):
        nvrtc.compile_part("any", 80)
    monkeypatch.undo()
    monkeypatch.setattr(nvrtc, "files", lambda _: tmp_path)
    with pytest.raises(DeviceError, match="installed without its CUDA source"):
        nvrtc.source()


def test_no_device_and_no_cupy(fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device() -> int:
        raise fake_cupy.cuda.runtime.CUDARuntimeError("no driver")

    fake_cupy.cuda.runtime.getDevice = no_device
    kernels: LaunchedKernels = nvrtc.NvrtcKernels()
    with pytest.raises(DeviceError, match="no driver"):
        kernels.check_rows(DeviceArray(16, (1, 4), "float32"), DeviceArray(16, (1,), "int32"), 0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[gpu\]"):
        nvrtc.NvrtcKernels()


# The tests are tested: a changed source must fail

FAULTS: dict[str, tuple[str, str, str]] = {
    "no wait before sums are added": (
        "ascending",
        "for (int e = 0; e < Count; ++e) target[e] = sums[map][e];\n        }\n        __syncthreads();",
        "for (int e = 0; e < Count; ++e) target[e] = sums[map][e];\n        }",
    ),
    "no wait before sums overwrite weights": (
        "ascending",
        "const int maps = least(at_once, share.maps - first);\n        __syncthreads();",
        "const int maps = least(at_once, share.maps - first);",
    ),
    "no wait for the weights": (
        "ascending",
        "map < share.maps ? weights[source + c] : 0.0f;\n        }\n    }\n    __syncthreads();",
        "map < share.maps ? weights[source + c] : 0.0f;\n        }\n    }",
    ),
    "no wait for the extremes": (
        "ascending",
        "extremes[3 * warp() + 2] = bad;\n        }\n        __syncthreads();",
        "extremes[3 * warp() + 2] = bad;\n        }",
    ),
    "no wait for the map": (
        "ascending",
        "cache_[pixel] = normalized(cache_[pixel]);\n        }\n        __syncthreads();",
        "cache_[pixel] = normalized(cache_[pixel]);\n        }",
    ),
    "last turn left out": ("ascending", "for (; count > 0; --count) {", "for (; count > 1; --count) {"),
    "last rows of a tile left out": (
        "ascending",
        "(groups - place.row + call.rows - 1) / call.rows",
        "(groups - place.row) / call.rows",
    ),
    "a pack of two channels taken for one": ("ascending", "Split && e >= boundary", "Split && e > boundary"),
    "channels of a group not folded": ("ascending", "fold < folds; ++fold", "fold < least(folds, 1); ++fold"),
    "half without subnormals": (
        "ascending",
        "static_cast<unsigned>(value.bits & 0x7fff) << 13) * 0x1p112f",
        "(value.bits & 0x7c00 ? static_cast<unsigned>(value.bits & 0x7fff) << 13 : 0u)) * 0x1p112f",
    ),
    "last columns of a heatmap left out": (
        "ascending",
        "const int across = (columns + drawn_at_once - 1) / drawn_at_once;",
        "const int across = columns / drawn_at_once;",
    ),
    "heatmap written in fours across its end": (
        "ascending",
        "const bool aligned = call.width % drawn_at_once == 0;",
        "const bool aligned = true;",
    ),
    "sum in another order of slices": ("ascending", "static_cast<long long>(part) * pixels_", "0LL * pixels_"),
}


def is_caught(library: Path, order: str, rng: np.random.Generator) -> bool:
    backend = shim_kernels.ShimBackend(library, order)
    subnormal = np.full((1, 8, 7, 7), 2.0**-24, np.float16)
    cases = [
        random_case(rng, (1, 300, 14, 14), 2, size=(15, 13), overlay=True),
        random_case(rng, (2, 24, 7, 7), 6, size=(15, 13), normalize="minmax"),
        random_case(rng, (1, 44, 7, 7), 1, size=(16, 16), normalize=None),
        Case(subnormal, np.ones((1, 1, 8), np.float32)),
    ]
    try:
        for case in cases:
            assert_same(backend, case)
    except (AssertionError, KernelError, NonFiniteError):
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if number % 4 == 0 else pytest.mark.nightly) for number, name in enumerate(FAULTS)],
)
def test_fault_is_caught(shim_library: Path, tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    order, right, wrong = FAULTS[name]
    source = (shim_kernels.CSRC / "cuda" / "cam_kernels.cuh").read_text()
    assert source.count(right) >= 1
    library = shim_kernels.build(tmp_path / "csrc", source.replace(right, wrong), sanitized=False)
    assert not is_caught(shim_library, order, rng)
    assert is_caught(library, order, rng)
