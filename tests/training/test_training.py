"""Fine-tuning on a folder of photos: what is learnt, what is stored, what is rejected."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from photo_folders import CLASSES, make_class_folders
from PIL import Image
from textbook import make_layers_he

import fastcam
from fastcam.errors import ArgumentError, MissingExtraError, ModelError, WriteError
from fastcam.training.figures import write_confusion_matrix
from fastcam.training.fitting import Phase, Row
from fastcam.training.results import TrainingProgress

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[train]")

# A side for which VGG16 is fast and block5 still has a map.
_SIDE = 48
_SMALL: dict[str, Any] = {"size": _SIDE, "batch_size": 8, "augmentations": 0, "epochs": 8, "learning_rate": 0.01}
_ALTERED = {**_SMALL, "augmentations": 1}
_VGG16 = keras.applications.VGG16
# Channels of each block. The last ones are the features, and a head needs many.
_WIDTHS = (16, 16, 16, 32, 128)


def _narrow_vgg16(include_top: bool, weights: None, input_shape: tuple[int, int, int]) -> Any:
    """VGG16's base with its layers, and a hundredth of its time."""
    assert not include_top
    image = value = keras.Input(input_shape)
    for block, (count, width) in enumerate(zip((2, 2, 3, 3, 3), _WIDTHS, strict=True), start=1):
        for number in range(1, count + 1):
            name = f"block{block}_conv{number}"
            value = keras.layers.Conv2D(width, 3, padding="same", activation="relu", name=name)(value)
        value = keras.layers.MaxPooling2D(2, name=f"block{block}_pool")(value)
    return keras.Model(image, value)


@pytest.fixture(scope="module", autouse=True)
def _vgg16_is_narrow() -> Iterator[None]:
    """What is tested here does not depend on the width; tests/test_readme.py trains the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.applications, "VGG16", _narrow_vgg16)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose features distinguish colours only."""
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(_SIDE, _SIDE, 3))
    make_layers_he(network, seed=0)
    first = network.get_layer("block1_conv1")
    kernel, bias = first.get_weights()
    # The photos' values are of the order of 100.
    first.set_weights([kernel / 60, bias])
    path = tmp_path_factory.mktemp("weights") / "vgg.weights.h5"
    network.save_weights(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_class_folders(tmp_path_factory.mktemp("data") / "photos", {"grün": 12, "red one": 8, "蓝": 10})


@pytest.fixture(scope="module")
def steps() -> list[TrainingProgress]:
    return []


@pytest.fixture(scope="module")
def trained(
    weights: Path, photos: Path, steps: list[TrainingProgress], tmp_path_factory: pytest.TempPathFactory
) -> fastcam.TrainingResult:
    out = tmp_path_factory.mktemp("trained") / "dogs.keras"
    return fastcam.finetune(
        photos,
        out,
        weights=weights,
        unfreeze=1,
        fine_epochs=2,
        fine_learning_rate=1e-5,
        progress=steps.append,
        **_ALTERED,
    )


def _load(path: Path) -> Any:
    return keras.models.load_model(path, compile=False)


def _weights(path: Path) -> list[NDArray[np.float32]]:
    return [np.asarray(array) for array in _load(path).get_weights()]


def _is_same(first: Sequence[NDArray[np.float32]], second: Sequence[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


# What is learnt


def test_the_classes_are_learnt_and_the_result_says_how_well(trained: fastcam.TrainingResult) -> None:
    assert trained.classes == tuple(sorted(CLASSES))
    assert (trained.photos, trained.held_out, trained.skipped) == (24, 6, ())
    confusion = np.array(trained.confusion)
    assert confusion.sum(axis=1).tolist() == [2, 2, 2]
    assert trained.accuracy == np.trace(confusion) / 6
    assert trained.accuracy >= 5 / 6


def test_the_figures_are_those_of_the_saved_model_on_photos_that_keras_prepares(
    trained: fastcam.TrainingResult,
) -> None:
    record = json.loads((trained.folder / "training.json").read_bytes())
    images = np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((_SIDE, _SIDE), 2)) for path in record["held_out"]]
    )
    scores = _load(trained.path).predict(
        keras.applications.vgg16.preprocess_input(images.astype(np.float32)), verbose=0
    )
    labels = [trained.classes.index(Path(path).parent.name) for path in record["held_out"]]
    assert (scores.argmax(axis=1) == labels).mean() == trained.accuracy
    losses = -np.log(scores[range(len(labels)), labels])
    lowest = min(row["val_loss"] for rows in trained.history.values() for row in rows)
    np.testing.assert_allclose(losses.mean(), lowest, rtol=1e-4, atol=1e-6)


