"""`fastcam.render` against autograd, the specification and the emulated device kernels."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cam_formulas import cam
from fake_cuda import FakeDevice, contents
from numpy.typing import NDArray
from shim_kernels import ShimKernels

import fastcam
from fastcam.errors import ArgumentError, ImageError, KernelError, NonFiniteError
from fastcam.explaining import devices
from fastcam.explaining.devices import exchange
from fastcam.explaining.devices.exchange import DeviceTensor
from fastcam.explaining.methods import FORMULAS
from fastcam.kernels.boundary import Normalize
from fastcam.kernels.cuda.interface import DeviceArray, DeviceKernels, DeviceRender
from fastcam.kernels.reference import blended, normalized, resized, weighted_sum
from fastcam.pictures.writing import palette

Array = NDArray[Any]
_TOLERANCE = 1e-5  # the numeric contract of kernels: relative L2 error of a float32 result


def _error(found: Any, expected: Array) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def _moved(array: Array) -> Array:
    """Channels last, as in TensorFlow, for arrays with a map."""
    return np.ascontiguousarray(np.moveaxis(array, -3, -1)) if array.ndim > 3 else array


def _case(rng: np.random.Generator, kind: str, dtype: Any = np.float32) -> tuple[Array, Array]:
    n, k, c, h, w = 3, 2, 24, 7, 6
    shapes = {"nc": (n, c), "nkc": (n, k, c), "nchw": (n, c, h, w), "nkchw": (n, k, c, h, w)}
    return rng.normal(size=(n, c, h, w)).astype(dtype), rng.normal(size=shapes[kind]).astype(dtype)


def _expected(activations: Array, weights: Array, method: str, normalize: Any, size: Any) -> tuple[Array, Array]:
    factors = weights if weights.ndim in (3, 5) else weights[:, None]
    weighting: Any = "channel" if factors.ndim == 3 else {"gradcam": "pooled", "hirescam": "element"}[method]
    maps = normalized(np.maximum(weighted_sum(activations, factors, weighting), 0), normalize)
    return maps, resized(maps, size or maps.shape[2:])


@pytest.mark.parametrize("kind", ["nc", "nkc", "nchw", "nkchw"])
@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_on_the_host(
    rng: np.random.Generator, kind: str, method: str, channels_last: bool, dtype: type[np.floating[Any]]
) -> None:
    activations, weights = _case(rng, kind, dtype)
    if method == "hirescam" and kind in ("nc", "nkc"):
        with pytest.raises(ArgumentError, match="needs the full gradients"):
            fastcam.render(activations, weights, method=method)
        return
    normalizations: list[Normalize] = ["max", "minmax", None]
    for normalize, size in itertools.product(normalizations, (None, (20, 31))):
        given = (_moved(activations), _moved(weights)) if channels_last else (activations, weights)
        found = fastcam.render(
            *given, method=method, channels_last=channels_last, normalize=normalize, size=size, threads=1
        )
        for array, expected in zip(found, _expected(activations, weights, method, normalize, size), strict=False):
            assert _error(array, expected) < _TOLERANCE
        assert found.overlays is None


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("memory", ["first", "last"])
def test_every_method_agrees_with_torchs_gradients(method: str, memory: str) -> None:
    """Maps from hooks: activations and gradients from torch's autograd, in either memory format."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    head = torch.nn.Sequential(
        torch.nn.Conv2d(8, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 49, 4)
    )
    activations = features(torch.rand(5, 3, 9, 9))
    if memory == "last":
        activations = activations.to(memory_format=torch.channels_last)
    activations.retain_grad()
    head(activations)[:, 2].sum().backward()
    found = fastcam.render(activations, activations.grad, method=method, normalize=None)
    a, g = (item.detach().double().numpy() for item in (activations, activations.grad))
    expected = cam(method, a, g[:, None])
    assert _error(found.maps, expected) < _TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_of_each_type(rng: np.random.Generator, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    activations, weights = (torch.tensor(item).to(getattr(torch, dtype)) for item in _case(rng, "nkchw"))
    maps, _ = _expected(activations.double().numpy(), weights.double().numpy(), "gradcam", "max", None)
    assert _error(fastcam.render(activations.requires_grad_(), weights).maps, maps) < _TOLERANCE


def test_overlays_on_the_host(rng: np.random.Generator) -> None:
    activations, weights = _case(rng, "nkc")
    images = rng.integers(0, 256, (3, 20, 31, 3), dtype=np.uint8)
    found = fastcam.render(activations, weights, images=images, colormap="viridis", alpha=0.25)
    _, heatmaps = _expected(activations, weights, "gradcam", "max", (20, 31))
    expected = blended(heatmaps, images, palette("viridis"), 0.25)
    assert found.overlays is not None
    assert found.overlays.shape == expected.shape
    # float32 heatmaps may fall on the other side of a colour's edge, one step of the table: few pixels, small errors.
    difference = np.abs(found.overlays.astype(int) - expected)
    assert (difference > 1).mean() < 1e-3
    assert difference.max() <= 4


def test_arrays_that_are_not_dense_are_copied(rng: np.random.Generator) -> None:
    activations, weights = _case(rng, "nkchw")
    expected = fastcam.render(activations, weights).maps
    wide = np.repeat(activations, 2, axis=3)[..., ::2]
    shifted = np.frombuffer(b"\0" + weights.tobytes(), np.float32, offset=1).reshape(weights.shape)
    np.testing.assert_array_equal(fastcam.render(wide, shifted).maps, expected)
    # Activations and gradients in different orders.
    last = _moved(activations).transpose(0, 3, 1, 2), _moved(weights).transpose(0, 1, 4, 2, 3)
    for mixed in ((last[0], weights), (activations, last[1])):
        assert _error(fastcam.render(*mixed).maps, expected) < _TOLERANCE


_ODD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"activations": np.zeros((2, 3), np.float32)}, ArgumentError, r"activations: shape \(2, 3\)"),
    "channels": ({"weights": np.zeros((3, 2, 5), np.float32)}, ArgumentError, r"need weights \(3, K, 24\)"),
    "images": ({"weights": np.zeros((2, 24), np.float32)}, ArgumentError, "weights_or_gradients: shape"),
    "scalars": ({"weights": np.float32(1)}, ArgumentError, "weights_or_gradients: shape"),
    "doubles": ({"activations": np.zeros((3, 24, 7, 6))}, KernelError, "activations: dtype '<f8'"),
    "objects": ({"activations": object()}, ArgumentError, r"activations: shape \(\)"),
    "method": ({"method": "gradcan"}, ArgumentError, "did you mean 'gradcam'"),
    "size": ({"size": (0, 4)}, KernelError, "size"),
    "large": ({"size": (2**20, 2**20)}, ArgumentError, r"2\*\*28"),
    "normalize": ({"normalize": "l2"}, KernelError, "normalize: 'l2'"),
    "picture sizes": ({"images": np.zeros((3, 9, 9), np.uint8)}, ArgumentError, r"images: shape \(3, 9, 9\)"),
    "picture type": ({"images": np.zeros((3, 9, 9, 3), np.float32)}, KernelError, "images: dtype"),
    "raw overlays": (
        {"images": np.zeros((3, 9, 9, 3), np.uint8), "normalize": None},
        KernelError,
        "overlays need maps",
    ),
    "colormap": ({"images": np.zeros((3, 9, 9, 3), np.uint8), "colormap": ["jet"]}, ArgumentError, "colormap"),
    "alpha": ({"images": np.zeros((3, 9, 9, 3), np.uint8), "alpha": 2}, KernelError, "alpha: 2"),
}


