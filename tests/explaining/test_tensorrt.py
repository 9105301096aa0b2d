"""TensorRT without a GPU: profiles, cache keys, locks, context models and refusals, with fakes for the machine."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import relative_error, small_classifier
from onnx import helper

import fastcam
from fastcam.errors import ArgumentError, DeviceError, FileFormatError, MissingExtraError, ModelError, WriteError
from fastcam.explaining import tensorrt
from fastcam.explaining.tensorrt import PROVIDER, Machine, Range
from fastcam.metadata import Metadata

_MACHINE = Machine("NVIDIA H100", "9.0", "10.13.3", "13.0", "1.31.1")

# Every option that the TensorRT provider of onnxruntime-gpu 1.31.1 parses: the names in its library,
# `strings libonnxruntime_providers_tensorrt.so | grep -E '^(trt_|device_id$|has_user|user_compute)'`. It answers an
# unknown one by falling back to another provider.
_PROVIDER_OPTIONS = frozenset(
    """
    device_id has_user_compute_stream user_compute_stream trt_auxiliary_streams trt_bf16_enable
    trt_build_heuristics_enable trt_builder_optimization_level trt_context_memory_sharing_enable trt_cuda_graph_enable
    trt_detailed_build_log trt_dla_core trt_dla_enable trt_dump_ep_context_model trt_dump_subgraphs
    trt_engine_cache_enable trt_engine_cache_path trt_engine_cache_prefix trt_engine_decryption_enable
    trt_engine_decryption_lib_path trt_engine_hw_compatible trt_ep_context_embed_mode trt_ep_context_file_path
    trt_external_data_bytestream trt_external_data_bytestream_size trt_extra_plugin_lib_paths
    trt_force_sequential_engine_build trt_force_timing_cache trt_fp16_enable trt_int8_calibration_table_name
    trt_int8_enable trt_int8_use_native_calibration_table trt_layer_norm_fp32_fallback trt_load_user_initializer
    trt_max_partition_iterations trt_max_workspace_size trt_min_subgraph_size trt_onnx_bytestream
    trt_onnx_bytestream_size trt_onnx_model_folder_path trt_op_types_to_exclude trt_preview_features
    trt_profile_max_shapes trt_profile_min_shapes trt_profile_opt_shapes trt_sparsity_enable trt_tactic_sources
    trt_timing_cache_enable trt_timing_cache_path trt_weight_stripped_engine_enable
    """.split()
)
_CUDA_OPTIONS = frozenset("device_id has_user_compute_stream user_compute_stream use_tf32".split())


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "this_machine", lambda device_id: _MACHINE)
    monkeypatch.setenv(tensorrt.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx", classes=list("abcde"))
    return tmp_path / "small.onnx"


def test_tensorrt_comes_first_then_cuda_with_options_that_the_provider_knows(exported: Path) -> None:
    plan = tensorrt.plan(exported, device_id=1, stream=4242)
    (first, options), (second, cuda) = plan.providers
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert set(options) <= _PROVIDER_OPTIONS
    assert set(cuda) <= _CUDA_OPTIONS
    for given in (options, cuda):
        assert all(isinstance(value, str) for value in given.values())
        assert given["device_id"] == "1"
        assert (given["has_user_compute_stream"], given["user_compute_stream"]) == ("1", "4242")
    assert cuda["use_tf32"] == "0"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(plan.folder)
    assert "trt_fp16_enable" not in options
    assert "user_compute_stream" not in tensorrt.plan(exported).providers[0][1]


def test_profiles_name_every_input(exported: Path) -> None:
    options = tensorrt.plan(exported, batches=(1, 8, 64), targets=(1, 2, 5)).providers[0][1]
    assert options["trt_profile_min_shapes"] == "image:1x3x12x12,target:1x1"
    assert options["trt_profile_opt_shapes"] == "image:8x3x12x12,target:8x2"
    assert options["trt_profile_max_shapes"] == "image:64x3x12x12,target:64x5"


def test_a_fixed_batch_stays_in_the_profiles(tmp_path: Path) -> None:
    fastcam.export(small_classifier(batch=4, keeps_batch=True).to_model(), tmp_path / "four.onnx")
    options = tensorrt.plan(tmp_path / "four.onnx", batches=(1, 8, 64)).providers[0][1]
    assert options["trt_profile_min_shapes"] == "image:4x3x12x12,target:4x1"
    assert options["trt_profile_max_shapes"] == "image:4x3x12x12,target:4x16"


def test_the_session_file_has_no_default_target_and_the_same_results(exported: Path) -> None:
    """The provider would turn it into a constant, and explain the top class whatever was requested."""
    plan = tensorrt.plan(exported)
    assert plan.model != exported
    model = onnx.load(plan.model)
    assert "target" in {info.name for info in model.graph.input}
    assert "target" not in {tensor.name for tensor in model.graph.initializer}
    onnx.checker.check_model(model, full_check=True)
    image = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    inputs = {"image": image, "target": np.array([[1], [3]])}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    expected, found = (
        onnxruntime.InferenceSession(path, options).run(["weights", "targets"], inputs)
        for path in (exported, plan.model)
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(other, one)
    np.testing.assert_array_equal(found[1], [[1], [3]])


def test_the_session_file_finds_external_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcam.exporting.writer.INLINE_LIMIT", 4096)
    fastcam.export(small_classifier().to_model(), tmp_path / "large.onnx")
    plan = tensorrt.plan(tmp_path / "large.onnx")
    (data,) = tmp_path.glob("large.onnx.*.data")
    assert (plan.model.parent / data.name).read_bytes() == data.read_bytes()
    onnx.checker.check_model(plan.model, full_check=True)


def test_the_key_changes_with_everything_that_an_engine_depends_on(exported: Path, tmp_path: Path) -> None:
    profiles = {"trt_profile_min_shapes": "image:1x3x12x12"}
    keys = {tensorrt.cache_key(exported, _MACHINE, profiles)}
    machines = [dataclasses.replace(_MACHINE, **{field.name: "other"}) for field in dataclasses.fields(Machine)]
    keys |= {tensorrt.cache_key(exported, machine, profiles) for machine in machines}
    keys.add(tensorrt.cache_key(exported, _MACHINE, {"trt_profile_min_shapes": "image:2x3x12x12"}))
    keys.add(tensorrt.cache_key(exported, _MACHINE, {"trt_profile_max_shapes": "image:1x3x12x12"}))
    changed = bytearray(exported.read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / exported.name).write_bytes(changed)
    keys.add(tensorrt.cache_key(tmp_path / "changed" / exported.name, _MACHINE, profiles))
    assert len(keys) == 1 + len(machines) + 3
    assert tensorrt.cache_key(exported, dataclasses.replace(_MACHINE), dict(profiles)) in keys


def test_a_plan_made_twice_shares_its_folder(exported: Path) -> None:
    first, second = (tensorrt.plan(exported) for _ in range(2))
    assert first == second
    assert tensorrt.plan(exported, batches=(1, 1, 1)).folder != first.folder


def test_the_cache_folder_is_the_one_given_then_that_of_the_environment_then_the_users(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tensorrt.cache_folder(tmp_path / "given") == tmp_path / "given"
    assert tensorrt.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(tensorrt.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tensorrt.cache_folder().name == "fastcam"


def test_a_cache_folder_that_cannot_be_written_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file.*cannot be stored here: .*cache=.*FASTCAM_CACHE"):
        tensorrt.plan(exported, cache=tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WriteError, match="it is not writable"):
        tensorrt.plan(exported)


# Stands in for ONNX Runtime's building: it writes an engine in two steps if there is none.
_BUILD = """
import dataclasses, sys, time
from pathlib import Path
from fastcam.explaining.tensorrt import Plan, Range
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
plan = Plan(folder / "small.onnx", [], Range(1, 1, 1), Range(1, 1, 1), folder)
print("ready", flush=True)
with plan.building():
    engine = folder / "small.engine"
    if engine.exists():
        print("read", engine.read_text(), flush=True)
    else:
        with engine.open("w") as file:
            file.write("first half,")
            file.flush()
            print("writing", flush=True)
            time.sleep(pause)
            file.write("second half")
        print("built", flush=True)
