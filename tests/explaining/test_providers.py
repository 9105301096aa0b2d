"""Devices by name: what "auto" takes, what keeps a device from starting, and that nothing falls back silently."""

from __future__ import annotations

import ctypes
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_cuda import FakeDevice, FakeSession, install, session_factory
from networks import relative_error, small_classifier

import fastcam
from fastcam.errors import ArgumentError, DeviceError, ModelError, TargetError
from fastcam.explaining import devices, providers
from fastcam.explaining.providers import CPU, CUDA, TENSORRT, Request, ask, find_problem, without_default


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("providers") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path)
    return path


class _Machine:
    """A machine with one NVIDIA device and everything that it needs; tests remove something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.libraries = {"libcuda.so.1", "libcudnn.so.9"}
        self.count = 1
        self.status = 0
        self.is_visible = True
        self.providers = [CUDA, CPU]
        self.backend: Any = object()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(ctypes, "CDLL", self._load)
        monkeypatch.setattr(providers, "_sees_device", lambda: self.is_visible)
        monkeypatch.setattr(providers, "find_backend", lambda: self.backend)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: self.providers)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libfoo.so"))
        providers.warn_of_cpu.cache_clear()

    def _load(self, name: str, **_: Any) -> Any:
        if name not in self.libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return types.SimpleNamespace(cuInit=lambda flags: self.status, cuDeviceGetCount=self._count)

    def _count(self, pointer: Any) -> int:
        pointer._obj.value = self.count
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Machine]:
    yield _Machine(monkeypatch)
    providers.warn_of_cpu.cache_clear()


def _no_driver(machine: _Machine) -> None:
    machine.libraries.remove("libcuda.so.1")


def _no_cudnn(machine: _Machine) -> None:
    machine.libraries.remove("libcudnn.so.9")


def _set(name: str, value: Any) -> Callable[[_Machine], None]:
    return lambda machine: setattr(machine, name, value)


_CAUSES: dict[str, tuple[Callable[[_Machine], None], str]] = {
    "driver": (_no_driver, r"there is no NVIDIA driver \(libcuda.*install it, or give the container its GPUs"),
    "provider": (_set("providers", [CPU]), r'no CUDAExecutionProvider: pip uninstall onnxruntime.*"fastcam\[gpu\]"'),
    "kernels": (_set("backend", None), r"no kernels for CUDA.*CuPy is missing.*nvcc"),
    "broken driver": (_set("status", 999), r"does not start \(CUDA error 999\): check whether nvidia-smi runs"),
    "no device": (_set("count", 0), "there is no CUDA device 0: the driver shows 0"),
    "cudnn": (_no_cudnn, r'cuDNN 9 is missing \(libcudnn.*"fastcam\[gpu\]"'),
}


@pytest.mark.parametrize("cause", _CAUSES)
def test_each_cause_is_named_with_its_remedy(machine: _Machine, path: Path, cause: str) -> None:
    take_away, message = _CAUSES[cause]
    assert find_problem(0) is None
    take_away(machine)
    with pytest.raises(DeviceError, match=r'device="cuda" could not start: .*' + message):
        fastcam.Explainer(path, device="cuda")


@pytest.mark.parametrize("cause", _CAUSES)
def test_auto_warns_once_where_a_gpu_goes_unused(machine: _Machine, path: Path, cause: str) -> None:
    take_away, message = _CAUSES[cause]
    take_away(machine)
    with pytest.warns(UserWarning, match=r"the model runs on the CPU, not on the GPU: .*" + message) as caught:
        explainers = [fastcam.Explainer(path) for _ in range(3)]
    assert len(caught) == 1
    assert all(explainer.providers == [CPU] for explainer in explainers)


@pytest.mark.parametrize("cause", _CAUSES)
def test_auto_is_silent_where_there_is_no_gpu(machine: _Machine, path: Path, cause: str) -> None:
    _CAUSES[cause][0](machine)
    machine.is_visible = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastcam.Explainer(path).providers == [CPU]


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_hidden_gpu_is_not_missed(machine: _Machine, path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert fastcam.Explainer(path).providers == [CPU]
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES hides every device"):
        fastcam.Explainer(path, device="cuda")


def test_a_second_device_that_is_not_there(machine: _Machine, path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no CUDA device 1: the driver shows 1, numbered from 0"):
        fastcam.Explainer(path, device="cuda:1")


def test_what_libraries_print_is_not_passed_on(machine: _Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_problem(0) is None
    assert capsys.readouterr().out == ""


def test_a_device_is_visible_by_its_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(providers, "Path", lambda name: tmp_path / name.strip("/"))
    assert not providers._sees_device()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert not providers._sees_device()
    (tmp_path / "dev" / "nvidia0").touch()
    assert providers._sees_device()


def test_auto_takes_cuda(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    install(device, monkeypatch)
    explainer = fastcam.Explainer(path, threads=1)
    assert explainer.providers[0] == CUDA
    explainer(np.zeros((1, 3, 12, 12), np.float32))
    assert device.count("render") == 1


def test_auto_falls_back_with_a_warning_where_the_session_does_not_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(FakeDevice(), monkeypatch)
    providers.warn_of_cpu.cache_clear()
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(FakeSession, "get_providers", lambda self: [CPU])
    with pytest.raises(DeviceError, match="CUDAExecutionProvider could not start: ONNX Runtime fell back to CPU"):
        fastcam.Explainer(path, device="cuda")
    with pytest.warns(UserWarning, match="runs on the CPU, not on the GPU: CUDAExecutionProvider could not start"):
        assert fastcam.Explainer(path).providers == [CPU]
    assert onnxruntime.InferenceSession is real
    providers.warn_of_cpu.cache_clear()


def test_named_providers_are_refused_like_devices(machine: _Machine, path: Path) -> None:
    _no_cudnn(machine)
    with pytest.raises(DeviceError, match="CUDAExecutionProvider could not start: cuDNN 9 is missing"):
        fastcam.Explainer(path, providers=[CUDA])


def test_devices_are_read() -> None:
    assert ask("cuda:1", None) == Request("cuda", 1, [])
    assert ask("tensorrt", None) == Request("tensorrt", 0, [])
    assert ask("auto", [(CUDA, {"device_id": 2}), CPU]) == Request("cuda", 2, [(CUDA, {"device_id": 2}), (CPU, {})])
    assert ask("auto", ["CoreMLExecutionProvider"]).kind == "cpu"
    wrong: list[Any] = ["cuda:", "cuda:x", "cpu:0", "auto:1", "gpu", "CUDA", None, 3]
    for name in wrong:
        with pytest.raises(ArgumentError, match="is not known; choose one of 'auto', 'cpu', 'cuda', 'openvino'"):
            ask(name, None)


class _RefusalError(Exception):
    """Like ONNX Runtime's own errors about models: not a RuntimeError."""


