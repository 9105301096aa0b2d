"""Every backend agrees with the specification, and the specification with papers and other libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpu_kernels
import numpy as np
import pytest
import shim_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_support import EPS, Case, assert_same, channels_last, random_case, relative_error, weights_shape
from numpy.typing import NDArray
from PIL import Image

from fastcam import kernels as public
from fastcam.errors import ArgumentError, NonFiniteError
from fastcam.kernels import Rendered, _cpu, cpu, reference
from fastcam.kernels.boundary import NORMALIZATIONS, VIEW_LIMIT, Kernels, Normalize, Weighting

WEIGHTINGS: list[Weighting] = ["channel", "pooled", "element"]
FLOATS = [np.float32, np.float16]


HOST_BACKENDS = ["reference", *_cpu.instruction_sets()]
DEVICE_BACKENDS = ["shim", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "nvrtc"))]


@contextmanager
def host_backend(name: str) -> Iterator[Kernels]:
    if name == "reference":
        yield reference.KERNELS
        return
    chosen = _cpu.instruction_set()
    _cpu.use_instruction_set(name)
    yield cpu.KERNELS
    _cpu.use_instruction_set(chosen)


@pytest.fixture(params=[*HOST_BACKENDS, *DEVICE_BACKENDS])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The specification itself, the native backend with each instruction set of this processor, and the CUDA kernels:
    emulated, compiled by nvcc, and compiled by NVRTC."""
    if request.param in HOST_BACKENDS:
        with host_backend(request.param) as backend:
            yield backend
    elif request.param == "shim":
        yield shim_kernels.ShimBackend(request.getfixturevalue("shim_library"))
    else:
        yield gpu_kernels.backend(request.param)


