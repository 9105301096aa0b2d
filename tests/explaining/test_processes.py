"""Explainers and kernels in threads, forks and process pools, and at interpreter exit."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from networks import small_classifier
from onnx import TensorProto, helper

import fastcam
from fastcam import errors
from fastcam.errors import FastcamError, NonFiniteError
from fastcam.pictures.reading import read_image

_BATCH = np.random.default_rng(0).random((5, 3, 12, 12), dtype=np.float32)
_needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_HEAD = """
import os, sys, threading, time
import numpy as np, fastcam
from fastcam import kernels
explainer = fastcam.Explainer(sys.argv[1], threads=1, device="cpu")
batch = np.random.default_rng(0).random((16, 3, 12, 12), dtype=np.float32)
activations = np.random.default_rng(0).random((8, 256, 40, 40), dtype=np.float32)
weights = np.random.default_rng(1).random((8, 3, 256), dtype=np.float32)
wanted = explainer(batch, "top2").heatmaps, kernels.render(activations, weights, threads=2).maps
def explain():
    while True: explainer(batch, "top3", size=(300, 300))
def draw():
    while True: kernels.render(activations, weights, threads=2)
def check():
    assert (explainer(batch, "top2").heatmaps == wanted[0]).all()
    assert (kernels.render(activations, weights, threads=2).maps == wanted[1]).all()
"""
_LEAVE = "\nfor _ in range(2): threading.Thread(target={0}, daemon=True).start()\ntime.sleep(.2)\nprint('leaving')\n"
_FORK = """
import signal, warnings
# Python 3.12 warns of what is tested here.
warnings.simplefilter("ignore", DeprecationWarning)
for work in (explain, draw): threading.Thread(target=work, daemon=True).start()
time.sleep(.05)
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        check()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
_AT_EXIT = """
import atexit
atexit.register(check)
class Late:
    def __del__(self): check(); print("late")
late = Late()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "model.onnx"
    fastcam.export(small_classifier().to_model(), path, classes=list("abcde"), preprocess="scale", gradients="full")
    return path


def _run(code: str, path: Path) -> str:
    command = [sys.executable, "-c", code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastcam.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("work", ["explain", "draw"])
def test_the_interpreter_ends_while_daemon_threads_work(path: Path, work: str) -> None:
    for _ in range(3):
        assert _run(_HEAD + _LEAVE.format(work), path) == "leaving\n"


def test_a_model_that_never_ends_is_stopped_at_exit(tmp_path: Path) -> None:
    endless = _endless(tmp_path)
    code = """
import sys, threading, time, numpy as np, fastcam
explainer = fastcam.Explainer(sys.argv[1], device="cpu")
threading.Thread(target=lambda: explainer(np.ones((1, 3, 12, 12), np.float32)), daemon=True).start()
time.sleep(.5); print("leaving")
"""
    assert _run(code, endless) == "leaving\n"


def test_the_main_thread_explains_until_the_end(path: Path) -> None:
    assert _run(_HEAD + _AT_EXIT, path) == "late\n"


@_needs_fork
def test_forks_while_threads_work(path: Path) -> None:
    _run(_HEAD + _FORK, path)


def test_a_sub_interpreter_is_refused() -> None:
    code = """
import importlib
for name in ("_interpreters", "_xxsubinterpreters"):
    try: interpreters = importlib.import_module(name)
    except ImportError: continue
    number = interpreters.create()
    text = "try: import fastcam\\nexcept ImportError as error: print(error)"
    (getattr(interpreters, "exec", None) or interpreters.run_string)(number, text)
    break
