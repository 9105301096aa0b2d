"""Keras models as people build them against GradientTape, at the automatic layer and at one in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, relative_error

import fastcam

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")

layers = keras.layers
Layer: Any = layers.Layer
Model: Any = keras.Model

# The bound for whole float32 networks.
_BOUND = 1e-4
_TARGETS = [0, 2, 4]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    keras.utils.set_random_seed(1)


def _settle(model: Any) -> Any:
    """Set biases and normalisations to values as after training."""
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables + model.non_trainable_variables:
        if len(variable.shape) == 1 and variable.dtype == "float32" and variable.name not in ("mean", "variance"):
            low, high = (0.5, 1.5) if variable.name in ("gamma", "moving_variance") else (-0.2, 0.2)
            variable.assign(generator.uniform(low, high, variable.shape).astype(np.float32))
    return model


def _block(filters: int, name: str, **convolution: Any) -> list[Any]:
    return [
        layers.Conv2D(filters, 3, padding="same", name=f"{name}_conv", **convolution),
        layers.BatchNormalization(name=f"{name}_norm"),
        layers.ReLU(name=name),
    ]


def _head() -> list[Any]:
    return [layers.GlobalAveragePooling2D(), layers.Dense(8, activation="relu"), layers.Dense(5, name="breed")]


def _plain(*first: Any, size: int = 24) -> Any:
    blocks = [*_block(6, "early", strides=2), *_block(8, "late")]
    return keras.Sequential([keras.Input((size, size, 3)), *first, *blocks, *_head()])


def _nested_in_sequential() -> Any:
    backbone = keras.Sequential(
        [keras.Input((24, 24, 3)), *_block(6, "early", strides=2), *_block(8, "late")], name="backbone"
    )
    features = keras.Sequential([keras.Input((24, 24, 3)), layers.Rescaling(1 / 64), backbone], name="features")
    return keras.Sequential([keras.Input((24, 24, 3)), features, *_head()])


def _nested_in_functional() -> Any:
    picture = keras.Input((24, 24, 3))
    x = picture
    for layer in _block(6, "early", strides=2):
        x = layer(x)
    skip = x
    for layer in _block(6, "late"):
        x = layer(x)
    backbone = keras.Model(picture, layers.Add(name="joined")([x, skip]), name="backbone")
    wrapped = keras.Sequential([keras.Input((24, 24, 3)), backbone, layers.Dropout(0.3)], name="wrapped")
    photo = keras.Input((24, 24, 3))
    x = wrapped(layers.RandomFlip()(photo))
    for layer in _head():
        x = layer(x)
    return keras.Model(photo, x)


def _augmented() -> Any:
    return _plain(
        layers.RandomFlip("horizontal"), layers.RandomRotation(0.1), layers.RandomZoom(0.2), layers.RandomContrast(0.3)
    )


def _normalized() -> Any:
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(3).normal(90, 40, (16, 24, 24, 3)).astype(np.float32))
    return _plain(normalization)


def _rescaled() -> Any:
    return _plain(layers.Rescaling(1 / 100, offset=-1.2))


class _Gate(Layer):
    """A custom layer: weights, and arithmetic on them."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x: Any) -> Any:
        return x * keras.ops.sigmoid(x * self.scale)


class _Subclassed(Model):
    """Layers called in a method; its call has no ``training`` argument."""

    def __init__(self) -> None:
        super().__init__()
        self.early = layers.Conv2D(6, 3, strides=2, activation="relu", name="early")
        self.gate = _Gate(name="gate")
        self.late = layers.Conv2D(8, 3, activation="relu", name="late")
        self.pool = layers.GlobalAveragePooling2D()
        self.scores = layers.Dense(5, name="scores")

    def call(self, images: Any) -> Any:
        x = self.late(self.gate(self.early(images / 64)))
        return self.scores(self.pool(x))


def _subclassed() -> Any:
    model = _Subclassed()
    model(np.zeros((1, 24, 24, 3), np.float32))
    return model


def _shared() -> Any:
    photo = keras.Input((24, 24, 3))
    convolution = layers.Conv2D(3, 3, padding="same", activation="relu", name="shared")
    x = layers.ReLU(name="late")(layers.Conv2D(8, 3, name="between")(convolution(convolution(photo))))
    for layer in _head():
        x = layer(x)
    return keras.Model(photo, x)


def _several_outputs() -> Any:
    photo = keras.Input((24, 24, 3))
    x = photo
    for layer in [*_block(6, "early", strides=2), *_block(8, "late")]:
        x = layer(x)
    pooled = layers.GlobalAveragePooling2D()(x)
    return keras.Model(photo, {"age": layers.Dense(1, name="years")(pooled), "breed": layers.Dense(5)(pooled)})


def _fine_tuned() -> Any:
    """A network of keras.applications under a new head, as in tutorials, in a separate model."""
    base = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(64, 64, 3), alpha=0.35)
    augmentation = keras.Sequential(
        [keras.Input((64, 64, 3)), layers.RandomFlip(), layers.RandomRotation(0.1)], name="augmentation"
    )
    photo = keras.Input((64, 64, 3))
    x = base(layers.Rescaling(1 / 127.5, offset=-1)(augmentation(photo)))
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    classifier = keras.Model(photo, layers.Dense(5)(x), name="classifier")
    return keras.Sequential([keras.Input((64, 64, 3)), classifier])