"""


def _start(folder: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BUILD, str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_one_process_builds_and_the_others_read_a_whole_engine(tmp_path: Path) -> None:
    processes = [_start(tmp_path, 0.5) for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0].splitlines()[-1] for process in processes)
    assert said == ["built", *["read first half,second half"] * 2]


def test_an_engine_half_written_by_a_killed_process_is_built_again(tmp_path: Path) -> None:
    killed = _start(tmp_path, 60)
    assert killed.stdout is not None
    while killed.stdout.readline() != "writing\n":
        pass
    killed.kill()
    killed.communicate()
    assert (tmp_path / "small.engine").read_text() == "first half,"
    assert _start(tmp_path, 0).communicate(timeout=60)[0].splitlines()[-1] == "built"
    assert _start(tmp_path, 0).communicate(timeout=60)[0].splitlines()[-1] == "read first half,second half"


def test_a_building_that_fails_is_not_taken_for_whole(exported: Path) -> None:
    plan = tensorrt.plan(exported)
    folder = plan.folder
    assert folder is not None

    def fail() -> None:
        with plan.building():
            (folder / "small.engine").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with plan.building():
        assert not (folder / "small.engine").exists()


def test_a_whole_engine_is_opened_by_many_at_once(exported: Path) -> None:
    plan = tensorrt.plan(exported)
    with plan.building():
        pass
    meeting = threading.Barrier(2, timeout=30)

    def opened() -> None:
        with plan.building():
            meeting.wait()

    other = threading.Thread(target=opened)
    other.start()
    opened()
    other.join()
    assert not meeting.broken


def test_a_fallback_to_another_provider_is_an_error(exported: Path) -> None:
    plan = tensorrt.plan(exported)
    plan.check(_Session([PROVIDER, "CUDAExecutionProvider"]))
    with pytest.raises(DeviceError, match=r"TensorrtExecutionProvider could not start: .* to CPUExecutionProvider"):
        plan.check(_Session(["CPUExecutionProvider"]))


@dataclasses.dataclass
class _Session:
    providers: list[str]

    def get_providers(self) -> list[str]:
        return self.providers


@pytest.mark.parametrize(
    "sizes", [(2, 1, 3), (0, 1, 1), (1, 2), (1, 2.0, 3), (1, 2, 3, 4.0), (True, 1, 1), "123", None, 4]
)
@pytest.mark.parametrize("name", ["batches", "targets"])
def test_a_range_that_is_none_is_refused(exported: Path, tmp_path: Path, name: str, sizes: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}=.*smallest, usual and largest"):
        tensorrt.plan(exported, **{name: sizes})
    with pytest.raises(ArgumentError, match=f"{name}="):
        tensorrt.write_context(exported, tmp_path / "out.onnx", **{name: sizes})


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        tensorrt.plan(tmp_path / "missing.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"\xff" * 30)
    with pytest.raises(ModelError, match=r"damaged\.onnx: cannot be read"):
        tensorrt.plan(tmp_path / "damaged.onnx")
    onnx.save(small_classifier().to_model(), tmp_path / "plain.onnx")
    with pytest.raises(FileFormatError, match="does not explain itself"):
        tensorrt.plan(tmp_path / "plain.onnx")


# What ONNX Runtime's provider writes: one node with the inputs and outputs of the model, no metadata.
def _built(embed: bool, *, ops: tuple[str, ...] = ("EPContext",)) -> Callable[..., _Session]:
    def session(model: Path, _: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int) -> _Session:
        options = providers[0][1]
        assert set(options) <= _PROVIDER_OPTIONS
        assert options["trt_dump_ep_context_model"] == "1"
        # With a cache the provider wants its path relative to the model: none.
        assert options["trt_engine_cache_enable"] == str(int(not embed))
        assert "trt_engine_cache_path" not in options
        out = Path(options["trt_ep_context_file_path"])
        source = onnx.load(model)
        inputs, outputs = ([info.name for info in part] for part in (source.graph.input, source.graph.output))
        engine = out.with_name("kernel_sm90.engine")
        if not embed:
            engine.write_bytes(b"an engine")
        content: Any = b"an engine" if embed else engine.name
        attributes: dict[str, Any] = {"embed_mode": int(embed), "ep_cache_context": content}
        nodes = [helper.make_node(op, inputs, outputs, None, None, "com.microsoft", **attributes) for op in ops]
        graph = helper.make_graph(nodes, "context", source.graph.input, source.graph.output)
        domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        if ops:
            onnx.save(helper.make_model(graph, opset_imports=domains), out)
        return _Session([PROVIDER])

    return session


@pytest.mark.parametrize("embed", [True, False])
def test_a_context_model_keeps_the_metadata_and_finds_its_engine(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embed: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", _built(embed))
    out = tmp_path / "shipped" / "small_ctx.onnx"
    out.parent.mkdir()
    sizes: dict[str, Any] = {"batches": (1, 8, 64), "targets": (1, 1, 3)}
    for _ in range(2):
        assert tensorrt.write_context(exported, out, embed=embed, **sizes) == out
    model = onnx.load(out)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert Metadata.from_properties(properties, "context").classes == tuple("abcde")
    content = next(item.s for item in model.graph.node[0].attribute if item.name == "ep_cache_context")
    engine = content if embed else (out.parent / content.decode()).read_bytes()
    assert engine == b"an engine"
    assert len(list(out.parent.iterdir())) == (1 if embed else 2)
    plan = tensorrt.plan(out, stream=7, batches=(1, 1, 1))
    assert plan.model == out
    assert (plan.batches, plan.targets) == (Range(1, 8, 64), Range(1, 1, 3))
    expected = {"device_id": "0", "has_user_compute_stream": "1", "user_compute_stream": "7"}
    assert plan.providers[0] == (PROVIDER, expected)
    with plan.building():
        plan.check(_Session([PROVIDER]))


def test_engines_beside_an_older_context_model_go(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", _built(embed=False))
    older = tmp_path / "ctx.onnx.0123456789abcdef.engine"
    older.touch()
    tensorrt.write_context(exported, tmp_path / "ctx.onnx", embed=False)
    (engine,) = tmp_path.glob("ctx.onnx.*.engine")
    assert engine != older


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Machine)])
def test_a_context_model_of_another_machine_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", _built(embed=True))
    tensorrt.write_context(exported, tmp_path / "ctx.onnx")
    here = dataclasses.replace(_MACHINE, **{field: "another"})
    monkeypatch.setattr(tensorrt, "this_machine", lambda device_id: here)
    with pytest.raises(DeviceError, match=f"built for {field} .* where this is 'another'.*write_context"):
        tensorrt.plan(tmp_path / "ctx.onnx")


def test_a_context_model_that_says_nothing_of_its_machine_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", _built(embed=True))
    tensorrt.write_context(exported, tmp_path / "ctx.onnx")
    for text in (None, "{", json.dumps({"machine": {"gpu": "H100"}})):
        model = onnx.load(tmp_path / "ctx.onnx")
        entry = next(item for item in model.metadata_props if item.key == "fastcam.tensorrt")
        entry.value = text or ""
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(FileFormatError, match=r"'fastcam\.tensorrt' is missing or damaged"):
            tensorrt.plan(tmp_path / "changed.onnx")


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (_built(embed=True, ops=("EPContext", "MaxUnpool")), r"does not support the whole network \(not: MaxUnpool\)"),
        (_built(embed=True, ops=()), "does not support the whole network: run the exported file"),
        (lambda *_, **__: _Session(["CPUExecutionProvider"]), "fell back to CPUExecutionProvider"),
        (lambda *_, **__: 1 / 0, "cannot build an engine of this model: division by zero"),
    ],
    ids=["op outside", "nothing written", "fallback", "failure"],
)
def test_a_context_model_that_cannot_be_built_leaves_the_old_one(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: Any, message: str
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    out = tmp_path / "out" / "ctx.onnx"
    out.parent.mkdir()
    out.write_bytes(b"older")
    with pytest.raises(DeviceError, match=message):
        tensorrt.write_context(exported, out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == {"ctx.onnx": b"older"}


def test_a_context_model_is_made_of_an_exported_file_and_is_an_onnx_file(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match=r"must end in \.onnx"):
        tensorrt.write_context(exported, tmp_path / "ctx.engine")
    with pytest.raises(WriteError, match="does not exist"):
        tensorrt.write_context(exported, tmp_path / "nowhere" / "ctx.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", _built(embed=True))
    tensorrt.write_context(exported, tmp_path / "ctx.onnx")
    with pytest.raises(ArgumentError, match="is a context model already"):
        tensorrt.write_context(tmp_path / "ctx.onnx", tmp_path / "again.onnx")


@pytest.fixture
def gpu_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An onnxruntime-gpu whose provider was linked with TensorRT 10."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    linked = b"\0libcudart.so.13\0libnvonnxparser.so.10\0libnvinfer.so.10\0"
    (capi / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF" + linked)
    monkeypatch.setattr(onnxruntime, "__file__", str(capi.parent / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    return capi


def test_missing_libraries_name_the_package_of_the_right_version(gpu_package: Path) -> None:
    with pytest.raises(DeviceError, match=r'libnvinfer\.so\.10.*pip install "tensorrt-cu13-libs==10\.\*"'):
        tensorrt.load_libraries()


def test_libraries_are_taken_from_their_wheel_for_all_to_see(
    gpu_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "tensorrt_libs"
    wheel.mkdir()
    (wheel / "libnvinfer.so.10").touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(wheel)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "tensorrt_libs" else None)
    loaded = []

    def load(path: str, mode: int) -> Any:
        loaded.append((path, mode))
        return types.SimpleNamespace(getInferLibVersion=lambda: 101303)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert tensorrt.load_libraries() == "10.13.3"
    # The system may have what the wheel lacks.
    assert loaded == [
        (str(wheel / "libnvinfer.so.10"), ctypes.RTLD_GLOBAL),
        ("libnvonnxparser.so.10", ctypes.RTLD_GLOBAL),
    ]


def test_an_onnxruntime_without_the_provider_is_refused(gpu_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu_package / "libonnxruntime_providers_tensorrt.so").unlink()
    with pytest.raises(DeviceError, match=r'no TensorRT provider here.*pip install "fastcam\[gpu\]"'):
        tensorrt.load_libraries()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime-gpu"):
        tensorrt.load_libraries()


def test_the_machine_is_asked_through_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runtime: Any = types.ModuleType("cupy.cuda.runtime")
    runtime.getDeviceProperties = lambda device_id: {"name": b"NVIDIA H100\0", "major": 9, "minor": device_id}
    runtime.runtimeGetVersion = lambda: 13020
    cuda: Any = types.ModuleType("cupy.cuda")
    cuda.runtime = runtime
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(tensorrt, "load_libraries", lambda: "10.13.3")
    assert tensorrt.this_machine(1) == Machine("NVIDIA H100", "9.1", "10.13.3", "13.2", onnxruntime.__version__)
    runtime.runtimeGetVersion = lambda: 1 / 0
    with pytest.raises(DeviceError, match="CUDA device 0 cannot be used: division by zero"):
        tensorrt.this_machine(0)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(MissingExtraError, match="cupy"):
        tensorrt.this_machine(0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu_the_results_are_those_of_the_cpu(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets other than the top class would reveal a default treated as a constant.

    Products of float32 are TF32: 11 bits, as float16; a few of them in a row.
    """
    monkeypatch.undo()
    try:
        tensorrt.this_machine(0)
    except (DeviceError, MissingExtraError) as error:
        pytest.skip(f"needs TensorRT and a GPU: {error}")
    path = tmp_path / "small.onnx"
    fastcam.export(small_classifier().to_model(), path, precision=precision)
    images = np.random.default_rng(0).normal(size=(3, 3, 12, 12)).astype(np.float32)
    inputs = {"image": images, "target": np.array([[0, 4], [1, 3], [2, 2]])}
    names = ["logits", "targets", "activations", "weights"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    expected = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(names, inputs)
    context = tensorrt.write_context(path, tmp_path / "small_ctx.onnx", embed=precision == "fp32")
    for file in (path, path, context):
        plan = tensorrt.plan(file, cache=tmp_path / "cache")
        with plan.building():
            session = onnxruntime.InferenceSession(plan.model, options, providers=plan.providers)
        plan.check(session)
        found = session.run(names, inputs)
        np.testing.assert_array_equal(found[1], expected[1])
        for index in (0, 2, 3):
            assert relative_error(found[index], expected[index]) < 2**-8
    assert len(list((tmp_path / "cache").rglob("*.engine"))) == 1