def test_the_head_learns_first_and_then_the_last_block_alone(trained: fastcam.TrainingResult, weights: Path) -> None:
    assert [len(rows) for rows in trained.history.values()] == [8, 2]
    assert list(trained.history) == ["head", "blocks"]
    source = keras.applications.VGG16(weights=None, include_top=False, input_shape=(_SIDE, _SIDE, 3))
    source.load_weights(weights)
    model = _load(trained.path)
    changed = {
        layer.name
        for layer in source.layers
        if layer.weights and not _is_same(layer.get_weights(), model.get_layer(layer.name).get_weights())
    }
    assert changed == {"block5_conv1", "block5_conv2", "block5_conv3"}


def test_progress_tells_of_every_photo_and_epoch(
    trained: fastcam.TrainingResult, steps: list[TrainingProgress]
) -> None:
    last = {step.step: step for step in steps}
    assert {name: (step.done, step.total) for name, step in last.items()} == {
        "photos": (30, 30),
        "features": (54, 54),
        "head": (8, 8),
        "blocks": (2, 2),
    }
    for name in ("head", "blocks"):
        rows = [dict(step.logs) for step in steps if step.step == name]
        assert rows == list(trained.history[name])
        assert all(0 <= row[key] <= 1 for row in rows for key in ("accuracy", "val_accuracy"))
    counts = [step.done for step in steps if step.step == "features"]
    assert counts == sorted(set(counts))


def test_the_folder_holds_the_settings_and_the_pictures(trained: fastcam.TrainingResult, photos: Path) -> None:
    record = json.loads((trained.folder / "training.json").read_bytes())
    assert record["state"] == "done"
    assert record["settings"]["epochs"] == 8
    assert set(record["settings"]) >= {"backbone", "seed", "dropout", "fine_learning_rate", "validation_split"}
    assert record["counts"] == {"train": [10, 6, 8], "val": [2, 2, 2]}
    assert record["accuracy"] == trained.accuracy
    assert record["confusion"] == [list(row) for row in trained.confusion]
    for name in ("curves.png", "confusion.png"):
        with Image.open(trained.folder / name) as picture:
            assert min(picture.size) > 300
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert not list(trained.folder.rglob("*.weights.h5"))


def test_features_are_those_of_the_frozen_backbone(trained: fastcam.TrainingResult, weights: Path) -> None:
    """Computed by Keras' own preprocessing and network, without our code."""
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(_SIDE, _SIDE, 3))
    network.load_weights(weights)
    expected = {
        part: network.predict(
            keras.applications.vgg16.preprocess_input(
                np.stack(
                    [np.asarray(Image.open(path)) for path in sorted((trained.folder / "photos" / part).rglob("*.png"))]
                ).astype(np.float32)
            ),
            verbose=0,
        ).mean(axis=(1, 2))
        for part in ("train", "val")
    }
    cached = [np.load(path) for path in (trained.folder / "features").iterdir()]
    assert sorted(array.shape for array in cached) == [(6, _WIDTHS[-1]), (24, _WIDTHS[-1]), (24, _WIDTHS[-1])]
    for features in expected.values():
        errors = [np.abs(array - features).max() for array in cached if array.shape == features.shape]
        assert min(errors) < 1e-4 * np.abs(features).max()
        # The altered copies differ, although they are of the same photos.
        assert len(errors) == 1 or max(errors) > 0.01 * np.abs(features).max()


def test_small_classes_count_as_much_as_large_ones(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, float] = {}

    def fit(keras: Any, model: Any, phase: Phase, *_: object) -> list[Row]:
        seen.update(phase.class_weight)
        return [dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), 0.5)]

    monkeypatch.setattr("fastcam.training.finetune.fit", fit)
    fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **{**_SMALL, "augmentations": 0})
    assert seen == {0: pytest.approx(24 / 30), 1: pytest.approx(24 / 18), 2: pytest.approx(24 / 24)}


