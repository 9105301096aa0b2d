"""Arrays of other libraries on the device, in and out, without a copy through the host and in stream order."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDevice, Fault, contents, install
from networks import Array, export_two_layers, relative_error

import fastcam
from fastcam.errors import ArgumentError, ImageError, NonFiniteError
from fastcam.explaining.devices.exchange import DeviceTensor, borrow, is_on_device
from fastcam.kernels.cuda.interface import DeviceArray

_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_two_layers(tmp_path_factory.mktemp("exchange"))


@pytest.fixture(scope="module")
def on_cpu(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, device="cpu", threads=1)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def explainer(device: FakeDevice, path: Path, monkeypatch: pytest.MonkeyPatch) -> fastcam.Explainer:
    install(device, monkeypatch)
    return fastcam.Explainer(path, device="cuda", threads=1)


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(5, 3, 12, 12)).astype(np.float32)


class Producer:
    """An array of another library, which that library's stream is about to fill."""

    def __init__(self, device: FakeDevice, values: Array, index: int = 0) -> None:
        self.shape, self.dtype = values.shape, values.dtype
        self.device_index = index
        self.stream = device.stream_create()
        self._device = device
        self._tensor = DeviceTensor(device, values.shape, values.dtype)
        dtype: Any = values.dtype.name
        array = DeviceArray(self._tensor.pointer, values.shape, dtype)
        device.enqueue(self.stream, "produce", [], [array], lambda: contents(array).__setitem__(..., values))

    def __del__(self) -> None:
        # A library frees nothing that its stream still writes to.
        self._device.stream_synchronize(self.stream)


class DLPackProducer(Producer):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device_index

    def __dlpack__(self, *, stream: Any = None) -> object:
        event = self._device.event_create()
        self._device.event_record(event, self.stream)
        self._device.stream_wait_event(stream, event)
        return self._tensor.__dlpack__()


class CarelessProducer(DLPackProducer):
    """Ignores the consumer's stream."""

    def __dlpack__(self, *, stream: Any = None) -> object:
        return self._tensor.__dlpack__()


class InterfaceProducer(Producer):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._tensor.__cuda_array_interface__, "stream": self.stream}


