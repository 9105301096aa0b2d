"""The CUDA engine on a fake device: the CPU engine's results, and all the ordering that a real device needs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_cuda import FakeDevice, FakeSession, Fault, install
from networks import Array, NetworkBuilder, export_two_layers, overflowing_classifier, relative_error, small_classifier

import fastcam
from fastcam.errors import ArgumentError, DeviceError, FileFormatError, ImageError, NonFiniteError
from fastcam.explaining import explained_model as explained
from fastcam.explaining.engines import cuda

# The specification rounds once; the CPU's kernels sum in float32.
_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_two_layers(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def on_cpu(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, device="cpu", threads=1)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def opened(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Callable[..., fastcam.Explainer]:
    install(device, monkeypatch)

    def open_(path: Path, **arguments: Any) -> fastcam.Explainer:
        options: dict[str, Any] = {"device": "cuda", "threads": 1, **arguments}
        return fastcam.Explainer(path, **options)

    return open_


@pytest.fixture
def explainer(opened: Callable[..., fastcam.Explainer], path: Path) -> fastcam.Explainer:
    return opened(path)


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(7, 3, 12, 12)).astype(np.float32)


@pytest.fixture
def photos(rng: np.random.Generator) -> list[Array]:
    return [rng.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8) for n in range(7)]


def _session(explainer: fastcam.Explainer) -> FakeSession:
    session: Any = explainer._session
    assert isinstance(session, FakeSession)
    return session


def _assert_same(found: fastcam.Explanation, expected: fastcam.Explanation, tolerance: float = _TOLERANCE) -> None:
    np.testing.assert_array_equal(found.targets, expected.targets)
    for name in ("heatmaps", "maps", "logits"):
        actual, wanted = getattr(found, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) < tolerance, name
        # Each image separately: a misplaced batch would be hidden in the norm over all.
        for n in range(len(wanted)):
            assert relative_error(actual[n], wanted[n]) < tolerance, (name, n)


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "best class": {},
    "best three": {"target": "top3"},
    "a class an image": {"target": [[0], [1], [2], [3], [4], [0], [1]]},
    "layer's size": {"size": "layer"},
    "any size, raw": {"size": (9, 17), "normalize": None, "target": [1, 4]},
    "minmax": {"normalize": "minmax"},
    "second layer": {"layer": "block1"},
    "both layers": {"layer": ["block2", "block1"], "target": "top2"},
    "both at a size": {"layer": ["block2", "block1"], "size": (5, 6), "normalize": None},
    "hirescam": {"method": "hirescam", "target": "top2"},
    "gradcam++": {"method": "gradcam++"},
    "xgradcam": {"method": "xgradcam", "size": "layer"},
    "layercam of both": {"method": "layercam", "layer": ["block1", "block2"]},
}


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("name", _ARGUMENTS)
def test_it_gives_what_the_cpu_gives(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, batch: Array, name: str, chunk: int
) -> None:
    _assert_same(
        explainer(batch, batch_size=chunk, **_ARGUMENTS[name]), on_cpu(batch, batch_size=chunk, **_ARGUMENTS[name])
    )


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_pictures_are_prepared_on_the_device(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, device: FakeDevice, photos: list[Array], chunk: int
) -> None:
    found, expected = explainer(photos, "top2", batch_size=chunk), on_cpu(photos, "top2", batch_size=chunk)
    _assert_same(found, expected)
    np.testing.assert_array_equal(found.images[3], photos[3])
    # Bytes are uploaded, not floats: (N,12,12,3), in addition to the targets.
    uploaded = sum(entry[3] for entry in device.log if entry[0] == "copy_in")
    assert 7 * 432 <= uploaded < 7 * 432 * 2


@pytest.mark.parametrize("layout", ["NHWC", "grey"])
def test_other_inputs(
    opened: Callable[..., fastcam.Explainer], tmp_path: Path, photos: list[Array], layout: str
) -> None:
    net = NetworkBuilder(("batch", 8, 9, 3) if layout == "NHWC" else ("batch", 1, 8, 9))
    first = net.add("Transpose", net.input, perm=[0, 3, 1, 2]) if layout == "NHWC" else net.input
    last = net.add("Relu", net.conv(first, (4, 3 if layout == "NHWC" else 1, 3, 3)))
    logits = net.dense(net.add("Flatten", net.add("GlobalAveragePool", last)), (4, 5))
    preprocess = "vgg16" if layout == "NHWC" else "scale"
    fastcam.export(net.build(logits).to_model(), tmp_path / "other.onnx", preprocess=preprocess)
    _assert_same(
        opened(tmp_path / "other.onnx")(photos, batch_size=2), _on_cpu(tmp_path / "other.onnx")(photos, batch_size=2)
    )


def _on_cpu(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, device="cpu", threads=1)


@pytest.mark.parametrize("fixed", [1, 3])
def test_files_of_fixed_batch(
    opened: Callable[..., fastcam.Explainer], tmp_path: Path, batch: Array, fixed: int
) -> None:
    fastcam.export(small_classifier(batch=fixed, keeps_batch=True).to_model(), tmp_path / "fixed.onnx")
    targets = [[0], [1], [2], [3], [4], [0], [1]]
    _assert_same(opened(tmp_path / "fixed.onnx")(batch, targets), _on_cpu(tmp_path / "fixed.onnx")(batch, targets))


def test_the_host_waits_once_a_batch_and_not_in_between(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array
) -> None:
    explainer(batch)
    assert device.host_waits() == 1
    device.log.clear()
    explainer(batch, batch_size=2)
    assert device.host_waits() == device.count("model") == 4
    names = [entry[0] for entry in device.log]
    for position in [index for index, name in enumerate(names) if name == "model"]:
        assert names[position : position + 2] == ["model", "render"]


def test_nothing_is_allocated_after_the_first_call(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array, photos: list[Array]
) -> None:
    def call() -> None:
        explainer(batch, "top2", batch_size=4)
        explainer(photos, batch_size=4)
        explainer(batch[:1])

    call()
    call()
    device.log.clear()
    call()
    made = ("allocate", "allocate_pinned", "free", "free_pinned", "stream_create", "event_create", "io_binding")
    assert device.count(*made) == 0
    assert device.count("model") == 5


def test_a_batch_goes_up_while_the_last_one_computes(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array
) -> None:
    """Two batches are in flight before the host waits; no event orders the second's upload after the first's model."""
    explainer(batch, batch_size=2)
    names = [entry[0] for entry in device.log if entry[0] in ("copy_in", "model", "copy_out", "event_synchronize")]
    assert names[:7] == ["copy_in", "model", "copy_out", "copy_in", "model", "copy_out", "event_synchronize"]
    streams = {
        name: {entry[-1] for entry in device.log if entry[0] == name} for name in ("copy_in", "model", "copy_out")
    }
    up, compute, down = (stream for (stream,) in streams.values())
    assert len({up, compute, down}) == 3
    waits = [entry[1] for entry in device.log if entry[0] == "stream_wait_event"]
    assert up not in waits
    # The models of two batches follow one another without a copy of the first's results between them.
    assert {stream for stream in waits if stream == compute} == {compute}
    assert waits.count(compute) == waits.count(down) == 4


def _dropped(call: str, number: int) -> Callable[[FakeDevice, fastcam.Explainer], None]:
    return lambda device, explainer: device.dropped.add((call, number))


def _same_lane(device: FakeDevice, explainer: fastcam.Explainer) -> None:
    """Lend a lane again while its batch is in flight."""
    engine: Any = explainer._engine
    pool = engine._lanes
    lane = pool.take(wait=True)
    pool.take = lambda wait: lane
    pool.give_back = lambda lane: None


def _wrong_stream(name: str) -> Callable[[FakeDevice, fastcam.Explainer], None]:
    def plant(device: FakeDevice, explainer: fastcam.Explainer) -> None:
        setattr(explainer._engine, name, device.stream_create())

    return plant


def _frees_too_early(device: FakeDevice, explainer: fastcam.Explainer) -> None:
    engine: Any = explainer._engine
    run = engine._run

    def run_and_free(item: Any, limit: Any) -> None:
        run(item, limit)
        item.lane._memory.free()

    engine._run = run_and_free


def _session_on_another_stream(device: FakeDevice, explainer: fastcam.Explainer) -> None:
    _session(explainer).options["user_compute_stream"] = str(device.stream_create())


# Numbers count calls of that name: a batch makes 2 waits, 3 records and 1 synchronisation.
_FAULTS: dict[str, Callable[[FakeDevice, fastcam.Explainer], None]] = {
    "model does not wait for the upload": _dropped("stream_wait_event", 0),
    "second model does not wait for its upload": _dropped("stream_wait_event", 2),
    "download does not wait for the kernels": _dropped("stream_wait_event", 1),
    "last download does not wait": _dropped("stream_wait_event", 7),
    "upload is not recorded": _dropped("event_record", 0),
    "third upload is not recorded": _dropped("event_record", 6),
    "kernels are not recorded": _dropped("event_record", 1),
    "download is not recorded": _dropped("event_record", 2),
    "last download is not recorded": _dropped("event_record", 11),
    "first results are not waited for": _dropped("event_synchronize", 0),
    "last results are not waited for": _dropped("event_synchronize", 3),
    "a buffer is used too early": _same_lane,
    "kernels on another stream than the model": _wrong_stream("_stream"),
    "model on another stream than the kernels": _session_on_another_stream,
    "memory is freed too early": _frees_too_early,
}


@pytest.mark.parametrize("name", _FAULTS)
def test_a_mistake_in_the_order_is_found(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array, name: str
) -> None:
    _FAULTS[name](device, explainer)
    with pytest.raises(Fault):
        explainer(batch, batch_size=2)


def test_an_upload_on_the_models_stream_is_no_mistake(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, batch: Array
) -> None:
    """Slower but correct is not a fault: the detector does not require this exact order."""
    engine: Any = explainer._engine
    engine._up = engine._down = engine._stream
    _assert_same(explainer(batch, batch_size=2), on_cpu(batch, batch_size=2))


def test_a_session_that_waits_is_counted(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The purpose of the option: without it ONNX Runtime waits after each run."""
    monkeypatch.setattr(onnxruntime, "RunOptions", _Forgetful)
    explainer(batch, batch_size=2)
    assert device.host_waits() == 8