def _refuses_the_cpu(device: FakeDevice, *, always: bool) -> Callable[..., Any]:
    """Return a session factory that puts all ops on the CPU, as CUDA's provider does with ops on shapes."""
    make = session_factory(device)
    real = onnxruntime.InferenceSession

    def make_or_refuse(path: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
        if options.has_config_entry("session.disable_cpu_ep_fallback"):
            raise _RefusalError("... but fallback to CPU EP has been explicitly disabled by the user.")
        if always:
            raise _RefusalError("no such op")
        session = make(path, options, providers, enable_fallback)
        options.log_severity_level = 3
        session._session = real(path, options, providers=[CPU])
        return session

    return make_or_refuse


@contextmanager
def _options_that_tell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Options(onnxruntime.SessionOptions):
        def has_config_entry(self, key: str) -> bool:
            try:
                return bool(self.get_session_config_entry(key))
            except RuntimeError:
                return False

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Options)
        yield


def test_ops_on_the_cpu_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    make = _refuses_the_cpu(device, always=False)
    install(device, monkeypatch)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    with _options_that_tell(monkeypatch):
        with pytest.warns(UserWarning, match=r"has no kernels for Conv, .*MaxPool.*, which run on the CPU") as caught:
            fastcam.Explainer(path, device="cuda")
        # Shapes are on the CPU anyway.
        assert "Shape" not in str(caught[0].message)
        monkeypatch.setattr("fastcam.explaining.sessions._SHAPE_OPS", frozenset({"Shape"}))
        with pytest.warns(UserWarning, match="Concat"):
            fastcam.Explainer(path, device="cuda")
        # Callers who list the CPU accept that.
        assert fastcam.Explainer(path, providers=[CUDA, CPU]).providers[0] == CUDA