# The model, the automatic layer and one in the middle.
_MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "nested in Sequential": (_nested_in_sequential, "late", "early"),
    "nested in Functional": (_nested_in_functional, "joined", "wrapped/backbone/early"),
    "augmentation": (_augmented, "late", "early"),
    "Normalization": (_normalized, "late", "early_norm"),
    "Resizing, bilinear": (lambda: _plain(layers.Resizing(20, 28)), "late", "early"),
    "Resizing, nearest": (lambda: _plain(layers.Resizing(17, 30, interpolation="nearest")), "late", "early"),
    "CenterCrop": (lambda: _plain(layers.CenterCrop(18, 20)), "late", "early"),
    "subclassed": (_subclassed, "late", "gate"),
    "shared weights": (_shared, "late", "shared@2"),
}


def _image(side: int = 24) -> Array:
    return np.random.default_rng(1).uniform(0, 255, (1, side, side, 3)).astype(np.float32)


def _tape(model: Any, layer: str, image: Array, output: str | None = None) -> tuple[Array, Array]:
    """Grad-CAM before normalisation (K,h,w), and the scores, by GradientTape; the layer's last call counts."""
    import tensorflow as tf

    name = layer.partition("@")[0].rpartition("/")[2]
    (explained,) = [item for item in model._flatten_layers() if item.name == name]
    original = explained.call
    activations: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        tape.watch(result)
        activations.append(result)
        return result

    explained.call = call
    try:
        with tf.GradientTape(persistent=True) as tape:
            outputs = model(tf.constant(image), training=False)
            scores = outputs if output is None else outputs[output]
            wanted = [scores[0, target] for target in _TARGETS]
    finally:
        explained.call = original
    maps = []
    for score in wanted:
        weights = tf.reduce_mean(tape.gradient(score, activations[-1]), axis=(0, 1, 2))
        maps.append(tf.nn.relu(tf.reduce_sum(activations[-1][0] * weights, axis=-1)).numpy())
    return np.stack(maps), scores.numpy()


def _compare(path: Path, expected: tuple[Array, Array], image: Array) -> None:
    found = fastcam.Explainer(path)(image, _TARGETS, size="layer", normalize=None)
    assert np.abs(expected[0]).max() > 0
    assert relative_error(found.maps[0], expected[0]) < _BOUND
    assert relative_error(found.logits, expected[1]) < _BOUND


@pytest.mark.parametrize("name", _MODELS)
def test_maps_are_those_of_gradient_tape(name: str, tmp_path: Path) -> None:
    _check(*_MODELS[name], _image(), tmp_path)


@pytest.mark.slow
def test_a_fine_tuned_network_is_explained_two_levels_down(tmp_path: Path) -> None:
    middle = "classifier/mobilenetv2_0.35_64/block_6_expand_relu"
    _check(_fine_tuned, "out_relu", middle, _image(64), tmp_path)


def _check(build: Callable[[], Any], automatic: str, middle: str, image: Array, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = _settle(build())
    assert fastcam.export(model, tmp_path / "automatic.onnx").layer == automatic
    _compare(tmp_path / "automatic.onnx", _tape(model, automatic, image), image)
    fastcam.export(model, tmp_path / "middle.onnx", layer=middle)
    _compare(tmp_path / "middle.onnx", _tape(model, middle, image), image)
    ops = {node.op_type for node in onnx.load(tmp_path / "automatic.onnx").graph.node}
    assert not [op for op in ops if op.startswith(("Random", "Bernoulli", "BatchNorm"))]


@pytest.mark.parametrize("layer", ["late", "early"])
def test_the_chosen_one_of_several_outputs_is_explained(layer: str, tmp_path: Path) -> None:
    model, image = _settle(_several_outputs()), _image()
    fastcam.export(model, tmp_path / "breed.onnx", output="breed", layer=layer)
    _compare(tmp_path / "breed.onnx", _tape(model, layer, image, "breed"), image)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(("build", "layer"), [(_rescaled, "late"), (_rescaled, "early"), (_normalized, "late")])
def test_mixed_precision_is_exported_in_float32(
    policy: str, build: Callable[[], Any], layer: str, tmp_path: Path
) -> None:
    """Against the same weights in a model that computes in float32."""
    image = _image()
    twin = _settle(build())
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = build()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    model.set_weights(twin.get_weights())
    result = fastcam.export(model, tmp_path / "mixed.onnx", layer=layer)
    widened = [note for note in result.notes if note.kind == "widened"]
    assert widened == [f"The model computes in {policy[6:]}: it is exported in float32."]
    _compare(tmp_path / "mixed.onnx", _tape(twin, layer, image), image)
    assert {item.compute_dtype for item in model.layers} == {policy[6:]}
    halved = fastcam.export(model, tmp_path / "half.onnx", layer=layer, precision="fp16")
    assert not [note for note in halved.notes if note.kind == "widened"]
    assert keras.backend.standardize_dtype(model(image).dtype) == policy[6:]