@pytest.fixture(params=HOST_BACKENDS)
def viewers(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The backends that draw maps computed elsewhere, and run on threads."""
    with host_backend(request.param) as backend:
        yield backend


def same_bits(a: Rendered, b: Rendered) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


# Computed by hand


def test_maps_by_hand(kernels: Kernels) -> None:
    activations = np.array([[[[1, 2], [3, 4]], [[0, 1], [0, 1]]]], np.float32)
    weights = np.array([[[1, -2], [-1, 0], [2, 2]]], np.float32)
    raw = [[[1, 0], [3, 2]], [[0, 0], [0, 0]], [[2, 6], [6, 10]]]
    assert kernels.render(activations, weights, normalize=None).maps.tolist() == [raw]
    by_max = kernels.render(activations, weights).maps
    divided = [[[1 / 3, 0], [1, 2 / 3]], [[0, 0], [0, 0]], [[0.2, 0.6], [0.6, 1]]]
    assert (by_max == np.array([divided], np.float32)).all()
    by_range = kernels.render(activations, weights, normalize="minmax").maps
    assert by_range[0, 2].tolist() == [[0, 0.5], [0.5, 1]]
    assert by_range[0, 1].tolist() == [[0, 0], [0, 0]]


def test_evidence_by_hand(kernels: Kernels) -> None:
    """3 of the total magnitude 6 is positive; all; none; and an empty map."""
    activations = np.array([[[[3, -1], [0, -2]], [[1, 2], [3, 4]]]], np.float32)
    weights = np.array([[[1, 0], [0, 2], [0, -1], [0, 0]]], np.float32)
    for normalize in NORMALIZATIONS:
        found = kernels.render(activations, weights, normalize=normalize)
        assert found.evidence.tolist() == [[0.5, 1, 0, 0]]


def test_evidence_of_maps_whose_sums_leave_float32(viewers: Kernels) -> None:
    activations = np.full((1, 1, 40, 40), 1e38, np.float32)
    activations[..., :10] = -1e38
    assert viewers.render(activations, np.ones((1, 1, 1), np.float32)).evidence[0, 0] == pytest.approx(0.75)


def test_pooled_weights_are_the_mean_of_the_gradients(kernels: Kernels) -> None:
    activations = np.array([[[[1, 2], [3, 4]]]], np.float32)
    gradients = np.array([[[[[1, 2], [3, 2]]]]], np.float32)  # mean 2
    maps = kernels.render(activations, gradients, weighting="pooled", normalize=None).maps
    assert maps.tolist() == [[[[2, 4], [6, 8]]]]


def test_element_weights_multiply_where_they_stand(kernels: Kernels) -> None:
    activations = np.array([[[[1, 2], [3, 4]]]], np.float32)
    weights = np.array([[[[[1, 2], [3, -2]]]]], np.float32)
    maps = kernels.render(activations, weights, weighting="element", normalize=None).maps
    assert maps.tolist() == [[[[1, 4], [9, 0]]]]


def test_resize_by_hand(viewers: Kernels) -> None:
    row = np.array([[[[0, 1]]]], np.float32)
    assert viewers.resize(row, (1, 4)).tolist() == [[[[0, 0.25, 0.75, 1]]]]
    square = np.array([[[[0, 4], [8, 12]]]], np.float32)
    expected = [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    assert viewers.resize(square, (4, 4)).tolist() == [[expected]]
    assert viewers.resize(square, (1, 1)).tolist() == [[[[6]]]]
    assert viewers.resize(np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6), (1, 2)).tolist() == [[[[1, 4]]]]


def test_overlay_by_hand(viewers: Kernels) -> None:
    palette = np.zeros((256, 3), np.uint8)
    palette[0], palette[128], palette[255] = (10, 20, 30), (101, 102, 103), (200, 100, 0)
    maps = np.array([[[[0, 0.5, 1]]]], np.float32)  # 255 * 0.5 = 127.5 rounds to the even 128
    images = np.array([[[[0, 1, 2], [100, 100, 101], [255, 255, 255]]]], np.uint8)
    # Halves round to even: (1 + 20) / 2 -> 10, (100 + 101) / 2 -> 100, (255 + 100) / 2 -> 178.
    assert viewers.colorize(maps, images, palette=palette).tolist() == [
        [[[[5, 10, 16], [100, 101, 102], [228, 178, 128]]]]
    ]
    assert viewers.colorize(maps, images, palette=palette, alpha=0)[0, 0].tolist() == images[0].tolist()
    assert viewers.colorize(maps, images, palette=palette, alpha=1)[0, 0, 0].tolist() == palette[[0, 128, 255]].tolist()


def test_colorize_clips(viewers: Kernels) -> None:
    palette = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(256, 3)
    maps = np.array([[[[-3, 7, -0.0]]]], np.float32)
    overlay = viewers.colorize(maps, np.zeros((1, 1, 3, 3), np.uint8), palette=palette, alpha=1)
    assert overlay[0, 0, 0].tolist() == palette[[0, 255, 0]].tolist()


# Against the specification


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize(
    "dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=lambda pair: "-".join(d.__name__ for d in pair)
)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_relative_error(
    kernels: Kernels,
    rng: np.random.Generator,
    weighting: Weighting,
    last: bool,
    dtypes: tuple[Any, Any],
    normalize: Normalize,
) -> None:
    for shape, k in [((2, 512, 14, 14), 3), ((1, 1280, 7, 7), 1), ((2, 33, 20, 30), 5), ((1, 7, 3, 2), 16)]:
        case = random_case(rng, shape, k, dtypes=dtypes, last=last, weighting=weighting, normalize=normalize)
        expected = case.run(reference.KERNELS)
        actual = case.run(kernels)
        assert relative_error(actual.maps, expected.maps) <= 1e-5
        assert relative_error(actual.heatmaps, expected.heatmaps) <= 1e-5


FINITE = st.sampled_from([0.0, 1.0, -1.0, 0.1, 1e-3, 3.0, 1e4, -6e4, 1e-30, 1e-38, 1e-41, -1e-45, 1e15, -1e18])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    weighting = draw(st.sampled_from(WEIGHTINGS))
    normalize = draw(st.sampled_from(NORMALIZATIONS))
    n, k = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    shape = (n, draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 20)))
    size = draw(st.none() | st.tuples(st.integers(1, 30), st.integers(1, 30)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = draw(st.lists(FINITE, min_size=1, max_size=4))

    def values(of: tuple[int, ...]) -> NDArray[Any]:
        dtype = draw(st.sampled_from(FLOATS))
        kind = draw(st.sampled_from(["normal", "chosen", "negative"]))
        numbers = rng.choice(np.array(chosen), of) if kind == "chosen" else rng.standard_normal(of)
        if kind == "negative":
            numbers = -np.abs(numbers)
        limit = 65504.0 if dtype is np.float16 else 1e18
        return np.clip(numbers, -limit, limit).astype(dtype)

    activations, weights = values(shape), values(weights_shape(shape, k, weighting))
    if draw(st.booleans()):
        activations = channels_last(activations)
        weights = weights if weighting == "channel" else channels_last(weights)
    step = draw(st.sampled_from([1, 2, -1]))  # of the first axis in memory
    activations, weights = (np.repeat(array, abs(step), axis=0)[::step] for array in (activations, weights))
    case = Case(activations, weights, weighting, normalize, size)
    if normalize is not None and draw(st.booleans()):
        height, width = size or shape[2:]
        case.overlay = {
            "images": rng.integers(0, 256, (n, height, width, 3), np.uint8),
            "palette": rng.integers(0, 256, (256, 3), np.uint8),
            "alpha": draw(st.sampled_from([0.0, 0.25, 0.4, 0.5, 1 / 3, 1.0])),
        }
    return case


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), threads=st.sampled_from([None, 1, 3]))
def test_any_input(kernels: Kernels, case: Case, threads: int | None) -> None:
    # Products of the largest values drawn, over all channels, stay inside float32 in both backends.
    assert_same(kernels, case, threads=threads)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    scale=st.sampled_from([1.0, 1e-40, VIEW_LIMIT]),
    seed=st.integers(0, 2**32),
)
def test_resize_any_input(
    viewers: Kernels, shape: tuple[int, ...], size: tuple[int, int], scale: float, seed: int
) -> None:
    maps = (np.random.default_rng(seed).uniform(-1, 1, shape) * scale).astype(np.float32)
    expected = reference.KERNELS.resize(maps, size)
    actual = viewers.resize(maps, size)
    # Two interpolations of three roundings each, of differences up to twice the largest value.
    assert np.abs(actual.astype(np.float64) - expected).max(initial=0) <= 12 * EPS * scale + 1e-44


# Special values


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_all_negative_gives_zeros(kernels: Kernels, normalize: Normalize) -> None:
    result = kernels.render(np.ones((1, 3, 4, 4), np.float32), -np.ones((1, 2, 3), np.float32), normalize=normalize)
    assert not result.maps.any()
    assert not result.heatmaps.any()


def test_constant_map(kernels: Kernels) -> None:
    activations, weights = np.full((1, 4, 5, 6), 3, np.float32), np.full((1, 1, 4), 2, np.float32)
    assert (kernels.render(activations, weights).maps == 1).all()
    assert (kernels.render(activations, weights, normalize="minmax").maps == 0).all()
    assert (kernels.render(activations, weights, normalize=None, size=(20, 20)).heatmaps == 24).all()


@pytest.mark.parametrize("normalize", ["max", "minmax"])
def test_subnormal_maximum(kernels: Kernels, normalize: Normalize) -> None:
    # 1 / 2e-45 overflows: a kernel that multiplies by the reciprocal gives infinity here.
    tiny = np.float32(1.4e-45)
    activations = np.array([[[[0, tiny, 2 * tiny, 4 * tiny]]]], np.float32)
    maps = kernels.render(activations, np.ones((1, 1, 1), np.float32), normalize=normalize).maps
    assert maps.tolist() == [[[[0, 0.25, 0.5, 1]]]]


def test_largest_values(kernels: Kernels) -> None:
    largest = np.finfo(np.float32).max
    activations = np.array([[[[0, largest / 2, largest]]]], np.float32)
    result = kernels.render(activations, np.ones((1, 1, 1), np.float32), size=(3, 9))
    assert result.maps.tolist() == [[[[0, 0.5, 1]]]]
    assert result.heatmaps.max() == 1


def test_every_half(kernels: Kernels) -> None:
    """All 65536 bit patterns of float16 except NaN and infinity."""
    bits = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.abs(bits[np.isfinite(bits)]).reshape(1, 1, 64, -1)
    result = kernels.render(finite, np.ones((1, 1, 1), np.float16), normalize=None)
    assert (result.maps == finite.astype(np.float32)).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_names_image_and_map(
    kernels: Kernels, rng: np.random.Generator, weighting: Weighting, last: bool, dtype: Any, value: float
) -> None:
    case = random_case(rng, (3, 21, 5, 7), 4, dtypes=(dtype, dtype), last=last, weighting=weighting)
    # Zero weights must not hide it.
    case.weights[...] = 0
    clean = case.weights[1, 2].copy()
    case.weights[1, 2].flat[-1] = value
    with pytest.raises(NonFiniteError, match="map 2 of image 1 "):
        case.run(kernels)
    case.weights[1, 2] = clean
    case.activations[2, 20, 4, 6] = value
    with pytest.raises(NonFiniteError, match="map 0 of image 2 "):
        case.run(kernels)


def test_overflowing_sum(kernels: Kernels) -> None:
    with pytest.raises(NonFiniteError, match="map 0 of image 0"):
        kernels.render(np.full((1, 2, 1, 1), 3e38, np.float32), np.ones((1, 1, 2), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * VIEW_LIMIT])
def test_views_refuse_non_finite_maps(viewers: Kernels, value: float) -> None:
    maps = np.zeros((2, 3, 4, 5), np.float32)
    maps[1, 1, 2, 2] = value
    with pytest.raises(NonFiniteError, match="map 1 of image 1"):
        viewers.resize(maps, (8, 8))
    with pytest.raises(NonFiniteError, match="map 1 of image 1"):
        viewers.colorize(maps, np.zeros((2, 8, 8, 3), np.uint8), palette=np.zeros((256, 3), np.uint8))


@pytest.mark.parametrize(("n", "k"), [(0, 2), (2, 0), (0, 0)])
def test_nothing_to_do(kernels: Kernels, rng: np.random.Generator, n: int, k: int) -> None:
    result = random_case(rng, (n, 5, 3, 3), k, size=(6, 7), overlay=True).run(kernels)
    assert result.maps.shape == (n, k, 3, 3)
    assert result.heatmaps.shape == (n, k, 6, 7)
    assert result.overlays is not None
    assert result.overlays.shape == (n, k, 6, 7, 3)


def test_nothing_to_resize(viewers: Kernels) -> None:
    assert viewers.resize(np.zeros((0, 2, 3, 3), np.float32), (2, 2)).shape == (0, 2, 2, 2)


def test_size_none_is_the_layer_size(kernels: Kernels, rng: np.random.Generator) -> None:
    result = random_case(rng, size=None).run(kernels)
    assert (result.heatmaps == result.maps).all()
    assert not np.shares_memory(result.heatmaps, result.maps)


# Outputs and threads


def test_outputs_are_written_in_place(kernels: Kernels, rng: np.random.Generator) -> None:
    case = random_case(rng, (2, 9, 5, 4), 3, size=(11, 12), overlay=True)
    expected = case.run(kernels)
    assert expected.overlays is not None
    outputs = {
        "maps_out": np.full_like(expected.maps, np.nan),
        "heatmaps_out": np.full_like(expected.heatmaps, np.nan),
        "overlays_out": np.full_like(expected.overlays, 7),
    }
    result = case.run(kernels, **outputs)
    assert all(a is b for a, b in zip(result[:3], outputs.values(), strict=True))
    assert same_bits(result, expected)


def test_views_agree_with_render(viewers: Kernels, rng: np.random.Generator) -> None:
    case = random_case(rng, (2, 9, 5, 4), 3, size=(33, 70), overlay=True)
    result = case.run(viewers)
    heatmaps = np.empty_like(result.heatmaps)
    assert viewers.resize(result.maps, (33, 70), heatmaps_out=heatmaps) is heatmaps
    assert np.abs(heatmaps - result.heatmaps).max() <= 4 * EPS
    overlay = dict(case.overlay)
    overlays = np.empty_like(result.overlays)
    assert viewers.colorize(result.maps, overlay.pop("images"), **overlay, overlays_out=overlays) is overlays
    # The reference rounds its maps to float32 in between, which may move a value across the border of two colours.
    assert np.count_nonzero((overlays != result.overlays).any(axis=-1)) <= 2


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("n", [1, 7])
def test_threads_change_no_bit(
    viewers: Kernels, rng: np.random.Generator, weighting: Weighting, last: bool, n: int
) -> None:
    # Several slices of channels or pixels, and several bands of rows.
    case = random_case(rng, (n, 300, 33, 31), 2, weighting=weighting, last=last, size=(400, 400), overlay=n == 1)
    serial = case.run(viewers, threads=1)
    for threads in (2, 5, None):
        parallel = case.run(viewers, threads=threads)
        assert same_bits(serial, parallel)


def test_many_callers_get_what_one_gets(rng: np.random.Generator) -> None:
    work = [random_case(rng, (2, 100, 20, 20 + i), 3, size=(150, 160), overlay=True) for i in range(6)]
    expected = [case.run(cpu.KERNELS, threads=1) for case in work]
    wrong: list[int] = []
    start = threading.Barrier(len(work))

    def call(index: int) -> None:
        start.wait()
        for _ in range(20):
            result = work[index].run(cpu.KERNELS, threads=3)
            if not same_bits(result, expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(work))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORK = """
import os, sys
import numpy as np
from fastcam import kernels
a = np.random.default_rng(0).random((4, 200, 30, 30), np.float32)
w = np.ones((4, 2, 200), np.float32)
before = kernels.render(a, w, size=(300, 300), threads=4).heatmaps
child = os.fork()
if child == 0:
    after = kernels.render(a, w, size=(300, 300), threads=4).heatmaps
    os._exit(0 if (after == before).all() else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
again = kernels.render(a, w, size=(300, 300), threads=4).heatmaps
sys.exit(status or not (again == before).all())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_with_a_running_pool() -> None:
    environment = os.environ | {"FASTCAM_BACKEND": "native"}
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60, env=environment)


# Against other libraries


def _resize_pairs() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return [((7, 7), (224, 224)), ((14, 14), (300, 200)), ((1, 9), (5, 4)), ((20, 30), (9, 13)), ((3, 5), (3, 5))]


@pytest.mark.parametrize(("source", "target"), _resize_pairs())
def test_resize_like_cv2(
    viewers: Kernels, rng: np.random.Generator, source: tuple[int, int], target: tuple[int, int]
) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless: pip install fastcam[peers]")
    maps = rng.random((1, 1, *source), np.float32)
    expected = cv2.resize(maps[0, 0], (target[1], target[0]), interpolation=cv2.INTER_LINEAR)
    # cv2 keeps positions in float32: off by eps times the largest position, times a slope of at most 1.
    assert np.abs(viewers.resize(maps, target)[0, 0] - expected).max() <= 4 * EPS * max(*source, *target)


@pytest.mark.parametrize(("source", "target"), _resize_pairs())
def test_resize_like_torch(
    viewers: Kernels, rng: np.random.Generator, source: tuple[int, int], target: tuple[int, int]
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    maps = rng.random((2, 3, *source), np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(maps), target, mode="bilinear", align_corners=False)
    assert np.abs(viewers.resize(maps, target) - expected.numpy()).max() <= 4 * EPS * max(*source, *target)


def test_pipeline_like_cv2(kernels: Kernels, rng: np.random.Generator) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless: pip install fastcam[peers]")
    case = random_case(rng, (1, 64, 7, 7), 1, size=(60, 80), overlay=True)
    result = case.run(kernels)
    assert result.overlays is not None
    cam = np.maximum(np.einsum("c,chw->hw", case.weights[0, 0], case.activations[0]), 0)
    heatmap = cv2.resize(cam / cam.max(), (80, 60), interpolation=cv2.INTER_LINEAR)
    assert relative_error(result.heatmaps[0, 0], heatmap) <= 1e-5
    colored = case.overlay["palette"][np.rint(255 * heatmap).astype(int)]
    expected = cv2.addWeighted(case.overlay["images"][0], 0.6, colored, 0.4, 0)
    difference = np.abs(result.overlays[0, 0].astype(int) - expected)
    # cv2 rounds halves differently; a value on the border of two colours may get either.
    assert np.count_nonzero((difference > 1).any(axis=-1)) <= 2


# The choice of the backend


def test_describe(kernels: Kernels) -> None:
    description = kernels.describe()
    assert set(description) == {"backend", "instruction_set", "threads"}
    if kernels is cpu.KERNELS:
        assert description["instruction_set"] == _cpu.instruction_set()
    assert public.describe()["backend"] == os.environ.get("FASTCAM_BACKEND", "native")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_environment_chooses_the_backend(backend: str) -> None:
    code = "from fastcam import kernels; print(kernels.describe()['backend'])"
    environment = os.environ | {"FASTCAM_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == backend


def test_unknown_backend() -> None:
    with pytest.raises(ArgumentError, match="FASTCAM_BACKEND is 'gpu': set it to 'native' or 'reference'"):
        public._load("gpu")


def test_environment_with_an_unknown_backend() -> None:
    environment = os.environ | {"FASTCAM_BACKEND": "gpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import fastcam.kernels"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode != 0
    assert "ArgumentError" in done.stderr
    assert "'native' or 'reference'" in done.stderr


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _cpu.use_instruction_set("mmx")


# Calls of the Explainer between two forward passes


@pytest.mark.parametrize("normalize", ["max", "minmax", None])
@pytest.mark.parametrize("size", [None, (11, 13)])
def test_render_outputs_is_render(
    kernels: Kernels, rng: np.random.Generator, normalize: Normalize, size: tuple[int, int] | None
) -> None:
    case = random_case(rng, normalize=normalize, size=size)
    expected = case.run(kernels)
    found = kernels.render_outputs(case.activations, case.weights, normalize, size, None)
    np.testing.assert_array_equal(found.maps, expected.maps)
    np.testing.assert_array_equal(found.heatmaps, expected.heatmaps)
    case.activations[1, 2, 3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="image 1 is not finite") as caught:
        kernels.render_outputs(case.activations, case.weights, normalize, size, 1)
    assert caught.value.image == 1


def resized_by_pillow(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """To the width, then to the height."""
    picture = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


SIDES = st.one_of(st.integers(1, 12), st.integers(1, 90), st.integers(1, 600))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.tuples(SIDES, SIDES),
    target=st.tuples(SIDES, SIDES),
    # With only black and white, many sums are exactly halfway between two levels.
    values=st.sampled_from([(0, 255), tuple(range(256))]),
    last=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_prepare_is_pillow_and_the_levels(
    viewers: Kernels,
    source: tuple[int, int],
    target: tuple[int, int],
    values: tuple[int, ...],
    last: bool,
    reverse: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.choice(np.array(values, np.uint8), (*source, 3))
    levels = rng.normal(size=(3, 256)).astype(np.float32)
    found = np.full((*target, 3) if last else (3, *target), np.nan, np.float32)
    viewers.prepare(image, levels, found, reversed_order=reverse, channels_last=last)
    pixels = resized_by_pillow(image, *target)
    planes = [levels[c][pixels[..., 2 - c if reverse else c]] for c in range(3)]
    np.testing.assert_array_equal(found, np.stack(planes, -1 if last else 0))


@pytest.mark.parametrize("side", [(1, 300_000), (300_000, 1)])
def test_prepare_shrinks_much(viewers: Kernels, side: tuple[int, int]) -> None:
    """Thousands of weights per pixel, whose rounding errors add up."""
    levels = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    found = np.empty((1, 1, 3), np.float32)
    image = np.full((*side, 3), 255, np.uint8)
    viewers.prepare(image, levels, found)
    np.testing.assert_array_equal(found, resized_by_pillow(image, 1, 1))


@pytest.mark.parametrize("columns", [(1,), (7,), (3, 5, 5), (130,)])
def test_first_not_finite(kernels: Kernels, rng: np.random.Generator, columns: tuple[int, ...]) -> None:
    array = rng.normal(size=(4, *columns)).astype(np.float32)
    array[0] = np.finfo(np.float32).max
    assert kernels.first_not_finite(array) is None
    assert kernels.first_not_finite(array[:0]) is None
    for value in (np.nan, np.inf, -np.inf):
        broken = array.copy()
        broken.reshape(4, -1)[2, -1] = value
        broken.reshape(4, -1)[3, 0] = value
        assert kernels.first_not_finite(broken) == 2


def test_first_not_finite_reads_no_other_memory() -> None:
    arrays: list[Any] = [np.zeros((2, 2)), np.zeros((4, 4), np.float32)[:, ::2], np.float32(0)]
    for wrong in arrays:
        with pytest.raises((ValueError, TypeError), match="array"):
            _cpu.first_not_finite(wrong)