"""
    assert "fastcam does not run in a sub-interpreter" in _run(code, Path())


def test_an_explainer_is_pickled_and_copied(path: Path) -> None:
    explainer = fastcam.Explainer(path, device="cpu", threads=1)
    wanted = explainer(_BATCH, "top2").heatmaps
    for other in (pickle.loads(pickle.dumps(explainer)), copy.copy(explainer), copy.deepcopy(explainer)):
        np.testing.assert_array_equal(other(_BATCH, "top2").heatmaps, wanted)
        assert (other.path, other.providers) == (path, explainer.providers)
        assert other._threads == 1


def test_an_explainer_in_a_process_pool(path: Path) -> None:
    """One image's error leaves the pool intact, and arrives with its fields."""
    explainer = fastcam.Explainer(path, device="cpu", threads=1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        images = [_BATCH[number : number + 1].copy() for number in range(5)]
        images[3][:] = 3e38
        futures = [pool.submit(explainer, image, "top2") for image in images]
        for number, future in enumerate(futures):
            if number == 3:
                with pytest.raises(NonFiniteError, match="image 0") as caught:
                    future.result(timeout=100)
                assert caught.value.image == 0
            else:
                wanted = explainer(images[number], "top2").heatmaps
                np.testing.assert_array_equal(future.result(timeout=100).heatmaps, wanted)


def _kinds(kind: type[FastcamError] = FastcamError) -> list[type[FastcamError]]:
    return [kind, *(other for child in kind.__subclasses__() for other in _kinds(child))]


@pytest.mark.parametrize("kind", sorted({kind for kind in _kinds() if kind.__module__ == errors.__name__}, key=str))
def test_errors_keep_type_message_and_fields(kind: type[FastcamError]) -> None:
    arguments = ("what, where and what to do", 3) if kind is NonFiniteError else ("what, where and what to do",)
    error = kind(*arguments)
    vars(error)["note"] = ["a", 1]
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert str(other) == "what, where and what to do"
        assert other.args == error.args
        assert vars(other) == vars(error)


class _TwoFields(errors.ModelError):
    def __init__(self, message: str, first: int, *, second: str) -> None:
        super().__init__(message)
        self.first, self.second = first, second


def test_errors_of_any_signature_are_pickled() -> None:
    other = pickle.loads(pickle.dumps(_TwoFields("text", 1, second="b")))
    assert (str(other), other.first, other.second) == ("text", 1, "b")


def _endless(folder: Path) -> Path:
    """An explained file whose scores come from a loop with 2**62 iterations."""
    fastcam.export(small_classifier().to_model(), folder / "good.onnx", classes=list("abcde"))
    model = onnx.load(folder / "good.onnx")
    float32, boolean, integer = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["held"], ["held_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", integer, []),
            helper.make_tensor_value_info("go", boolean, []),
            helper.make_tensor_value_info("held", float32, None),
        ],
        [helper.make_tensor_value_info("go_on", boolean, []), helper.make_tensor_value_info("held_on", float32, None)],
    )
    for node in model.graph.node:
        for position, name in enumerate(node.output):
            if name == "logits":
                node.output[position] = "logits/before"
        for position, name in enumerate(node.input):
            if name == "logits":
                node.input[position] = "logits/before"
    model.graph.initializer.append(helper.make_tensor("turns", integer, [], [2**62]))
    model.graph.initializer.append(helper.make_tensor("start", boolean, [], [True]))
    model.graph.node.append(helper.make_node("Loop", ["turns", "start", "logits/before"], ["logits"], body=body))
    onnx.save(model, folder / "endless.onnx")
    return folder / "endless.onnx"


def test_a_call_has_a_time_limit(tmp_path: Path) -> None:
    explainer = fastcam.Explainer(_endless(tmp_path), device="cpu", threads=1)
    for _ in range(2):
        with pytest.raises(errors.TimeLimitError, match=r"stopped after its timeout of 0\.3 s") as caught:
            explainer(_BATCH[:1], timeout=0.3)
        assert isinstance(caught.value, TimeoutError)


def test_a_time_limit_covers_all_batches(path: Path) -> None:
    explainer = fastcam.Explainer(path, device="cpu", threads=1)
    wanted = explainer(_BATCH).heatmaps
    np.testing.assert_array_equal(explainer(_BATCH, timeout=1000).heatmaps, wanted)
    with pytest.raises(errors.TimeLimitError):
        explainer(np.concatenate([_BATCH] * 50), batch_size=1, timeout=1e-4)
    np.testing.assert_array_equal(explainer(_BATCH).heatmaps, wanted)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "1", 10**400])
def test_a_time_limit_is_a_number_of_seconds(path: Path, timeout: float) -> None:
    with pytest.raises(errors.ArgumentError, match="timeout="):
        fastcam.Explainer(path, device="cpu")(_BATCH, timeout=timeout)


def test_threads_are_bounded_by_the_processors(path: Path) -> None:
    processors = os.cpu_count()
    assert processors is not None
    for threads in (processors + 1, 5000, 2**31, 2**64):
        with pytest.raises(errors.ArgumentError, match=rf"threads={threads}: this machine has {processors} processors"):
            fastcam.Explainer(path, device="cpu", threads=threads)