def test_a_network_can_be_trained_from_the_start(photos: Path, tmp_path: Path) -> None:
    result = fastcam.finetune(
        photos, tmp_path / "dogs.keras", weights=None, size=32, epochs=2, hidden=(7,), batch_size=64
    )
    assert list(result.history) == ["network"]
    model = _load(result.path)
    assert [layer.units for layer in model.layers if hasattr(layer, "units")] == [7, 3]


def test_training_ends_when_it_no_longer_helps_and_keeps_the_best(photos: Path, weights: Path, tmp_path: Path) -> None:
    options = {**_SMALL, "epochs": 60, "patience": 2, "learning_rate": 0.3}
    result = fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **options)
    losses = [row["val_loss"] for row in result.history["head"]]
    best = int(np.argmin(losses))
    assert 1 < len(losses) == best + 3 < 60
    shorter = fastcam.finetune(
        photos, tmp_path / "short.keras", weights=weights, **{**options, "epochs": best + 1, "patience": 60}
    )
    assert [row["val_loss"] for row in shorter.history["head"]] == losses[: best + 1]
    assert _is_same(_weights(result.path), _weights(shorter.path))


# The path to production


def test_export_finds_the_classes_and_the_preprocessing(trained: fastcam.TrainingResult, tmp_path: Path) -> None:
    exported = fastcam.export(trained.path, tmp_path / "dogs.onnx")
    assert exported.classes == trained.classes
    assert exported.preprocessing == fastcam.Preprocessing.of("vgg16")
    assert exported.layer == "block5_conv3"
    record = json.loads((trained.folder / "training.json").read_bytes())
    explanation = fastcam.Explainer(tmp_path / "dogs.onnx")(record["held_out"])
    images = np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((_SIDE, _SIDE), 2)) for path in record["held_out"]]
    )
    scores = _load(trained.path).predict(
        keras.applications.vgg16.preprocess_input(images.astype(np.float32)), verbose=0
    )
    assert explanation.probabilities is not None
    np.testing.assert_allclose(explanation.probabilities, scores, rtol=1e-3, atol=1e-6)
    assert [image.labels[0] for image in explanation] == [trained.classes[index] for index in scores.argmax(axis=1)]


def test_names_that_are_given_count_more_than_those_in_the_file(
    trained: fastcam.TrainingResult, tmp_path: Path
) -> None:
    exported = fastcam.export(trained.path, tmp_path / "dogs.onnx", classes=["a", "b", "c"], preprocess="none")
    assert exported.classes == ("a", "b", "c")
    assert exported.preprocessing == fastcam.Preprocessing.of("none")


@pytest.mark.parametrize(
    "record", ["", "{}", '{"classes": ["a", 3], "preprocessing": {}}', '{"classes": "abc", "preprocessing": null}', "["]
)
def test_damaged_labels_are_refused(trained: fastcam.TrainingResult, tmp_path: Path, record: str) -> None:
    path = tmp_path / "damaged.keras"
    with zipfile.ZipFile(trained.path) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, record if name == "fastcam.json" else source.read(name))
    with pytest.raises(ModelError, match=r"fastcam\.json, with the class names, is damaged"):
        fastcam.export(path, tmp_path / "dogs.onnx")


# Determinism and interruptions


def test_the_seed_decides_everything(photos: Path, weights: Path, tmp_path: Path) -> None:
    def train(name: str, seed: int) -> list[NDArray[np.float32]]:
        options = {**_ALTERED, "epochs": 2}
        return _weights(fastcam.finetune(photos, tmp_path / name, weights=weights, seed=seed, **options).path)

    first = train("a.keras", 1)
    assert _is_same(first, train("b.keras", 1))
    assert not _is_same(first, train("c.keras", 2))


class _Interrupted(BaseException):
    """Simulates Ctrl-C or a power failure."""