def test_a_file_that_cannot_be_loaded_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    make = _refuses_the_cpu(device, always=True)
    install(device, monkeypatch)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    with _options_that_tell(monkeypatch), pytest.raises(ModelError, match=r"dogs\.onnx: ONNX Runtime cannot load"):
        fastcam.Explainer(path, device="cuda")


def test_a_provider_that_does_not_start_is_no_fault_of_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA driver version is insufficient")

    install(FakeDevice(), monkeypatch)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    with pytest.raises(DeviceError, match="CUDAExecutionProvider could not start: CUDA driver version is insuff"):
        fastcam.Explainer(path, device="cuda")


def test_a_graph_of_tensorrts_own_is_refused(path: Path) -> None:
    with pytest.raises(ArgumentError, match="trt_cuda_graph_enable captures a single graph"):
        fastcam.Explainer(path, providers=[(TENSORRT, {"trt_cuda_graph_enable": "1"})])


class _TensorRT(types.ModuleType):
    """Stand-in for `fastcam.explaining.tensorrt`, which is tested elsewhere."""

    def __init__(self) -> None:
        super().__init__("fastcam.explaining.tensorrt")
        self.calls: list[Any] = []
        self.built = 0
        self.problem: str | None = None

    def this_machine(self, index: int) -> None:
        if self.problem is not None:
            raise DeviceError(self.problem)

    def plan(self, path: Path, *, device_id: int, stream: int) -> Any:
        self.this_machine(device_id)
        self.calls.append((device_id, stream))

        @contextmanager
        def building() -> Iterator[None]:
            self.built += 1
            yield

        options = {"user_compute_stream": str(stream), "trt_x": "1"}
        return types.SimpleNamespace(
            model=path,
            providers=[(TENSORRT, options), (CUDA, {"user_compute_stream": str(stream)})],
            building=building,
            batches=types.SimpleNamespace(largest=2),
            targets=types.SimpleNamespace(largest=3),
        )


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> _TensorRT:
    module = _TensorRT()
    monkeypatch.setattr("fastcam.explaining.providers.tensorrt", module)
    return module


def test_tensorrt_is_opened_by_its_plan(
    path: Path, monkeypatch: pytest.MonkeyPatch, tensorrt: _TensorRT, rng: np.random.Generator
) -> None:
    device = FakeDevice()
    install(device, monkeypatch)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    explainer = fastcam.Explainer(path, device="tensorrt", threads=1)
    assert explainer.providers[:2] == [TENSORRT, CUDA]
    assert (len(tensorrt.calls), tensorrt.built) == (1, 1)
    batch = rng.normal(size=(5, 3, 12, 12)).astype(np.float32)
    expected = fastcam.Explainer(path, device="cpu")(batch)
    np.testing.assert_allclose(explainer(batch).heatmaps, expected.heatmaps, atol=1e-5)
    # Its engine was built for at most two images.
    assert device.count("model") == 3
    with pytest.raises(TargetError, match="TensorRT's engine was built for at most 3"):
        explainer(batch, "top4")
    own = fastcam.Explainer(path, providers=[(TENSORRT, {"trt_x": "2", "trt_y": "3"})])
    session: Any = own._session
    assert (session.options["trt_x"], session.options["trt_y"]) == ("2", "3")
    listed = fastcam.Explainer(path, providers=[TENSORRT, (CUDA, {"user_compute_stream": "7", "a": "b"}), CPU])
    assert listed.providers[:3] == [TENSORRT, CUDA, CPU]


