"""Keras models into graphs: layers, names, preprocessing, errors."""

from __future__ import annotations

import logging
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from networks import relative_error

import fastcam
from fastcam.errors import MissingExtraError, ModelError
from fastcam.importers import import_model
from fastcam.simplifier import simplify

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")


def _model(*first: Any, head: str = "flatten") -> Any:
    layers = keras.layers
    heads = {"flatten": layers.Flatten(), "pool": layers.GlobalAveragePooling2D()}
    return keras.Sequential(
        [
            keras.Input((12, 12, 3), name="photo"),
            *first,
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(max_value=6.0, name="activation"),
            layers.Dropout(0.5, name="dropout"),
            heads[head],
            layers.Dense(5, activation="softmax", name="scores"),
        ]
    )


def test_values_are_named_after_their_layers() -> None:
    imported = import_model(_model())
    assert imported.framework == "keras"
    assert list(imported.graph.inputs) == ["photo"]
    assert imported.graph.inputs["photo"].shape == ("batch", 12, 12, 3)
    assert imported.layers["conv"] != imported.layers["activation"]
    simplify(imported.graph)
    ops = [node.op_type for node in imported.graph.nodes]
    assert ops.count("Conv") == ops.count("Clip") == 1
    assert not {"Mul", "Sub", "Shape", "BatchNormalization", "Identity"} & set(ops)
    assert imported.graph.shape("activation") == ("batch", 4, 10, 10)


def test_the_network_computes_what_keras_computes(rng: np.random.Generator, tmp_path: Path) -> None:
    for head in ("flatten", "pool"):
        model = _model(head=head)
        model.get_layer("norm").set_weights([rng.uniform(0.5, 2, 4) for _ in range(4)])
        fastcam.export(model, tmp_path / "model.onnx", preprocess="none")
        image = rng.normal(size=(3, 12, 12, 3)).astype(np.float32)
        found = fastcam.Explainer(tmp_path / "model.onnx")(image)
        assert relative_error(found.probabilities, model.predict(image, verbose=0)) < 1e-5


def test_a_layer_that_hands_its_input_on_means_the_same_value() -> None:
    imported = import_model(_model())
    assert imported.layers["dropout"] == imported.layers["activation"]


def test_nested_models_are_seen_through(tmp_path: Path) -> None:
    inner = keras.Sequential(
        [keras.Input((12, 12, 3)), keras.layers.Conv2D(4, 3, activation="relu", name="deep_conv")], name="backbone"
    )
    outer = keras.Sequential(
        [keras.Input((12, 12, 3)), inner, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)]
    )
    result = fastcam.export(outer, tmp_path / "nested.onnx", layer="deep_conv")
    assert result.layer == "deep_conv"


@pytest.mark.parametrize(
    ("first", "expected"),
    [([], None), ([keras.layers.Rescaling(1 / 255)], "none"), ([keras.layers.ZeroPadding2D(1)], None)],
    ids=["bare", "rescaling", "padding"],
)
def test_preprocessing_inside_the_model_is_seen(first: list[Any], expected: str | None) -> None:
    assert import_model(_model(*first)).preprocessing == expected


def test_vgg_brings_its_preprocessing() -> None:
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
    model = keras.Sequential([model, keras.layers.Dense(3)])
    assert import_model(model).preprocessing == "vgg16"


def test_names_are_the_same_each_time() -> None:
    model = _model()
    first, second = (import_model(model).graph for _ in range(2))
    assert [node.SerializeToString() for node in first.nodes] == [node.SerializeToString() for node in second.nodes]
    assert list(first.constants) == list(second.constants)


def test_the_converters_report_stays_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        import_model(_model())
    assert not [record for record in caplog.records if record.name.startswith("tf2onnx")]


def test_layers_are_left_as_they_were() -> None:
    call = keras.layers.Layer.__call__
    import_model(_model())
    assert keras.layers.Layer.__call__ is call