class _Forgetful:
    def add_run_config_entry(self, key: str, value: str) -> None:
        pass

    def get_run_config_entry(self, key: str) -> str:
        return ""


def test_a_batch_that_does_not_fit_is_halved_and_remembered(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, device: FakeDevice, batch: Array
) -> None:
    _session(explainer).largest = 2
    _assert_same(explainer(batch, "top2"), on_cpu(batch, "top2"))
    device.log.clear()
    explainer(batch)
    assert device.count("model") == 4
    assert device.count("stream_synchronize") == 0


def test_buffers_that_do_not_fit_are_halved(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, device: FakeDevice, batch: Array
) -> None:
    device.capacity = 40_000
    _assert_same(explainer(batch, size=(40, 40)), on_cpu(batch, size=(40, 40)))
    assert device.count("model") > 1
    assert device.used <= device.capacity


def test_one_image_that_does_not_fit_is_an_error(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array
) -> None:
    _session(explainer).largest = 0
    with pytest.raises(DeviceError, match=r"dogs\.onnx: 1 image\(s\) at once do not fit into the memory of device 0"):
        explainer(batch)
    _session(explainer).largest = None
    explainer(batch)


def test_a_device_that_no_longer_answers_is_an_error_each_time_and_never_a_wait(
    explainer: fastcam.Explainer, device: FakeDevice, batch: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error is reported, and no lane is lost: without one, the next call would wait forever."""
    explainer(batch)

    def fail(_: int) -> None:
        raise DeviceError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(device, "event_synchronize", fail)
        for _ in range(10):
            with pytest.raises(DeviceError, match="illegal memory access"):
                explainer(batch, batch_size=2)
    # This device does respond: it must finish before its memory is freed.
    for stream in tuple(device._streams):
        device.stream_synchronize(stream)


def test_two_batches_of_one_image_that_do_not_fit_go_one_by_one(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, device: FakeDevice, batch: Array
) -> None:
    explainer(batch[:1])
    device.capacity = device.used
    _assert_same(explainer(batch, batch_size=1), on_cpu(batch, batch_size=1))


def test_many_threads_at_once(
    explainer: fastcam.Explainer, on_cpu: fastcam.Explainer, device: FakeDevice, rng: np.random.Generator
) -> None:
    batches = [rng.normal(size=(n % 5 + 1, 3, 12, 12)).astype(np.float32) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: explainer(item, "top2", batch_size=2), batches))
    for item, explanation in zip(batches, found, strict=True):
        _assert_same(explanation, on_cpu(item, "top2", batch_size=2))
    assert device.count("event_create") <= 3 * cuda._MOST_LANES


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_what_is_not_finite_names_its_image(explainer: fastcam.Explainer, batch: Array, chunk: int) -> None:
    batch[3] = 3e38
    with pytest.raises(NonFiniteError, match="scores of image 3 are not finite") as caught:
        explainer(batch, batch_size=chunk)
    assert caught.value.image == 3
    # Lanes were returned: the next call finds them.
    for _ in range(10):
        with pytest.raises(NonFiniteError):
            explainer(batch, batch_size=chunk)
    assert len(explainer(batch[:3], batch_size=chunk)) == 3


def test_maps_that_are_not_finite_name_their_image(opened: Callable[..., fastcam.Explainer], tmp_path: Path) -> None:
    fastcam.export(overflowing_classifier().to_model(), tmp_path / "large.onnx", layer="layer")
    images = np.zeros((3, 3, 4, 4), np.float32)
    images[2] = 1
    for chunk in (1, 2, 16):
        with pytest.raises(NonFiniteError, match="activations or gradients of image 2") as caught:
            opened(tmp_path / "large.onnx")(images, batch_size=chunk)
        assert caught.value.image == 2


def test_graphs_hold_the_buffers_that_they_were_captured_with(
    opened: Callable[..., fastcam.Explainer], path: Path, on_cpu: fastcam.Explainer, batch: Array
) -> None:
    captured = opened(path, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    for _ in range(3):
        # Larger buffers move: earlier graphs must not be replayed for them.
        for count, size in ((1, (4, 4)), (7, (20, 20)), (3, (50, 50)), (7, (20, 20))):
            _assert_same(
                captured(batch[:count], size=size, batch_size=4), on_cpu(batch[:count], size=size, batch_size=4)
            )
    assert len(_session(captured).graphs) > 4


def test_options_of_the_provider(opened: Callable[..., fastcam.Explainer], path: Path) -> None:
    found = _session(opened(path)).options
    assert (found["use_tf32"], found["device_id"]) == ("0", "0")
    assert int(found["user_compute_stream"]) > 0
    wanted = [("CUDAExecutionProvider", {"use_tf32": "1", "cudnn_conv_algo_search": "DEFAULT"})]
    found = _session(opened(path, providers=wanted)).options
    assert (found["use_tf32"], found["cudnn_conv_algo_search"]) == ("1", "DEFAULT")
    with pytest.raises(ArgumentError, match="omit user_compute_stream"):
        opened(path, providers=[("CUDAExecutionProvider", {"user_compute_stream": "1"})])
    with pytest.raises(ArgumentError, match="device_id 'x' is not a number"):
        opened(path, providers=[("CUDAExecutionProvider", {"device_id": "x"})])


def test_a_file_without_preprocessing_refuses_pictures_before_anything_is_enqueued(
    opened: Callable[..., fastcam.Explainer], tmp_path: Path, device: FakeDevice, photos: list[Array]
) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "silent.onnx")
    with pytest.raises(ImageError, match="export it again with preprocess="):
        opened(tmp_path / "silent.onnx")(photos)
    assert device.count("copy_in") == 0


def test_everything_is_given_back(
    opened: Callable[..., fastcam.Explainer], path: Path, device: FakeDevice, batch: Array
) -> None:
    explainer = opened(path)
    explainer(batch, batch_size=2)
    assert device.used > 0
    streams = device.count("stream_create")
    del explainer
    assert device.used == 0
    assert device.count("event_create") == device.count("event_destroy")
    opened(path)
    # The stream of a closed session is reused by the next one.
    assert device.count("stream_create") - streams == 2


def test_an_open_layer_cannot_be_bound(
    opened: Callable[..., fastcam.Explainer], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = explained._signature

    def opened_up(path: Path, session: Any) -> Any:
        inputs, outputs = read(path, session)
        shape = ("batch", 8, "rows", 6)
        return inputs, {**outputs, "activations": outputs["activations"]._replace(shape=shape)}

    monkeypatch.setattr(explained, "_signature", opened_up)
    with pytest.raises(FileFormatError, match=r"output 'activations' has the dynamic shape .*'rows'.*device=\"cpu\""):
        opened(path)
