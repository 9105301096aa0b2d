"""A Keras U-Net, channels last, against TensorFlow's GradientTape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import NetworkBuilder, relative_error

import fastcam

_CLASSES = 4


def _unet(keras: Any) -> Any:
    layers = keras.layers
    image = keras.Input((32, 48, 3))
    first = layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(image)
    small = layers.MaxPooling2D(4)(first)
    bottom = layers.Conv2D(16, 3, padding="same", activation="relu", name="bottom")(small)
    joined = layers.Concatenate()([first, layers.UpSampling2D(4, interpolation="bilinear", name="up")(bottom)])
    decoded = layers.Conv2D(8, 3, padding="same", activation="relu", name="decoded")(joined)
    return keras.Model(image, layers.Conv2D(_CLASSES, 1, activation="softmax", name="pixels")(decoded))


def test_regions_of_a_keras_network_are_those_of_gradient_tape(tmp_path: Path) -> None:
    """The softmax is removed, although the network turns its scores behind it."""
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    tf = pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")
    keras.utils.set_random_seed(0)
    model = _unet(keras)
    result = fastcam.export(model, tmp_path / "unet.onnx", score="segmentation")
    assert result.layers == ("bottom",)
    assert [note.kind for note in result.notes] == []
    images = np.random.default_rng(0).random((2, 32, 48, 3), dtype=np.float32)
    explainer = fastcam.Explainer(tmp_path / "unet.onnx", device="cpu")
    found = explainer(images, list(range(_CLASSES)), normalize="signed", size="layer")
    kernel, bias = model.get_layer("pixels").get_weights()
    both = keras.Model(model.input, [model.get_layer("first").output, model.get_layer("bottom").output])
    for label in range(_CLASSES):
        with tf.GradientTape() as tape:
            first, bottom = both(images)
            tape.watch(bottom)
            joined = tf.concat([first, model.get_layer("up")(bottom)], -1)
            logits = tf.einsum("nhwi,io->nhwo", model.get_layer("decoded")(joined), kernel[0, 0]) + bias
            region = tf.cast(tf.argmax(logits, -1) == label, tf.float32)
            score = tf.reduce_sum(logits[..., label] * region, [1, 2]) / tf.maximum(tf.reduce_sum(region, [1, 2]), 1)
        gradient = tape.gradient(score, bottom)
        assert relative_error(found.logits[:, label], score.numpy()) < 1e-4
        raw = tf.reduce_sum(tf.reduce_mean(gradient, [1, 2], keepdims=True) * bottom, -1).numpy()
        assert relative_error(found.maps[:, label], raw / np.abs(raw).max(axis=(1, 2), keepdims=True)) < 1e-4


def test_probabilities_without_a_known_activation_are_noted(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]), name="features")
    powers = net.add("Exp", net.conv(features, (3, 6, 1, 1)))
    total = net.add("ReduceSum", powers, net.constant([1]), keepdims=1)
    model = net.build(net.add("Div", powers, total)).to_model()
    result = fastcam.export(model, tmp_path / "expanded.onnx", score="segmentation")
    assert any("look like probabilities" in note for note in result.notes)
    # Nothing that was appended to the network is explained, although its maps are as small as any.
    assert set(result.candidates) <= {name for node in model.graph.node for name in node.output}