def test_memory_that_is_not_there_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = fastcam.Explainer(path, device="cpu", threads=1)

    def refuse(*_: object) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(explainer._engine, "explain", refuse)
    with pytest.raises(errors.ArgumentError, match=r"heatmaps \(5, 2, 16384, 16384\) take 10 GiB"):
        explainer(_BATCH, "top2", size=(2**14, 2**14))


def test_a_batch_that_is_not_aligned_is_taken(path: Path) -> None:
    explainer = fastcam.Explainer(path, device="cpu", threads=1)
    shifted = np.frombuffer(b"\0" + _BATCH.tobytes(), np.float32, offset=1).reshape(_BATCH.shape)
    assert not shifted.flags.aligned
    np.testing.assert_array_equal(explainer(shifted).heatmaps, explainer(_BATCH).heatmaps)


def _changed(path: Path, folder: Path, replaced: str, values: np.ndarray) -> Path:
    """A copy of an explained file with a constant as one of its outputs."""
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == replaced:
                    names[position] = f"{replaced}/before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{replaced}/constant"))
    model.graph.node.append(helper.make_node("Identity", [f"{replaced}/constant"], [replaced]))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


@pytest.mark.parametrize("target", [5, -1, 2**40])
def test_a_file_that_explains_no_class_is_refused(path: Path, tmp_path: Path, target: int) -> None:
    changed = _changed(path, tmp_path, "targets", np.array([[target]], np.int64))
    with pytest.raises(errors.FileFormatError, match=f"it explained the classes {target}..{target} of 5"):
        fastcam.Explainer(changed, device="cpu", threads=1)(_BATCH[:1])


def test_a_file_without_classes_is_refused(path: Path, tmp_path: Path) -> None:
    model = onnx.load(_changed(path, tmp_path, "logits", np.zeros((1, 0), np.float32)))
    (logits,) = (output for output in model.graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 0
    (classes,) = (entry for entry in model.metadata_props if entry.key == "fastcam.classes")
    classes.value = "null"
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(errors.FileFormatError, match="no classes"):
        fastcam.Explainer(tmp_path / "empty.onnx", device="cpu", threads=1)


def test_a_file_with_a_huge_input_is_refused(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 2**13
    onnx.save(model, tmp_path / "huge.onnx")
    with pytest.raises(errors.ModelError):
        fastcam.Explainer(tmp_path / "huge.onnx", device="cpu", threads=1)


def test_warning_filters_stay_as_they_were_while_threads_read(tmp_path: Path) -> None:
    import warnings

    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    end = time.monotonic() + 0.5

    def read() -> None:
        while time.monotonic() < end:
            read_image(tmp_path / "a.png")

    def catch() -> None:
        while time.monotonic() < end:
            assert list(warnings.filters) == before

    threads = [threading.Thread(target=work) for work in (read, read, read)]
    for thread in threads:
        thread.start()
    catch()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_models_whose_weights_are_replaced_can_always_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights above the limit lie in a second file, which goes with the model that it belongs to."""
    monkeypatch.setattr("fastcam.exporting.writer.INLINE_LIMIT", 4096)
    path = tmp_path / "large.onnx"
    writing = True

    def write() -> None:
        seed = 0
        while writing:
            seed += 1
            fastcam.export(small_classifier(seed=seed % 5).to_model(), path)

    fastcam.export(small_classifier().to_model(), path)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        opened = [fastcam.Explainer(path, device="cpu", threads=1) for _ in range(60)]
    finally:
        writing = False
        writer.join()
    assert len({explainer(_BATCH[:1]).logits.tobytes() for explainer in opened}) > 1


def test_a_second_session_is_of_the_same_file(tmp_path: Path) -> None:
    """Sessions of single methods are opened when they are first needed: by then another model may be there."""
    path = tmp_path / "model.onnx"
    fastcam.export(small_classifier().to_model(), path, gradients="image")
    explainer = fastcam.Explainer(path, device="cpu", threads=1)
    explainer(_BATCH[:1], method="saliency")
    fastcam.export(small_classifier(seed=1).to_model(), path, gradients="image")
    explainer(_BATCH[:1], method="saliency")
    with pytest.raises(errors.FileFormatError, match="was replaced since it was opened: open it again"):
        explainer(_BATCH[:1], method="ablationcam")