def test_an_open_image_size_is_refused() -> None:
    model = keras.Sequential(
        [keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D()]
    )
    with pytest.raises(ModelError, match=r"shape \(None, None, None, 3\).*input_shape=\(224, 224, 3\)"):
        import_model(model)


def test_several_inputs_are_refused() -> None:
    inputs = [keras.Input((4, 4, 3)), keras.Input((4, 4, 3))]
    model = keras.Model(inputs, keras.layers.Add()(inputs))
    with pytest.raises(ModelError, match="2 inputs"):
        import_model(model)


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_damaged_keras_file_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(ModelError, match=rf"broken\{suffix}: Keras cannot load"):
        import_model(tmp_path / f"broken{suffix}")


def test_an_archive_with_a_damaged_member_is_refused(tmp_path: Path) -> None:
    _model().save(tmp_path / "good.keras")
    with zipfile.ZipFile(tmp_path / "good.keras") as good, zipfile.ZipFile(tmp_path / "bad.keras", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, b"damaged" if name == "model.weights.h5" else good.read(name))
    with pytest.raises(ModelError, match=r"bad\.keras: Keras cannot load"):
        import_model(tmp_path / "bad.keras")


def test_a_model_with_assets_loads_the_long_way(tmp_path: Path) -> None:
    _model().save(tmp_path / "good.keras")
    with zipfile.ZipFile(tmp_path / "good.keras", "a") as archive:
        archive.writestr("assets/notes.txt", b"something that a layer keeps")
    assert import_model(tmp_path / "good.keras").layers["conv"]


@pytest.mark.parametrize("module", ["tf2onnx", "tensorflow"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    model = _model()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[keras\]"):
        import_model(model)


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ModelError, match=r"'jax'.*KERAS_BACKEND=tensorflow"):
        import_model(_model())


def test_a_model_that_was_never_built_is_refused() -> None:
    with pytest.raises(ModelError, match=r"does not know its input: build it with keras\.Input"):
        import_model(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ModelError, match="does not know its input"):
        import_model(keras.layers.Dense(3))


def test_an_op_that_the_converter_lacks_is_named() -> None:
    import tensorflow as tf

    class Gamma(keras.layers.Layer):  # type: ignore[misc,name-defined]  # keras has no types
        def call(self, x: Any) -> Any:
            return tf.math.lgamma(x)

    with pytest.raises(ModelError, match="no ONNX for TensorFlow's Lgamma"):
        import_model(_model(Gamma()))


def _squeeze_and_excitation(x: Any) -> Any:
    layers = keras.layers
    gate = layers.Dense(4, activation="sigmoid")(layers.GlobalAveragePooling2D()(x))
    return layers.Multiply(name="explained")([x, layers.Reshape((1, 1, 4))(gate)])


def _layer_normalization(x: Any) -> Any:
    layers = keras.layers
    return layers.ReLU(name="explained")(layers.LayerNormalization()(layers.UpSampling2D()(x)))


def _dense_over_channels(x: Any) -> Any:
    return keras.layers.Dense(5, activation="relu", name="explained")(x)


@pytest.mark.parametrize("block", [_squeeze_and_excitation, _layer_normalization, _dense_over_channels])
def test_activations_are_those_of_the_layer(block: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Blocks that leave the channels last: (N,C,h,w) all the same, and the numbers of the Keras layer."""
    image = keras.Input((16, 12, 3))
    x = block(keras.layers.Conv2D(4, 3, activation="relu")(image))
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    features, head = fastcam.split(model, "explained")
    pictures = rng.normal(size=(2, 16, 12, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(features.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: pictures})
    layer = keras.Model(model.inputs, model.get_layer("explained").output)
    expected = np.asarray(layer([pictures])).transpose(0, 3, 1, 2)
    assert relative_error(found, expected) < 1e-5
    (logits,) = onnxruntime.InferenceSession(head.SerializeToString()).run(None, {features.graph.output[0].name: found})
    assert relative_error(logits, np.asarray(model(pictures))) < 1e-5
