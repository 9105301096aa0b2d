"""Arguments that the kernels reject: the same in every backend, by name, before any memory is touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastcam.errors import KernelError
from fastcam.kernels import _cpu, cpu, reference
from fastcam.kernels.boundary import NORMALIZATIONS, Kernels

N, K, C, H, W = 2, 3, 4, 5, 6
BACKENDS = [pytest.param(cpu.KERNELS, id="native"), pytest.param(reference.KERNELS, id="reference")]


def misaligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array: NDArray[Any] = np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)
    return array


def read_only(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


def good_render() -> dict[str, Any]:
    return {
        "activations": np.ones((N, C, H, W), np.float32),
        "weights": np.ones((N, K, C), np.float32),
        "size": (8, 9),
        "images": np.zeros((N, 8, 9, 3), np.uint8),
        "palette": np.zeros((256, 3), np.uint8),
        "maps_out": np.empty((N, K, H, W), np.float32),
        "heatmaps_out": np.empty((N, K, 8, 9), np.float32),
        "overlays_out": np.empty((N, K, 8, 9, 3), np.uint8),
    }


def call_render(kernels: Kernels, arguments: dict[str, Any]) -> None:
    arguments = dict(arguments)
    kernels.render(arguments.pop("activations"), arguments.pop("weights"), **arguments)


# (argument, wrong value, part of the message); the value replaces the argument of `good_render`.
WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("activations", lambda: [[1.0]], "list; give a NumPy array"),
    ("activations", lambda: np.ones((N, C, H, W)), "dtype '<f8'; convert it to float32 or float16"),
    ("activations", lambda: np.ones((N, C, H, W), ">f4"), "native byte order"),
    ("activations", lambda: np.ones((N, C, H, W), np.int32), "dtype"),
    ("activations", lambda: np.ones((C, H, W), np.float32), "needs 4 axes"),
    ("activations", lambda: np.ones((N, 0, H, W), np.float32), "must be at least 1"),
    ("activations", lambda: np.ones((N, C, 0, W), np.float32), "must be at least 1"),
    ("activations", lambda: misaligned((N, C, H, W), np.float32), "not aligned"),
    ("activations", lambda: np.ones((N, C, H, 2 * W), np.float32)[..., ::2], "must be dense"),
    ("activations", lambda: np.ones((N, C, W, H), np.float32).swapaxes(2, 3), "must be dense"),
    ("activations", lambda: np.ones((N, C, H, W), np.float32)[:, ::-1], "must be dense"),
    ("activations", lambda: np.broadcast_to(np.ones((N, 1, H, W), np.float32), (N, C, H, W)), "must be dense"),
    ("weights", lambda: np.ones((N, K, C)), "dtype"),
    ("weights", lambda: np.ones((N, C), np.float32), "needs 3 axes"),
    ("weights", lambda: np.ones((N, K, C + 1), np.float32), "needs (N, K, C) = (2, K, 4)"),
    ("weights", lambda: np.ones((N + 1, K, C), np.float32), "needs (N, K, C)"),
    ("weights", lambda: np.ones((N, C, K), np.float32).swapaxes(1, 2), "must be dense"),
    ("weights", lambda: misaligned((N, K, C), np.float16), "not aligned"),
    ("weighting", lambda: "mean", "choose one of 'channel', 'pooled', 'element'"),
    ("weighting", lambda: None, "choose one of"),
    ("normalize", lambda: "l2", f"choose one of {', '.join(map(repr, NORMALIZATIONS))}"),
    ("normalize", lambda: ["max"], "choose one of"),
    ("normalize", lambda: None, "overlays need maps in 0..1"),
    ("size", lambda: (8,), "give (height, width)"),
    ("size", lambda: 8, "give (height, width)"),
    ("size", lambda: "ab", "give (height, width)"),
    ("size", lambda: (8.0, 9), "give (height, width)"),
    ("size", lambda: (0, 9), "at least 1"),
    ("size", lambda: (8, 2**31), "below 2**31"),
    ("images", lambda: np.zeros((N, 8, 9, 3)), "convert it to uint8"),
    ("images", lambda: np.zeros((N, 8, 9, 4), np.uint8), "needs (N, H, W, 3) = (2, 8, 9, 3)"),
    ("images", lambda: np.zeros((N, 9, 8, 3), np.uint8), "needs (N, H, W, 3)"),
    ("images", lambda: np.zeros((N, 3, 8, 9), np.uint8).transpose(0, 2, 3, 1), "must be dense"),
    ("images", lambda: None, "given without images"),
    ("palette", lambda: None, "need a palette"),
    ("palette", lambda: np.zeros((256, 3)), "convert it to uint8"),
    ("palette", lambda: np.zeros((255, 3), np.uint8), "needs (256, 3)"),
    ("palette", lambda: np.zeros((3, 256), np.uint8).T, "C-contiguous"),
    ("alpha", lambda: -0.1, "give 0 (the image) .. 1 (the colour)"),
    ("alpha", lambda: float("nan"), "give 0"),
    ("alpha", lambda: "half", "is not a number"),
    ("maps_out", lambda: np.empty((N, K, W, H), np.float32), "the result has shape (2, 3, 5, 6)"),
    ("maps_out", lambda: np.empty((N, K, H, W)), "dtype"),
    ("maps_out", lambda: np.empty((N, K, H, 2 * W), np.float32)[..., ::2], "C-contiguous"),
    ("maps_out", lambda: read_only((N, K, H, W), np.float32), "read-only"),
    ("maps_out", lambda: misaligned((N, K, H, W), np.float32), "not aligned"),
    ("heatmaps_out", lambda: np.empty((N, K, H, W), np.float32), "the result has shape (2, 3, 8, 9)"),
    ("heatmaps_out", lambda: np.empty((N, K, 8, 9), np.float16), "dtype"),
    ("heatmaps_out", lambda: read_only((N, K, 8, 9), np.float32), "read-only"),
    ("overlays_out", lambda: np.empty((N, K, 8, 9), np.uint8), "needs 5 axes"),
    ("overlays_out", lambda: np.empty((N, K, 8, 9, 3), np.int8), "dtype"),
    ("overlays_out", lambda: read_only((N, K, 8, 9, 3), np.uint8), "read-only"),
    ("threads", lambda: 0, "give 1..1024"),
    ("threads", lambda: 1.5, "is not a whole number"),
]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("argument", "wrong", "message"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)])
def test_render_refuses(kernels: Kernels, argument: str, wrong: Callable[[], Any], message: str) -> None:
    arguments = good_render() | {argument: wrong()}
    named = argument
    if argument == "normalize" and arguments["normalize"] is None:
        named = "images"
    if argument == "images" and arguments["images"] is None:
        named = "palette"
    with pytest.raises(KernelError) as caught:
        call_render(kernels, arguments)
    assert str(caught.value).startswith(f"{named}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_render_accepts_what_the_table_starts_from(kernels: Kernels) -> None:
    call_render(kernels, good_render())


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("weighting", ["pooled", "element"])
def test_weights_need_the_layout_of_the_activations(kernels: Kernels, weighting: Any) -> None:
    activations = np.ones((N, C, H, W), np.float32)
    last = np.ones((N, K, H, W, C), np.float32).transpose(0, 1, 4, 2, 3)
    with pytest.raises(KernelError, match="laid out as the activations"):
        kernels.render(activations, last, weighting=weighting)
    with pytest.raises(KernelError, match=r"needs \(N, K, C, h, w\) = \(2, K, 4, 5, 6\)"):
        kernels.render(activations, np.ones((N, K, C, W, H), np.float32), weighting=weighting)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("given", ["palette", "overlays_out"])
def test_overlay_arguments_need_images(kernels: Kernels, given: str) -> None:
    arguments = good_render()
    call = {name: arguments[name] for name in ("activations", "weights", given)}
    with pytest.raises(KernelError, match=f"{given}: given without images"):
        call_render(kernels, call)


def pools() -> list[tuple[str, str]]:
    outputs = ["maps_out", "heatmaps_out", "overlays_out"]
    inputs = ["activations", "weights", "images", "palette"]
    pairs = [(outputs[i], outputs[j]) for i in range(3) for j in range(i)]
    return pairs + [(output, other) for output in outputs for other in inputs]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("one", "other"), pools())
def test_overlap_is_refused(kernels: Kernels, one: str, other: str) -> None:
    arguments = good_render()
    memory = np.zeros(1 << 14, np.uint8)

    def place(name: str, offset: int) -> None:
        like = arguments[name]
        arguments[name] = memory[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)

    place(one, 0)
    place(other, arguments[one].nbytes)
    call_render(kernels, arguments)  # neighbours are fine
    place(other, arguments[one].nbytes - 4)
    with pytest.raises(KernelError, match=f"{one}: shares memory with {other}|{other}: shares memory with {one}"):
        call_render(kernels, arguments)


VIEWS: list[tuple[str, Callable[[], Any], str]] = [
    ("maps", lambda: np.zeros((N, K, H, W)), "convert it to float32"),
    ("maps", lambda: np.zeros((N, K, H, W), np.float16), "convert it to float32"),
    ("maps", lambda: np.zeros((N, K, 0, W), np.float32), "at least 1"),
    ("maps", lambda: np.zeros((N, K, H, 2 * W), np.float32)[..., ::2], "ascontiguousarray"),
    ("maps", lambda: misaligned((N, K, H, W), np.float32), "not aligned"),
]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("argument", "wrong", "message"), VIEWS)
def test_views_refuse_maps(kernels: Kernels, argument: str, wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(KernelError, match=f"{argument}: .*{message}"):
        kernels.resize(wrong(), (8, 9))
    with pytest.raises(KernelError, match=f"{argument}: .*{message}"):
        kernels.colorize(wrong(), np.zeros((N, 8, 9, 3), np.uint8), palette=np.zeros((256, 3), np.uint8))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_views_refuse_the_rest(kernels: Kernels) -> None:
    maps = np.zeros((N, K, H, W), np.float32)
    images, palette = np.zeros((N, 8, 9, 3), np.uint8), np.zeros((256, 3), np.uint8)
    with pytest.raises(KernelError, match="size: "):
        kernels.resize(maps, (0, 1))
    with pytest.raises(KernelError, match="heatmaps_out: shape"):
        kernels.resize(maps, (8, 9), heatmaps_out=np.empty((N, K, 9, 8), np.float32))
    with pytest.raises(KernelError, match="heatmaps_out: shares memory with maps"):
        kernels.resize(maps, (H, W), heatmaps_out=maps)
    with pytest.raises(KernelError, match="images: shape"):
        kernels.colorize(maps, images[:1], palette=palette)
    with pytest.raises(KernelError, match="images: shape"):
        kernels.colorize(maps, images[:, :0], palette=palette)
    with pytest.raises(KernelError, match="palette: "):
        kernels.colorize(maps, images, palette=palette[:10])
    with pytest.raises(KernelError, match="overlays_out: shape"):
        kernels.colorize(maps, images, palette=palette, overlays_out=np.empty((N, K, 9, 8, 3), np.uint8))


def good_prepare() -> dict[str, Any]:
    return {
        "image": np.zeros((H, W, 3), np.uint8),
        "levels": np.zeros((3, 256), np.float32),
        "input_out": np.empty((8, 9, 3), np.float32),
    }


# (argument, wrong value, part of the message)
PREPARES: list[tuple[str, Callable[[], Any], str]] = [
    ("image", lambda: [[1]], "list; give a NumPy array"),
    ("image", lambda: np.zeros((H, W, 3)), "dtype '<f8'; convert it to uint8"),
    ("image", lambda: np.zeros((H, W), np.uint8), "needs 3 axes"),
    ("image", lambda: np.zeros((H, W, 4), np.uint8), "needs (H, W, 3)"),
    ("image", lambda: np.zeros((0, W, 3), np.uint8), "at least 1"),
    ("image", lambda: np.zeros((H, 2 * W, 3), np.uint8)[:, ::2], "C-contiguous"),
    ("image", lambda: np.zeros((9 * 2**21, 1, 3), np.uint8), "too large for an input of 8 x 9"),
    ("levels", lambda: np.zeros((3, 256)), "dtype"),
    ("levels", lambda: np.zeros((3, 255), np.float32), "needs (3, 256)"),
    ("levels", lambda: np.zeros((256, 3), np.float32).T, "C-contiguous"),
    ("levels", lambda: misaligned((3, 256), np.float32), "not aligned"),
    ("input_out", lambda: np.empty((8, 9, 3)), "dtype"),
    ("input_out", lambda: np.empty((1, 8, 9, 3), np.float32), "needs 3 axes"),
    ("input_out", lambda: np.empty((3, 8, 9), np.float32), "the result has shape (3, 8, 3)"),
    ("input_out", lambda: np.empty((8, 0, 3), np.float32), "at least 1"),
    ("input_out", lambda: np.empty((8, 18, 3), np.float32)[:, ::2], "C-contiguous"),
    ("input_out", lambda: read_only((8, 9, 3), np.float32), "read-only"),
]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(
    ("argument", "wrong", "message"), PREPARES, ids=[f"{w[0]}-{i}" for i, w in enumerate(PREPARES)]
)
def test_prepare_refuses(kernels: Kernels, argument: str, wrong: Callable[[], Any], message: str) -> None:
    kernels.prepare(**good_prepare())
    with pytest.raises(KernelError, match=re.escape(message)) as caught:
        kernels.prepare(**(good_prepare() | {argument: wrong()}))
    assert str(caught.value).startswith(f"{argument}: ")


@pytest.mark.parametrize("kernels", BACKENDS)
def test_prepare_needs_memory_of_its_own(kernels: Kernels) -> None:
    arguments = good_prepare()
    arguments["input_out"] = arguments["levels"].reshape(-1)[: 8 * 9 * 3].reshape(8, 9, 3)
    with pytest.raises(KernelError, match="input_out: shares memory with levels"):
        kernels.prepare(**arguments)


# The native module by itself: only the checks that keep memory safe.


def native_render(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "activations": np.ones((N, C, H, W), np.float32),
        "weights": np.ones((N, K, C), np.float32),
        "weighting": _cpu.Weighting.channel,
        "normalization": _cpu.Normalization.max,
        "channels_last": False,
        "maps": np.empty((N, K, H, W), np.float32),
        "evidence": np.empty((N, K), np.float32),
        "heatmaps": np.empty((N, K, 8, 9), np.float32),
        "images": np.zeros((N, 8, 9, 3), np.uint8),
        "palette": np.zeros((256, 3), np.uint8),
        "alpha": 0.5,
        "overlays": np.empty((N, K, 8, 9, 3), np.uint8),
        "threads": 2,
    }
    assert _cpu.render(**(arguments | changes)) is None


def native_view(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "maps": np.zeros((N, K, H, W), np.float32),
        "height": 8,
        "width": 9,
        "heatmaps": np.empty((N, K, 8, 9), np.float32),
        "images": np.zeros((N, 8, 9, 3), np.uint8),
        "palette": np.zeros((256, 3), np.uint8),
        "alpha": 0.5,
        "overlays": np.empty((N, K, 8, 9, 3), np.uint8),
        "threads": 2,
    }
    assert _cpu.view(**(arguments | changes)) is None


def native_prepare(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "image": np.zeros((H, W, 3), np.uint8),
        "levels": np.zeros((3, 256), np.float32),
        "reversed_order": False,
        "channels_last": True,
        "target": np.empty((8, 9, 3), np.float32),
    }
    _cpu.prepare(**(arguments | changes))


SHARED = np.zeros((N, K, 8, 9), np.float32)
NATIVE_RENDER: list[dict[str, Any]] = [
    {"activations": np.ones((C, H, W), np.float32)},
    {"activations": np.ones((N, C, H, W))},
    {"activations": np.ones((N, C, H, W), ">f4")},
    {"activations": np.ones((N, C, 0, W), np.float32)},
    {"activations": misaligned((N, C, H, W), np.float32)},
    {"activations": np.ones((N, C, H, 2 * W), np.float32)[..., ::2]},
    {"channels_last": True},
    {"weights": np.ones((N, K, C + 1), np.float32)},
    {"weights": np.ones((N, K, C, H, W), np.float32)},
    {"weighting": _cpu.Weighting.pooled},
    {"weights": np.ones((N, C, K), np.float32).swapaxes(1, 2)},
    {"maps": np.empty((N, K, H, W + 1), np.float32)},
    {"maps": np.empty((N, K, H, W))},
    {"maps": np.empty((N, K, H, 2 * W), np.float32)[..., ::2]},
    {"maps": read_only((N, K, H, W), np.float32)},
    {"heatmaps": np.empty((N, K + 1, 8, 9), np.float32)},
    {"heatmaps": np.empty((N, K, 8, 0), np.float32)},
    {"images": np.zeros((N, 8, 8, 3), np.uint8)},
    {"images": np.zeros((N, 8, 18, 3), np.uint8)[:, :, ::2]},
    {"palette": np.zeros((200, 3), np.uint8)},
    {"palette": None},
    {"overlays": None},
    {"overlays": np.empty((N, K, 8, 9, 4), np.uint8)},
    {"alpha": 2.0},
    {"alpha": float("nan")},
    {"heatmaps": SHARED, "overlays": SHARED.view(np.uint8).reshape(-1)[: N * K * 8 * 9 * 3].reshape(N, K, 8, 9, 3)},
]
NATIVE_VIEW: list[dict[str, Any]] = [
    {"maps": np.zeros((N, K, H, W))},
    {"maps": np.zeros((N, K, H, 2 * W), np.float32)[..., ::2]},
    {"maps": np.zeros((N, K, 0, W), np.float32)},
    {"height": 0},
    {"height": 7},
    {"images": np.zeros((N + 1, 8, 9, 3), np.uint8)},
    {"heatmaps": read_only((N, K, 8, 9), np.float32)},
    {"maps": SHARED, "heatmaps": SHARED},
]


@pytest.mark.parametrize("changes", NATIVE_RENDER, ids="-".join)
def test_native_render_is_memory_safe(changes: dict[str, Any]) -> None:
    native_render()
    with pytest.raises(ValueError, match=r"\S"):
        native_render(**changes)


@pytest.mark.parametrize("changes", NATIVE_VIEW, ids="-".join)
def test_native_view_is_memory_safe(changes: dict[str, Any]) -> None:
    native_view()
    with pytest.raises(ValueError, match=r"\S"):
        native_view(**changes)


LEVELS = np.zeros((3, 256), np.float32)
NATIVE_PREPARE: list[dict[str, Any]] = [
    {"image": np.zeros((H, W, 3))},
    {"image": np.zeros((H, W), np.uint8)},
    {"image": np.zeros((H, W, 4), np.uint8)},
    {"image": np.zeros((0, W, 3), np.uint8)},
    {"image": np.zeros((H, 2 * W, 3), np.uint8)[:, ::2]},
    {"image": np.zeros((9 * 2**21, 1, 3), np.uint8)},
    {"levels": np.zeros((3, 256))},
    {"levels": np.zeros((3, 255), np.float32)},
    {"levels": misaligned((3, 256), np.float32)},
    {"channels_last": False},
    {"target": np.empty((8, 9), np.float32)},
    {"target": np.empty((8, 9, 3))},
    {"target": np.empty((8, 9, 4), np.float32)},
    {"target": np.empty((8, 0, 3), np.float32)},
    {"target": np.empty((8, 18, 3), np.float32)[:, ::2]},
    {"target": read_only((8, 9, 3), np.float32)},
    {"levels": LEVELS, "target": LEVELS.reshape(-1)[: 8 * 9 * 3].reshape(8, 9, 3)},
]


@pytest.mark.parametrize("changes", NATIVE_PREPARE, ids="-".join)
def test_native_prepare_is_memory_safe(changes: dict[str, Any]) -> None:
    native_prepare()
    with pytest.raises(ValueError, match=r"\S"):
        native_prepare(**changes)