class SilentProducer(InterfaceProducer):
    """Claims that there is nothing to wait for, although there is."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**super().__cuda_array_interface__, "stream": None}


@pytest.mark.parametrize("chunk", [1, 2, 16])
@pytest.mark.parametrize("producer", [DLPackProducer, InterfaceProducer])
def test_batches_on_the_device(
    explainer: fastcam.Explainer,
    on_cpu: fastcam.Explainer,
    device: FakeDevice,
    batch: Array,
    producer: type[DLPackProducer | InterfaceProducer],
    chunk: int,
) -> None:
    expected = on_cpu(batch, "top2", batch_size=chunk)
    found = explainer(producer(device, batch), "top2", batch_size=chunk)
    assert relative_error(found.heatmaps, expected.heatmaps) < _TOLERANCE
    assert relative_error(found.logits, expected.logits) < _TOLERANCE
    np.testing.assert_array_equal(found.targets, expected.targets)
    assert found.images == [None] * 5
    # Only the targets are uploaded.
    assert all(entry[3] <= 256 for entry in device.log if entry[0] == "copy_in")


@pytest.mark.parametrize("producer", [DLPackProducer, InterfaceProducer])
def test_pictures_on_the_device(
    explainer: fastcam.Explainer,
    on_cpu: fastcam.Explainer,
    device: FakeDevice,
    rng: np.random.Generator,
    producer: type[DLPackProducer | InterfaceProducer],
) -> None:
    pictures = rng.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    found, expected = explainer(producer(device, pictures), batch_size=2), on_cpu(pictures, batch_size=2)
    assert relative_error(found.heatmaps, expected.heatmaps) < _TOLERANCE
    assert relative_error(found.logits, expected.logits) < _TOLERANCE


@pytest.mark.parametrize("producer", [CarelessProducer, SilentProducer])
def test_an_array_that_is_taken_too_early_is_found(
    explainer: fastcam.Explainer,
    device: FakeDevice,
    batch: Array,
    producer: type[DLPackProducer | InterfaceProducer],
) -> None:
    with pytest.raises(Fault, match="not ordered after produce"):
        explainer(producer(device, batch))


def test_version_2_of_the_interface_means_the_default_stream(
    device: FakeDevice, batch: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    producer = InterfaceProducer(device, batch)
    interface = {**producer.__cuda_array_interface__, "version": 2}
    del interface["stream"]

    class Old:
        __cuda_array_interface__ = interface

    monkeypatch.setattr(device, "event_record", lambda event, stream: waited.append(stream))
    assert borrow(Old(), device, device.stream_create()).pointer == interface["data"][0]
    assert waited == [1]


def _strided(device: FakeDevice, batch: Array) -> Any:
    producer = InterfaceProducer(device, batch)
    interface = {**producer.__cuda_array_interface__, "strides": batch.strides[::-1]}

    class Strided:
        shape, dtype = batch.shape, batch.dtype
        __cuda_array_interface__ = interface

    return Strided()


class _Refuses(DLPackProducer):
    def __dlpack__(self, *, stream: Any = None) -> object:
        raise BufferError("requires gradients")


_BAD_ARRAYS: dict[str, tuple[Callable[[FakeDevice, Array], Any], str]] = {
    "shape": (
        lambda device, batch: DLPackProducer(device, batch[:, :2]),
        r"is float32 \(5, 2, 12, 12\); the model takes",
    ),
    "one picture": (lambda device, batch: DLPackProducer(device, batch[0]), "the model takes float32"),
    "dtype": (lambda device, batch: DLPackProducer(device, batch.astype(np.float64)), "is float64"),
    "empty": (lambda device, batch: DLPackProducer(device, batch[:0]), "no images"),
    "other device": (lambda device, batch: DLPackProducer(device, batch, index=3), r'on device 3, .*device="cuda:3"'),
    "strides": (_strided, "make it contiguous"),
    "refusal": (_Refuses, "cannot take the _Refuses on the device: requires grad"),
    "nan": (lambda device, batch: DLPackProducer(device, np.where(batch > 2, np.nan, batch)), "image 0 of the batch"),
}


@pytest.mark.parametrize("name", _BAD_ARRAYS)
def test_a_bad_array_is_named(explainer: fastcam.Explainer, device: FakeDevice, batch: Array, name: str) -> None:
    make, message = _BAD_ARRAYS[name]
    batch[0, 0, 0, 0] = 3
    with pytest.raises(ImageError, match=message):
        explainer(make(device, batch))
    assert len(explainer(DLPackProducer(device, batch))) == 5


def test_nan_in_a_later_batch_names_its_image(explainer: fastcam.Explainer, device: FakeDevice, batch: Array) -> None:
    batch[3, 1, 2, 2] = np.inf
    for method in ("gradcam", "layercam"):
        with pytest.raises(ImageError, match="image 3 of the batch holds NaN or infinity"):
            explainer(DLPackProducer(device, batch), batch_size=2, method=method)


@pytest.mark.parametrize("size", ["input", "layer", (7, 9)])
@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_results_on_the_device(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, device: FakeDevice, batch: Array, size: Any, chunk: int
) -> None:
    expected = on_cpu(batch, "top2", size=size)
    found = explainer(DLPackProducer(device, batch), "top2", size=size, batch_size=chunk, on_device=True)
    # Only the error flags and the explained classes are downloaded, not the maps.
    assert sum(entry[3] for entry in device.log if entry[0] == "copy_out") <= 5 * 5 * 256
    device.log.clear()
    assert len(found) == 5
    for name in ("heatmaps", "maps", "targets", "logits"):
        wanted, tensor = getattr(expected, name), getattr(found, name)
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
        # NumPy takes it by DLPack without waiting for anything.
        assert relative_error(np.from_dlpack(tensor), wanted) < _TOLERANCE
    assert device.host_waits() == 0
    host = found.to_host()
    assert relative_error(host.heatmaps, expected.heatmaps) < _TOLERANCE
    assert host[1].labels == expected[1].labels


def test_hirescam_stays_on_the_device_too(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, batch: Array
) -> None:
    found = explainer(batch, method="hirescam", on_device=True)
    assert relative_error(found.heatmaps.numpy(), on_cpu(batch, method="hirescam").heatmaps) < _TOLERANCE


def test_results_of_one_call_are_not_those_of_the_next(explainer: fastcam.Explainer, batch: Array) -> None:
    first = explainer(batch, on_device=True)
    before = first.heatmaps.numpy()
    explainer(batch[::-1].copy(), on_device=True)
    np.testing.assert_array_equal(first.heatmaps.numpy(), before)


def test_what_is_not_finite_is_an_error_on_the_device_too(explainer: fastcam.Explainer, batch: Array) -> None:
    batch[3] = 3e38
    with pytest.raises(NonFiniteError, match="scores of image 3"):
        explainer(batch, on_device=True, batch_size=2)


def test_memory_lives_as_long_as_its_last_user(device: FakeDevice) -> None:
    before = device.used
    tensor = DeviceTensor(device, (2, 3), np.float32)
    array = np.from_dlpack(tensor)
    untaken = tensor.__dlpack__()
    del tensor
    gc.collect()
    assert device.used > before
    del untaken
    assert device.used > before
    del array
    assert device.used == before


def test_borrowed_memory_is_given_back(device: FakeDevice, batch: Array) -> None:
    before = device.used
    producer = DLPackProducer(device, batch)
    foreign = borrow(producer, device, device.stream_create())
    assert (foreign.shape, str(foreign.dtype)) == (batch.shape, str(batch.dtype))
    device.stream_synchronize(producer.stream)
    del producer
    assert device.used > before
    del foreign
    assert device.used == before


def test_what_is_on_a_device(device: FakeDevice, batch: Array) -> None:
    assert is_on_device(DLPackProducer(device, batch))
    assert is_on_device(InterfaceProducer(device, batch))
    assert not is_on_device(batch)
    assert not is_on_device("dog.jpg")


def test_the_cpu_says_that_it_is_no_gpu(on_cpu: fastcam.Explainer, device: FakeDevice, batch: Array) -> None:
    with pytest.raises(ArgumentError, match=r"the results cannot be on a GPU.*CPUExecutionProvider"):
        on_cpu(batch, on_device=True)
    with pytest.raises(ArgumentError, match="the images cannot be on a GPU"):
        on_cpu(DLPackProducer(device, batch))


@pytest.mark.parametrize("arguments", [{"method": "gradcam++"}, {"layer": ["block2", "block1"]}])
def test_what_the_host_draws_does_not_stay_on_the_device(
    explainer: fastcam.Explainer, batch: Array, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError, match="leave on_device out"):
        explainer(batch, on_device=True, **arguments)


def test_tensors_tell_what_they_are(device: FakeDevice) -> None:
    tensor = DeviceTensor(device, (2, 3), np.float32)
    interface = tensor.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["version"]) == ((2, 3), "<f4", 3)
    assert interface["data"] == (tensor.pointer, False)
    assert repr(tensor) == "DeviceTensor(shape=(2, 3), dtype=float32, device=0)"
    assert len(tensor) == 2


def test_torch_takes_results(device: FakeDevice, explainer: fastcam.Explainer, batch: Array) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[peers]")
    found = explainer(batch, on_device=True)
    heatmaps = torch.from_dlpack(found.heatmaps)
    expected = found.heatmaps.numpy()
    del found
    np.testing.assert_array_equal(heatmaps.numpy(), expected)
