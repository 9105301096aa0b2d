"""Grad-CAM as the tutorials write it, in TensorFlow: the ground truth for Keras models."""

from __future__ import annotations

from typing import Any

import numpy as np
from networks import Array


def make_layers_he(model: Any, seed: int) -> None:
    """Give every kernel He-initialised weights (He et al. 2015), which preserve the scale of activations."""
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        shape = tuple(variable.shape)
        if len(shape) == 1:
            variable.assign(generator.normal(0, 0.05, shape).astype(np.float32))
        else:
            spread = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
            variable.assign(generator.standard_normal(shape, np.float32) * spread)


class Textbook:
    """The textbook code for one model and layer; the model's softmax is removed."""

    def __init__(self, model: Any, layer: str) -> None:
        import keras

        self._layers = model.layers
        model.layers[-1].activation = keras.activations.linear
        self._model = keras.Model(model.inputs, [model.get_layer(layer).output, model.outputs[0]])

    def raw_map(self, image: Array, target: int) -> tuple[Array, Array]:
        """Return the map (h,w), before division by its maximum, and the logits of one image (1,H,W,3)."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            activations, logits = self._model([image])
            score = logits[0, target]
        gradients = tape.gradient(score, activations)
        weights = tf.reduce_mean(gradients, axis=(0, 1, 2))
        heatmap = tf.nn.relu(tf.reduce_mean(activations[0] * weights, axis=-1))
        return heatmap.numpy(), logits.numpy()[0]

    def heatmap(self, image: Array, target: int) -> Array:
        """Return the map divided by its maximum: NaN where nothing is positive."""
        raw, _ = self.raw_map(image, target)
        with np.errstate(invalid="ignore"):
            return np.asarray(raw / raw.max())

    def kink_distance(self, image: Array) -> float:
        """Return the smallest dense pre-activation, relative to their spread.

        The gradient jumps where a ReLU switches. Below 1e-5 the rounding of two float32 convolution stacks may put a
        unit on different sides, and the maps then legitimately differ by one unit of some thousands.
        """
        import keras

        dense = [layer for layer in self._layers[:-1] if layer.__class__.__name__ == "Dense"]
        distances = []
        for layer in dense:
            (source,) = keras.Model(self._model.inputs, [layer.input])([image])
            kernel, bias = (np.asarray(weight, np.float64) for weight in layer.get_weights())
            values = np.asarray(source, np.float64).reshape(1, -1) @ kernel + bias
            distances.append(float(np.abs(values).min() / values.std()))
        return min(distances)
