"""Odd values for every argument of every public function: accepted, or rejected with a FastcamError."""

from __future__ import annotations

import array
import collections
import ctypes
import decimal
import fractions
import io
import pathlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from detector_graphs import bright_cells, one_map_detector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import export_two_layers, small_classifier
from PIL import Image
from segmentation_graphs import segmenter

import fastcam


class _Index:
    def __index__(self) -> int:
        return 1


class _Broken:
    """Raises on every operation."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__iter__", "__len__", "__index__", "__fspath__", "__array__"):
            return object.__getattribute__(self, name)
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    def __hash__(self) -> int:
        raise RuntimeError("hash")


class _Sequence:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, item: object) -> object:
        raise RuntimeError("no item")


_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 5, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf"), 1j, "", "a", "top3",
    "top0", "top999999999", "top-1", "block2", "\0", "\ud800", "x" * 10**5, b"", b"abc", bytearray(b"x"), (), [], {},
    set(), frozenset({1}), [0], [0, 1], [[0], [1]], [[0], [1, 2]], [[]], [[[0]]], (0, 1), [None], ["a"], [1.0], [True],
    [np.int64(1)], [np.array(1)], [np.array([1])], np.array(1), np.array([1]), np.array([[1], [2]]), np.array([[1.0]]),
    np.array(["a"]), np.array([None]), np.zeros((0, 3)), np.zeros((2, 2, 2), np.int64), np.int64(2), np.uint64(2**63),
    np.float32(1), np.str_("block2"), np.datetime64("2020"), range(2), object(), lambda: 1, int, Ellipsis, slice(1),
    decimal.Decimal(1), fractions.Fraction(1, 2), array.array("i", [1]), memoryview(b"ab"), pathlib.Path("nowhere"),
    collections.deque([1]), {"a": 1}, {0: 1}, ctypes.c_int(3), _Index(), _Broken(), _Sequence(), [_Broken()],
    [_Sequence()],
]  # fmt: skip

_values = st.one_of(
    st.integers(0, len(_ODD) - 1).map(_ODD.__getitem__),  # Hypothesis would compare and hash the values
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
        max_leaves=5,
    ),
)


class _Doors:
    """Calls of the public functions, each with one argument replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = small_classifier().to_model()
        self.path = export_two_layers(folder)
        self.explainer = fastcam.Explainer(self.path, threads=1, device="cpu")
        self.tensor = np.random.default_rng(1).random((2, 3, 12, 12), dtype=np.float32)
        self.photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        (folder / "photos").mkdir()
        Image.fromarray(self.photo).save(folder / "photos" / "a.png")

    def call(self, **replaced: Any) -> object:
        return self.explainer(**{"images": self.photo, **replaced})

    def regions(self, **replaced: Any) -> object:
        return self._of_kind("segmentation", segmenter())(self.tensor, **replaced)

    def similarity(self, **replaced: Any) -> object:
        return self._of_kind("embedding", self.model)(self.tensor, **{"reference": self.tensor, **replaced})

    def boxes(self, **replaced: Any) -> object:
        return self._of_kind("boxes", one_map_detector())(bright_cells((0, 1, 0)), **replaced)

    def _of_kind(self, score: str, model: onnx.ModelProto) -> fastcam.Explainer:
        path = self.folder / f"{score}.onnx"
        if not path.exists():
            fastcam.export(model, path, score=score)
        return fastcam.Explainer(path, device="cpu", threads=1)

    def open(self, **replaced: Any) -> object:
        return fastcam.Explainer(**{"path": self.path, "device": "cpu", "threads": 1, **replaced})

    def export(self, **replaced: Any) -> object:
        return fastcam.export(**{"model": self.model, "path": self.folder / "out.onnx", **replaced})

    def split(self, **replaced: Any) -> object:
        return fastcam.split(**{"model": self.model, "layer": "block2", **replaced})

    def inspect(self, **replaced: Any) -> object:
        return fastcam.inspect(**{"path": self.path, **replaced})

    def overlay(self, **replaced: Any) -> object:
        return self.explainer(self.photo)[0].overlay(**replaced)

    def save(self, **replaced: Any) -> object:
        return self.explainer(self.photo)[0].save(**{"path": self.folder / "overlay.png", **replaced})

    def explain_files(self, **replaced: Any) -> object:
        shutil.rmtree(self.folder / "job", ignore_errors=True)
        arguments = {"model": self.path, "inputs": self.folder / "photos", "out": self.folder / "job", "threads": 1}
        return fastcam.explain_files(**{**arguments, "device": "cpu", "stdin": io.BytesIO(b""), **replaced})

    def write_report(self, **replaced: Any) -> object:
        return fastcam.write_report(**{"folder": self.folder, **replaced})

    def finetune(self, **replaced: Any) -> object:
        # One class: rejected before Keras is needed.
        return fastcam.finetune(**{"data_dir": self.folder / "photos", "out": self.folder / "x.keras", **replaced})

    def evaluate(self, **replaced: Any) -> object:
        arguments = {"explainer": self.explainer, "images": [self.photo], "metrics": "complexity", "methods": "gradcam"}
        return fastcam.evaluate(**{**arguments, **replaced})

    def verify(self, **replaced: Any) -> object:
        return fastcam.verify(**{"model": self.folder / "nowhere.onnx", **replaced})

    def compare_results(self, **replaced: Any) -> object:
        return fastcam.compare_results(**{"reference": self.folder, "new": self.folder, **replaced})

    def merge_results(self, **replaced: Any) -> object:
        return fastcam.merge_results(**{"folders": [self.folder], "out": self.folder / "joined", **replaced})

    def triton(self, **replaced: Any) -> object:
        arguments = {"model": self.path, "repository": self.folder / "triton"}
        return fastcam.write_triton_repository(**{**arguments, **replaced})

    def evidence(self, **replaced: Any) -> object:
        return self.explainer.evidence(**{"image": self.photo, **replaced})

    def preprocessing(self, **replaced: Any) -> object:
        return fastcam.Preprocessing(**{"order": "RGB", "mean": (0, 0, 0), "scale": (1, 1, 1), **replaced})


