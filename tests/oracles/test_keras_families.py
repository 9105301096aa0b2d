"""Every family of keras.applications against GradientTape, at the automatic layer and at one in the middle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, relative_error

import fastcam

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")

# Input side, and the layer to explain if the automatic one is not a Keras layer (a bare addition).
_FAMILIES: dict[str, tuple[int, str | None]] = {
    "ConvNeXtTiny": (64, "convnext_tiny_stage_3_block_2_pointwise_conv_2"),
    "DenseNet121": (64, None),
    "EfficientNetB0": (64, None),
    "EfficientNetV2B0": (64, None),
    "InceptionResNetV2": (107, None),
    "InceptionV3": (107, None),
    "MobileNetV2": (64, None),
    "MobileNetV3Large": (64, None),
    "MobileNetV3Small": (64, None),
    "NASNetMobile": (224, None),
    "ResNet50": (64, None),
    "ResNet50V2": (64, None),
    "VGG19": (64, None),
    "Xception": (96, None),
}
_TARGETS = [0, 7]
_RANGES = {"gamma": (0.8, 1.2), "beta": (-0.1, 0.1), "moving_mean": (-0.1, 0.1), "moving_variance": (0.5, 1.5)}


def _model(family: str, side: int) -> Any:
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, family)(weights=None, input_shape=(side, side, 3), classes=10)
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # As after training: statistics that are not 0 and 1.
            ranges = {
                "gamma": (0.8, 1.2),
                "beta": (-0.1, 0.1),
                "moving_mean": (-0.1, 0.1),
                "moving_variance": (0.5, 1.5),
            }
            for variable in layer.variables:
                low, high = ranges[variable.name]
                variable.assign(generator.uniform(low, high, variable.shape).astype(np.float32))
    return model


def _raw_maps(model: Any, layer: str, images: Array) -> Array:
    """Grad-CAM by GradientTape before normalisation, (N,K,h,w)."""
    import tensorflow as tf

    split = keras.Model(model.inputs, [model.get_layer(layer).output, model.outputs[0]])
    with tf.GradientTape(persistent=True) as tape:
        activations, scores = split([images])
        wanted = [tf.reduce_sum(scores[:, target]) for target in _TARGETS]
    maps = []
    for score in wanted:
        weights = tf.reduce_mean(tape.gradient(score, activations), axis=(1, 2), keepdims=True)
        maps.append(tf.nn.relu(tf.reduce_sum(activations * weights, axis=-1)).numpy())
    return np.stack(maps, axis=1)


# Depthwise and residual blocks, squeeze-and-excitation; the others repeat them.
_EVERY_TIME = {"MobileNetV2", "EfficientNetB0", "ResNet50"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in _EVERY_TIME else pytest.mark.nightly) for name in _FAMILIES],
)
def test_maps_are_those_of_gradient_tape(family: str, tmp_path: Path) -> None:
    side, last = _FAMILIES[family]
    model = _model(family, side)
    images = (np.random.default_rng(1).normal(0, 50, (3, side, side, 3)) + 100).astype(np.float32)
    result = fastcam.export(model, tmp_path / "last.onnx", layer=last)
    names = {layer.name for layer in model.layers}
    known = [candidate for candidate in result.candidates if candidate in names]
    fastcam.export(model, tmp_path / "middle.onnx", layer=known[len(known) // 2])
    expected_scores = np.asarray(model(images))

    model.layers[-1].activation = keras.activations.linear
    for name, layer in (("last", result.layer), ("middle", known[len(known) // 2])):
        found = fastcam.Explainer(tmp_path / f"{name}.onnx")(images, _TARGETS, size="layer", normalize=None)
        assert found.probabilities is not None
        assert relative_error(found.probabilities, expected_scores) < 1e-4
        errors = list(map(relative_error, found.maps, _raw_maps(model, layer, images)))
        # Of a hundred thousand ReLUs one may be within rounding of 0, on different sides in the two networks: such a
        # kink moves the maps of that image, but not of most.
        assert np.median(errors) < 1e-4, errors

    nodes = onnx.load(tmp_path / "last.onnx").graph.node
    ops = Counter(node.op_type for node in nodes)
    convolved = {node.output[0] for node in nodes if node.op_type == "Conv"}
    readers = Counter(name for node in nodes for name in node.input)
    for node in nodes:
        if node.op_type == "BatchNormalization":
            # Only what a Conv cannot absorb, because another node reads it unscaled.
            assert node.input[0] not in convolved or readers[node.input[0]] > 1
    # One at the image, three at targets and weights, and where the channels must be last.
    assert ops["Transpose"] <= _LEFT_TRANSPOSES.get(family, 4)


_LEFT_TRANSPOSES = {"ConvNeXtTiny": 80, "VGG19": 5}