def test_info_says_why_a_provider_does_not_run(machine: _Machine, path: Path, tensorrt: _TensorRT) -> None:
    machine.providers = [TENSORRT, CUDA, CPU]
    _no_cudnn(machine)
    found = fastcam.inspect(path).providers
    assert found[CPU] is None
    assert "cuDNN 9 is missing" in str(found[CUDA])
    assert "cuDNN 9 is missing" in str(found[TENSORRT])
    machine.libraries.add("libcudnn.so.9")
    tensorrt.problem = "TensorRT is not installed"
    assert fastcam.inspect(path).providers[TENSORRT] == "TensorRT is not installed"
    tensorrt.problem = None
    assert fastcam.inspect(path).providers[TENSORRT] is None


def test_info_opens_the_file_on_cuda(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(FakeDevice(), monkeypatch)
    assert fastcam.inspect(path).providers[CUDA] is None


def test_no_backend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "BACKENDS", (devices.Backend("no_such_module", ("a", "b"), ("c", "d")),))
    assert devices.find_backend() is None
    with pytest.raises(DeviceError, match="there are no kernels for CUDA"):
        devices.open_device(0)


class _Folding:
    """A session that treats the default of ``target`` as a constant, as OpenVINO's provider does."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Any, inputs: dict[str, Any], options: Any = None) -> Any:
        return self._session.run(names, {**inputs, "target": np.full_like(inputs["target"], -1)}, options)


@pytest.mark.parametrize("target", [3, [3, 1], "top2", [[3], [1]]])
def test_a_provider_that_ignores_the_target_is_found_out(target: Any, tmp_path: Path) -> None:
    path = tmp_path / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet")
    images = np.random.default_rng(3).normal(size=(2, 3, 12, 12)).astype(np.float32)
    explainer = fastcam.Explainer(path, device="cpu")
    tops = explainer(images).targets
    assert not np.isin(tops, [1, 3]).any()
    engine: Any = explainer._engine
    runner = engine._runner
    runner._session = _Folding(runner._session)
    np.testing.assert_array_equal(explainer(images).targets, tops)
    with pytest.raises(ModelError, match=r'ignores the input "target".*target="required"'):
        explainer(images, target=target)


@pytest.mark.parametrize("draw", [None, "heatmaps"])
@pytest.mark.parametrize("kind", ["default", "required"])
def test_openvino_explains_what_it_is_asked_for(draw: str | None, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install fastcam[peers]")
    path = tmp_path / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet", draw=draw, target=kind)
    images = np.random.default_rng(3).normal(size=(5, 3, 12, 12)).astype(np.float32)
    explainer = fastcam.Explainer(path, device="openvino")
    assert explainer.providers == ["OpenVINO"]
    for target in (None, 3, "top3", [[1], [2], [0], [4], [3]]):
        expected = fastcam.Explainer(path, device="cpu")(images, target=target)
        found = explainer(images, target=target, batch_size=2)
        np.testing.assert_array_equal(found.targets, expected.targets)
        assert relative_error(found.logits, expected.logits) < 1e-5
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5


def test_openvino_in_threads(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install fastcam[peers]")
    path = tmp_path / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet")
    batches = np.random.default_rng(3).normal(size=(16, 1, 3, 12, 12)).astype(np.float32)
    explainer = fastcam.Explainer(path, device="openvino")
    alone = [explainer(batch, target=3).heatmaps for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: explainer(batch, target=3).heatmaps, batches))
    np.testing.assert_array_equal(together, alone)


def test_a_model_without_the_default_of_its_target(tmp_path: Path) -> None:
    path = tmp_path / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet")
    content = without_default(path)
    assert isinstance(content, bytes)
    model = onnx.load_from_string(content)
    assert "target" in {item.name for item in model.graph.input}
    assert "target" not in {tensor.name for tensor in model.graph.initializer}
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet", target="required")
    assert without_default(path) == path