@pytest.mark.parametrize("name", _ODD)
def test_what_does_not_fit_is_named(rng: np.random.Generator, name: str) -> None:
    changed, error, message = _ODD[name]
    activations, weights = _case(rng, "nkc")
    arguments = {"activations": activations, "weights": weights, **changed}
    with pytest.raises(error, match=message):
        fastcam.render(arguments.pop("activations"), arguments.pop("weights"), **arguments)


def test_what_is_not_finite_names_its_image(rng: np.random.Generator) -> None:
    activations, weights = _case(rng, "nkc")
    activations[1, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="map 0 of image 1") as caught:
        fastcam.render(activations, weights)
    assert caught.value.image == 1


class _ShimOnDevice(DeviceKernels):
    """The emulated kernels, which run when the fake device's stream gets to them."""

    def __init__(self, device: FakeDevice, shim: ShimKernels) -> None:
        self._device, self._shim = device, shim

    def workspace_bytes(self, *arguments: Any, **named: Any) -> int:
        return self._shim.workspace_bytes(*arguments, **named)

    def render(self, call: DeviceRender, stream: int) -> None:
        reads = [call.activations, call.weights]
        writes = [call.maps, call.finite, call.workspace]
        if call.heatmaps is not None:
            writes.append(call.heatmaps)
        if call.overlay is not None:
            reads += [call.overlay.images, call.overlay.palette]
            writes.append(call.overlay.out)
        self._device.enqueue(stream, "render", reads, writes, lambda: self._shim.render(call, stream))

    def prepare(self, call: Any, stream: int) -> None:
        raise NotImplementedError

    def check_rows(self, rows: Any, finite: Any, stream: int) -> None:
        raise NotImplementedError


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def shim(shim_library: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> ShimKernels:
    kernels = ShimKernels(shim_library)
    monkeypatch.setattr(devices, "open_device", lambda index: (device, _ShimOnDevice(device, kernels)))
    return kernels


class _OnDevice:
    """An array on the fake device, which its library's stream is about to fill; any strides, any type."""

    def __init__(
        self, device: FakeDevice, values: Array, dtype: str | None = None, offset: int = 0, index: int = 0
    ) -> None:
        self._index = index
        bits = values if dtype is None else _bfloat16(values)
        order = np.argsort([-stride for stride in bits.strides], kind="stable")
        dense = np.ascontiguousarray(bits.transpose(order))
        raw = np.concatenate([np.zeros(offset, np.uint8), dense.reshape(-1).view(np.uint8)])
        self.shape, self.dtype = values.shape, dtype or values.dtype.name
        self._device, self._tensor = device, DeviceTensor(device, raw.shape, np.uint8)
        self._strides = tuple(stride // bits.itemsize for stride in bits.strides)
        self._offset, self._itemsize = offset, bits.itemsize
        self.stream = device.stream_create()
        place = DeviceArray(self._tensor.pointer, raw.shape, "uint8")
        device.enqueue(self.stream, "produce", [], [place], lambda: contents(place).__setitem__(..., raw))

    def __del__(self) -> None:
        # A library frees nothing that its stream still writes to.
        self._device.stream_synchronize(self.stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._index

    def __dlpack__(self, *, stream: Any = None) -> object:
        event = self._device.event_create()
        self._device.event_record(event, self.stream)
        self._device.stream_wait_event(stream, event)
        return _capsule(self._tensor, self.shape, self._strides, self.dtype, self._offset)


def _bfloat16(values: Array) -> Array:
    """The upper half of float32's bits, in the same order of memory; the values have no lower half."""
    return (np.asarray(values, np.float32, order="K").view(np.uint32) >> 16).astype(np.uint16, order="K")


def _capsule(tensor: DeviceTensor, shape: Any, strides: Any, dtype: str, offset: int) -> object:
    capsule = tensor.__dlpack__()
    (number,) = (key for key, held in exchange._handed_out.items() if held[2] is tensor._block)
    managed, _, block = exchange._handed_out[number]
    described: Any = managed
    sides, steps = ((ctypes.c_int64 * len(shape))(*values) for values in (shape, strides))
    codes = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "uint8": (1, 8), "float64": (2, 64)}
    code, bits = codes[dtype]
    described.tensor.shape, described.tensor.strides, described.tensor.ndim = sides, steps, len(shape)
    described.tensor.dtype = exchange._DLDataType(code, bits, 1)
    described.tensor.byte_offset = offset
    exchange._handed_out[number] = (managed, (sides, steps), block)
    return capsule


def _halved(values: Array) -> Array:
    """Numbers that bfloat16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize(
    ("kind", "method"),
    [*itertools.product(["nc", "nkc", "nchw", "nkchw"], ["gradcam"]), ("nchw", "hirescam"), ("nkchw", "hirescam")],
)
@pytest.mark.parametrize("memory", ["first", "last in memory", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_on_the_device(
    shim: ShimKernels, device: FakeDevice, rng: np.random.Generator, kind: str, memory: str, dtype: str, method: str
) -> None:
    activations, weights = _case(rng, kind, np.float16 if dtype == "float16" else np.float32)
    if dtype == "bfloat16":
        activations, weights = _halved(activations), _halved(weights)
    given = [_moved(item) if memory != "first" else item for item in (activations, weights)]
    if memory == "last in memory":
        given = [np.moveaxis(item, -1, -3) if item.ndim > 3 else item for item in given]
    images = rng.integers(0, 256, (3, 20, 31, 3), dtype=np.uint8)
    arrays = [_OnDevice(device, item, "bfloat16" if dtype == "bfloat16" else None) for item in given]
    found: Any = fastcam.render(
        *arrays, method=method, channels_last=memory == "last", images=_OnDevice(device, images), alpha=0.25
    )
    maps, heatmaps = _expected(activations, weights, method, "max", (20, 31))
    assert _error(found.maps.numpy(), maps) < _TOLERANCE
    assert _error(found.heatmaps.numpy(), heatmaps) < _TOLERANCE
    difference = np.abs(found.overlays.numpy().astype(int) - blended(heatmaps, images, palette("jet"), 0.25))
    assert (difference > 1).mean() < 1e-3
    (first, second) = shim.launches
    typed = dtype in first.kernel or "_any_" in first.kernel
    assert typed
    assert ("_last_" in first.kernel) == (memory != "first")
    assert second.kernel == "cam_view"


def test_every_kernel_of_maps_is_reachable(shim: ShimKernels, device: FakeDevice, rng: np.random.Generator) -> None:
    """Public calls launch only kernels in this list, and each kernel is launched by one."""
    for dtype, last, (kind, method) in itertools.product(
        ("float32", "float16", "bfloat16"),
        (False, True),
        (("channel", "gradcam"), ("pooled", "gradcam"), ("element", "hirescam")),
    ):
        for k, (c, h, w) in itertools.product((1, 3, 6, 20), ((32, 4, 4), (3, 3, 3))):
            shape = (1, k, c) if kind == "channel" else (1, k, c, h, w)
            number = np.float16 if dtype == "float16" else np.float32
            values = [_halved(rng.normal(size=size)).astype(number) for size in ((1, c, h, w), shape)]
            arrays = [
                _OnDevice(device, _moved(item) if last else item, "bfloat16" if dtype == "bfloat16" else None)
                for item in values
            ]
            fastcam.render(*arrays, method=method, channels_last=last)
    launched = {launch.kernel for launch in shim.launches}
    assert launched == set(shim.kernel_names()) - {"cam_prepare", "cam_check_rows"}


def test_pictures_on_the_host_and_an_address_between_16_bytes(
    shim: ShimKernels, device: FakeDevice, rng: np.random.Generator
) -> None:
    activations, weights = _case(rng, "nkc")
    images = rng.integers(0, 256, (3, 20, 31, 3), dtype=np.uint8)
    shifted = _OnDevice(device, activations, offset=4), _OnDevice(device, weights, offset=8)
    found: Any = fastcam.render(*shifted, images=images)
    expected = fastcam.render(activations, weights, images=images)
    assert _error(found.heatmaps.numpy(), expected.heatmaps) < _TOLERANCE
    assert expected.overlays is not None
    assert (np.abs(found.overlays.numpy().astype(int) - expected.overlays) > 1).mean() < 1e-3


def test_memory_is_given_back(shim: ShimKernels, device: FakeDevice, rng: np.random.Generator) -> None:
    given = [_OnDevice(device, item) for item in _case(rng, "nkc")]
    before = device.used
    found = fastcam.render(*given)
    del found
    assert device.used == before
    assert device.count("stream_create") - device.count("stream_destroy") == 2  # those of the producers


def test_refusals_on_the_device(shim: ShimKernels, device: FakeDevice, rng: np.random.Generator) -> None:
    activations, weights = _case(rng, "nkchw")
    first, second = _OnDevice(device, activations), _OnDevice(device, weights)
    moved = _OnDevice(device, np.moveaxis(_moved(weights), -1, -3))
    wide: Any = _OnDevice(device, activations)
    wide._strides = (2016, 84, 12, 2)
    for arguments, error, message in (
        ((first, weights), ArgumentError, "one is on a GPU"),
        ((activations, second), ArgumentError, "one is on a GPU"),
        ((first, moved), ArgumentError, "different channel orders"),
        ((wide, second), ArgumentError, "make it contiguous"),
        ((_OnDevice(device, activations.astype(np.float64)), second), ArgumentError, "float64 on the device"),
    ):
        with pytest.raises(error, match=message):
            fastcam.render(*arguments)
    with pytest.raises(ArgumentError, match="computed on the host"):
        fastcam.render(first, second, method="layercam")
    with pytest.raises(ArgumentError, match="images are on a GPU"):
        fastcam.render(activations, weights, images=first)
    with pytest.raises(KernelError, match="overlays need maps"):
        fastcam.render(first, second, images=np.zeros((3, 7, 6, 3), np.uint8), normalize=None)
    with pytest.raises(ImageError, match="device 1"):
        fastcam.render(first, _OnDevice(device, weights, index=1))
    activations[2] = np.inf
    with pytest.raises(NonFiniteError) as caught:
        fastcam.render(_OnDevice(device, activations), second)
    assert caught.value.image == 2