@pytest.mark.parametrize(
    "interruptions",
    [
        [("features", 14), ("head", 2), ("blocks", 1)],
        pytest.param(
            [("photos", 7), ("features", 14), ("head", 2), ("blocks", 1), ("blocks", 2)],
            marks=[pytest.mark.slow, pytest.mark.nightly],
        ),
    ],
    ids=["few", "many"],
)
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    photos: Path, weights: Path, tmp_path: Path, interruptions: list[tuple[str, int]]
) -> None:
    options = {**_ALTERED, "weights": weights, "unfreeze": 1, "fine_epochs": 3, "fine_learning_rate": 1e-5}
    options["epochs"] = 3
    whole = fastcam.finetune(photos, tmp_path / "whole.keras", **options)

    def interrupt_after(step: str, done: int) -> None:
        def progress(progress: TrainingProgress) -> None:
            if (progress.step, progress.done) == (step, done):
                raise _Interrupted

        with pytest.raises(_Interrupted):
            fastcam.finetune(photos, tmp_path / "parts.keras", resume=True, progress=progress, **options)

    for step, done in interruptions:
        interrupt_after(step, done)
        assert not (tmp_path / "parts.keras").exists()
    said: list[TrainingProgress] = []
    parts = fastcam.finetune(photos, tmp_path / "parts.keras", resume=True, progress=said.append, **options)
    last_step, last_done = interruptions[-1]
    assert [(step.step, step.done) for step in said if step.step in ("head", "blocks")] == [
        (last_step, done) for done in range(last_done + 1, 4)
    ]
    assert _is_same(_weights(whole.path), _weights(parts.path))
    for step, rows in whole.history.items():
        for row, other in zip(rows, parts.history[step], strict=True):
            assert {**row, "seconds": 0} == {**other, "seconds": 0}


