"""Heatmaps of exported Keras models against TensorFlow's GradientTape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, relative_error
from textbook import Textbook, make_layers_he

import fastcam

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")

# The bound for whole float32 networks.
_BOUND = 1e-4
_KINK = 1e-5


def small_vgg() -> Any:
    """A small version of VGG16's last two blocks and head."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="block1_conv1"),
            layers.MaxPooling2D(2, name="block1_pool"),
            layers.Conv2D(12, 3, padding="same", activation="relu", name="block2_conv1"),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="block2_conv2"),
            layers.MaxPooling2D(2, name="block2_pool"),
            layers.Flatten(name="flatten"),
            layers.Dense(64, activation="relu", name="fc1"),
            layers.Dense(48, activation="relu", name="fc2"),
            layers.Dense(15, activation="softmax", name="predictions"),
        ]
    )


@pytest.fixture(scope="module")
def model() -> Any:
    model = small_vgg()
    make_layers_he(model, seed=1)
    return model


def _images(count: int, size: int, seed: int = 0) -> Array:
    """Pictures of soft blobs, about as bright as preprocessed photos."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(0, 60, (count, size // 8, size // 8, 3))
    fine = generator.normal(0, 15, (count, size, size, 3))
    return (coarse.repeat(8, axis=1).repeat(8, axis=2) + fine).astype(np.float32)


def _compare(explainer: fastcam.Explainer, textbook: Textbook, images: Array, targets: list[int]) -> int:
    """Compare every image off the kinks and every target; return how many maps that were."""
    compared = 0
    for image in images:
        if textbook.kink_distance(image[None]) < _KINK:
            continue
        found = explainer(image[None], targets, size="layer")
        for k, target in enumerate(targets):
            _, logits = textbook.raw_map(image[None], target)
            expected = textbook.heatmap(image[None], target)
            assert relative_error(found.logits[0], logits) < _BOUND
            if np.isnan(expected).any():
                np.testing.assert_array_equal(found.heatmaps[0, k], 0)
                continue
            assert relative_error(found.heatmaps[0, k], expected) < _BOUND
            compared += 1
    return compared


@pytest.mark.parametrize("layer", [None, "block2_conv1", "block1_conv1", "block1_pool"])
def test_small_vgg_at_every_depth(model: Any, layer: str | None, tmp_path: Path) -> None:
    result = fastcam.export(model, tmp_path / "vgg.onnx", layer=layer, preprocess="vgg16")
    assert result.layer == (layer or "block2_conv2")
    assert result.candidates == ("block2_conv2", "block2_conv1", "block1_conv1")
    textbook = Textbook(keras.models.clone_model(model), result.layer)
    textbook._model.set_weights(model.get_weights())
    compared = _compare(fastcam.Explainer(result.path), textbook, _images(4, 32), list(range(15)))
    assert compared >= 20


def test_saved_files_export_as_the_model_itself(model: Any, tmp_path: Path) -> None:
    fastcam.export(model, tmp_path / "model.onnx")
    for suffix in (".keras", ".h5"):
        model.save(tmp_path / f"model{suffix}")
        fastcam.export(tmp_path / f"model{suffix}", tmp_path / f"{suffix[1:]}.onnx")
        sessions = [
            onnxruntime.InferenceSession(tmp_path / name, _quiet()) for name in ("model.onnx", f"{suffix[1:]}.onnx")
        ]
        image = _images(1, 32)
        first, second = (session.run(["weights"], {session.get_inputs()[0].name: image})[0] for session in sessions)
        np.testing.assert_array_equal(first, second)


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def test_the_textbook_code_gives_nan_where_nothing_is_positive(tmp_path: Path) -> None:
    """The all-negative map: 0 / 0 there, zeros here."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax"),
        ]
    )
    make_layers_he(model, seed=0)
    kernel = np.abs(model.layers[-1].get_weights()[0]) * np.array([[-1, 1]], np.float32)
    model.layers[-1].set_weights([kernel, np.zeros(2, np.float32)])
    fastcam.export(model, tmp_path / "negative.onnx")
    image = _images(1, 8)
    found = fastcam.Explainer(tmp_path / "negative.onnx")(image, [0, 1], size="layer")
    textbook = Textbook(model, "conv")
    assert np.isnan(textbook.heatmap(image, 0)).all()
    np.testing.assert_array_equal(found.heatmaps[0, 0], 0)
    assert relative_error(found.heatmaps[0, 1], textbook.heatmap(image, 1)) < _BOUND


@pytest.fixture(scope="module")
def vgg16() -> Any:
    model = keras.applications.VGG16(weights=None, input_shape=(224, 224, 3), classes=15)
    make_layers_he(model, seed=2)
    return model


@pytest.fixture(scope="module")
def vgg16_file(vgg16: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg16") / "dogs.onnx"
    result = fastcam.export(vgg16, path)
    assert result.layer == "block5_conv3"
    assert result.preprocessing == fastcam.Preprocessing.of("vgg16")
    return path


@pytest.mark.slow
def test_full_size_vgg16(vgg16: Any, vgg16_file: Path) -> None:
    textbook = Textbook(vgg16, "block5_conv3")
    assert _compare(fastcam.Explainer(vgg16_file), textbook, _images(3, 224), [0, 7, 14]) >= 4


@pytest.mark.slow
def test_full_size_vgg16_file_is_valid_and_grows_by_less_than_three_percent(vgg16: Any, vgg16_file: Path) -> None:
    onnx.checker.check_model(vgg16_file, full_check=True)
    weights = 4 * vgg16.count_params()
    assert weights < vgg16_file.stat().st_size < 1.03 * weights


_EXPORT = """
import json, resource, sys
import fastcam
fastcam.export(sys.argv[1], sys.argv[2])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(peak * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_exporting_full_size_vgg16_stays_below_three_gigabytes(vgg16: Any, vgg16_file: Path, tmp_path: Path) -> None:
    """The whole process, including TensorFlow; and another process writes the same bytes."""
    vgg16.save(tmp_path / "dogs.keras")
    command = [sys.executable, "-c", _EXPORT, str(tmp_path / "dogs.keras"), str(tmp_path / "dogs.onnx")]
    outputs = []
    for _ in range(2):
        outputs.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        (tmp_path / "dogs.onnx").rename(tmp_path / f"{len(outputs)}.onnx")
    assert max(json.loads(output) for output in outputs) < 3e9
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