_ARGUMENTS: dict[str, str] = {
    "call": "images target against counterfactual mask reference threshold method settings layer size normalize "
    "batch_size progress on_device",
    "regions": "mask target",
    "similarity": "reference target",
    "boxes": "target threshold against",
    "open": "path device providers",
    "export": "model path layer output input_size example_input token_grid classes preprocess gradients precision "
    "score_activation score fit",
    "split": "model layer",
    "inspect": "path",
    "overlay": "colormap alpha image k",
    "save": "path",
    "explain_files": "model inputs out target top_k threshold method settings shard layer format colormap alpha size "
    "batch_size device threads report resume progress stdin",
    "write_report": "folder",
    "finetune": "data_dir out backbone weights size hidden dropout epochs learning_rate unfreeze fine_epochs "
    "fine_learning_rate batch_size patience augmentations class_weights validation_split seed resume progress",
    "preprocessing": "order mean scale",
    "evaluate": "explainer images target methods metrics masks settings method_settings batch_size progress",
    "verify": "model images method compare_with thresholds",
    "compare_results": "reference new region",
    "merge_results": "folders out",
    "triton": "model repository name max_batch instances device tensorrt",
    "evidence": "image target batch_size",
}
_CASES = [(door, name) for door, names in _ARGUMENTS.items() for name in names.split()]
# If requested, they start that many threads.
_TOO_MANY = 64


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> _Doors:
    return _Doors(tmp_path_factory.mktemp("doors"))


def _attempt(call: Callable[..., object], name: str, value: object) -> None:
    try:
        call(**{name: value})
    except fastcam.FastcamError:
        pass
    except RuntimeError as error:
        # Exceptions from the callers' own objects may pass through.
        if not isinstance(value, _Broken | _Sequence | list) or "no item" not in str(error):
            raise


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some values are paths."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("door", "name"), _CASES, ids=lambda value: value)
def test_odd_arguments_are_taken_or_refused(doors: _Doors, door: str, name: str) -> None:
    failed = []
    for value in _ODD:
        if name == "threads" and isinstance(value, int) and value > _TOO_MANY:
            continue
        if name == "progress" and callable(value):
            # It is called, and may raise.
            continue
        try:
            _attempt(getattr(doors, door), name, value)
        except Exception as error:  # noqa: BLE001 - all of them are reported at once
            failed.append((type(value).__name__, type(error).__name__, str(error)[:80]))
    assert not failed, failed


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("door", "name"), _CASES, ids=lambda value: value)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_values)
def test_any_argument_is_taken_or_refused(doors: _Doors, door: str, name: str, value: object) -> None:
    if name == "threads" and isinstance(value, int) and value > _TOO_MANY:
        return
    if name == "progress" and callable(value):
        # It is called, and may raise.
        return
    _attempt(getattr(doors, door), name, value)