_SCRIPT = """
import sys, fastcam
fastcam.finetune(sys.argv[1], sys.argv[2], weights=sys.argv[3], size=48, batch_size=8, augmentations=1, epochs=6,
                 learning_rate=0.01, unfreeze=1, fine_epochs=4, fine_learning_rate=1e-3, resume=True,
                 progress=lambda step: print(step.step, step.done, flush=True))
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_training_that_is_killed_ends_as_if_it_had_not_been(photos: Path, tmp_path: Path) -> None:
    network = _VGG16(weights=None, include_top=False, input_shape=(_SIDE, _SIDE, 3))
    make_layers_he(network, seed=0)
    weights = tmp_path / "vgg.weights.h5"
    network.save_weights(weights)

    def run(out: str, kill_after: int | None) -> int:
        command = [sys.executable, "-c", _SCRIPT, str(photos), str(tmp_path / out), str(weights)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout
            epochs = 0
            for line in child.stdout:
                epochs += line.startswith(("head", "blocks"))
                if epochs == kill_after:
                    child.kill()
            return child.wait()

    assert run("whole.keras", None) == 0
    kills = 0
    while run("killed.keras", 1 + kills % 3) == -signal.SIGKILL:
        kills += 1
    assert kills >= 3
    assert _is_same(_weights(tmp_path / "whole.keras"), _weights(tmp_path / "killed.keras"))


def test_names_that_are_no_unicode_are_kept_in_the_record(weights: Path, tmp_path: Path) -> None:
    """Such a record must not be taken for a missing one: its training would be started again."""
    folder = make_class_folders(tmp_path / "photos", 3)
    for path in [*(folder / "grün").iterdir()]:
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9" + os.fsencode(path.name)))

    def interrupt(progress: TrainingProgress) -> None:
        if progress.step == "head":
            raise _Interrupted

    options = {**_SMALL, "epochs": 2, "weights": weights}
    with pytest.raises(_Interrupted):
        fastcam.finetune(folder, tmp_path / "dogs.keras", progress=interrupt, **options)
    with pytest.raises(WriteError, match="contains an interrupted training"):
        fastcam.finetune(folder, tmp_path / "dogs.keras", **options)
    said: list[TrainingProgress] = []
    result = fastcam.finetune(folder, tmp_path / "dogs.keras", resume=True, progress=said.append, **options)
    assert [step.done for step in said if step.step == "head"] == [2]
    record = json.loads((result.folder / "training.json").read_bytes())
    assert all(Path(path).is_file() for path in record["held_out"])


@pytest.mark.parametrize("content", [b"", b"[]", b"{"])
def test_a_damaged_record_is_not_taken_for_none(photos: Path, weights: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dogs.training").mkdir()
    (tmp_path / "dogs.training" / "training.json").write_bytes(content)
    with pytest.raises(WriteError, match=r"training\.json: .*remove .*dogs\.training to start again"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **_SMALL)


def test_errors_of_the_callers_own_progress_stay_what_they_are(photos: Path, weights: Path, tmp_path: Path) -> None:
    def progress(progress: TrainingProgress) -> None:
        if progress.step == "head":
            raise ConnectionResetError("dashboard went away")

    with pytest.raises(ConnectionResetError, match="dashboard"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, progress=progress, **_SMALL)


# No files are lost


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_no_training_made_is_left_alone(photos: Path, weights: Path, tmp_path: Path) -> None:
    own = tmp_path / "dogs.training"
    for name in ("photos/train/0000/mine.png", "head/notes.txt", "features/mine.npy"):
        (own / name).parent.mkdir(parents=True)
        (own / name).write_bytes(b"mine")
    before = _tree(own)
    with pytest.raises(WriteError, match=r"dogs\.training: was not created by a training and contains 'features'"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **_SMALL)
    assert _tree(own) == before


def test_photos_in_the_trainings_own_folder_are_refused(weights: Path, tmp_path: Path) -> None:
    own = make_class_folders(tmp_path / "birds.training" / "photos", 3)
    before = _tree(own)
    with pytest.raises(ArgumentError, match=r"is in .*birds\.training, where the training keeps its own files"):
        fastcam.finetune(own, tmp_path / "birds.keras", weights=weights, **_SMALL)
    assert _tree(own) == before


def test_a_refused_training_leaves_nothing_behind(weights: Path, tmp_path: Path) -> None:
    for data in ("nowhere", "."):
        with pytest.raises(ArgumentError):
            fastcam.finetune(tmp_path / data, tmp_path / "dogs.keras", weights=weights, **_SMALL)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_weights_is_refused_first(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.applications, "VGG16", _VGG16)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=400_000_000))
    # VGG16's base has 14.7 million weights of 4 bytes, and 8 times that may be stored.
    with pytest.raises(WriteError, match="has 400 MB of free space, but training VGG16 may need 471 MB"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=None, **_SMALL)


@pytest.fixture
def interrupted(photos: Path, weights: Path, tmp_path: Path) -> Path:
    def progress(progress: TrainingProgress) -> None:
        if progress.step == "head":
            raise _Interrupted

    with pytest.raises(_Interrupted):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, progress=progress, **_SMALL)
    return tmp_path / "dogs.keras"


def test_an_interrupted_training_is_not_overwritten(interrupted: Path, photos: Path, weights: Path) -> None:
    with pytest.raises(
        WriteError, match=r"contains an interrupted training: continue it with resume=True \(--resume\)"
    ):
        fastcam.finetune(photos, interrupted, weights=weights, **_SMALL)


def test_other_settings_or_photos_are_not_mixed_in(
    interrupted: Path, photos: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"had other settings \(epochs was 8, not 9\)"):
        fastcam.finetune(photos, interrupted, weights=weights, resume=True, **{**_SMALL, "epochs": 9})
    others = make_class_folders(tmp_path / "others", 6, seed=5)
    with pytest.raises(ArgumentError, match="had other photos"):
        fastcam.finetune(others, interrupted, weights=weights, resume=True, **_SMALL)


def test_two_trainings_never_write_the_same_file(photos: Path, weights: Path, tmp_path: Path) -> None:
    refusals: list[object] = []

    def progress(progress: TrainingProgress) -> None:
        if not refusals:
            with pytest.raises(WriteError, match="another run is writing there") as error:
                fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **_SMALL)
            refusals.append(error)

    fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, progress=progress, **{**_SMALL, "epochs": 1})
    assert refusals


def test_a_diverged_training_says_so_and_can_be_begun_anew(photos: Path, weights: Path, tmp_path: Path) -> None:
    options = {**_SMALL, "epochs": 2}
    with pytest.raises(ModelError, match=r"the loss became \w+ in epoch \d of the head: give a lower learning rate"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **{**options, "learning_rate": 1e38})
    assert not (tmp_path / "dogs.keras").exists()
    fastcam.finetune(photos, tmp_path / "dogs.keras", weights=weights, **options)


@pytest.mark.parametrize("name", ["$100 bill", "$\\frac{$", "a_b^c", "100 %"])
def test_class_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """Matplotlib would parse some as mathematics, and fail."""
    write_confusion_matrix(np.array([[1, 2], [3, 4]]), [name, "other"], tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as drawn:
        assert drawn.size[0] > 100


@pytest.mark.skipif(sys.platform == "win32", reason="needs links as POSIX has them")
@pytest.mark.parametrize("name", ["photos", "features", "head", "model.keras", "training.json", ".fastcam.lock"])
def test_links_in_the_trainings_folder_are_refused(photos: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim.npy").write_bytes(b"the only copy")
    (tmp_path / "dogs.training").mkdir()
    (tmp_path / "dogs.training" / name).symlink_to(outside / ("victim.npy" if "." in name else ""))
    with pytest.raises(WriteError, match="is a link"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=None, **_SMALL)
    assert (outside / "victim.npy").read_bytes() == b"the only copy"
    assert len(list(outside.iterdir())) == 1


# Errors


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("epochs", 0, "a whole number, 1 or more"),
        ("epochs", 2.5, "a whole number"),
        ("fine_epochs", True, "a whole number"),
        ("batch_size", -1, "a whole number, 1 or more"),
        ("patience", 0, "a whole number, 1 or more"),
        ("unfreeze", -1, "a whole number, 0 or more"),
        ("augmentations", None, "a whole number, 0 or more"),
        ("seed", -3, "a whole number, 0 or more"),
        ("size", 0, "a whole number, 1 or more"),
        ("hidden", (0,), "the number of units of each layer"),
        ("learning_rate", 0, "a number above 0"),
        ("learning_rate", float("nan"), "a number above 0"),
        ("fine_learning_rate", "fast", "a number above 0"),
        ("validation_split", 1, "a number above 0 and below 1"),
        ("dropout", 1, "from 0 to below 1"),
        ("backbone", "vgg17", "did you mean"),
        ("unfreeze", 6, "VGG16 has 5 blocks"),
        ("size", 16, "VGG16 cannot be built for this size"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_trained(
    photos: Path, weights: Path, tmp_path: Path, argument: str, value: object, message: str
) -> None:
    options: dict[str, Any] = {"weights": weights, "size": _SIDE, argument: value}
    with pytest.raises(ArgumentError, match=message) as error:
        fastcam.finetune(photos, tmp_path / "dogs.keras", **options)
    assert f"{argument}=" in str(error.value)
    record = tmp_path / "dogs.training" / "training.json"
    assert not record.exists() or json.loads(record.read_bytes()) == {"state": "new"}


def test_nothing_stays_frozen_in_a_network_without_weights(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="omit unfreeze"):
        fastcam.finetune(photos, tmp_path / "dogs.keras", weights=None, unfreeze=1)


def test_the_file_must_be_a_keras_file_in_another_place(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"must end in \.keras"):
        fastcam.finetune(photos, tmp_path / "dogs.h5")
    with pytest.raises(ArgumentError, match="is in the folder of the photos"):
        fastcam.finetune(photos, photos / "dogs.keras")
    assert not (photos / "dogs.training").exists()
    with pytest.raises(WriteError, match="does not exist"):
        fastcam.finetune(photos, tmp_path / "nowhere" / "dogs.keras")


@pytest.mark.parametrize("missing", ["tensorflow", "matplotlib", "keras"])
def test_a_missing_package_names_the_extra(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r'pip install "fastcam\[train\]"'):
        fastcam.finetune(photos, tmp_path / "dogs.keras")
    assert not (tmp_path / "dogs.training").exists()


def test_damaged_features_are_computed_again(photos: Path, weights: Path, tmp_path: Path) -> None:
    options = {**_SMALL, "epochs": 1, "weights": weights}
    result = fastcam.finetune(photos, tmp_path / "dogs.keras", **options)
    before = _weights(result.path)
    for number, path in enumerate(sorted((result.folder / "features").iterdir())):
        path.write_bytes(path.read_bytes()[:200] if number else b"")
    assert _is_same(_weights(fastcam.finetune(photos, tmp_path / "dogs.keras", **options).path), before)
