"""Small networks for the tests, and the measure of error that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

import fastcam
from fastcam.graph import Graph, TensorType

Array = npt.NDArray[Any]


def relative_error(actual: npt.ArrayLike | None, expected: npt.ArrayLike) -> float:
    """Return the relative L2 error; of a zero expectation, the norm of what is there instead."""
    wanted = np.asarray(expected, np.float64)
    assert actual is not None
    found = np.asarray(actual, np.float64)
    assert found.shape == wanted.shape
    norm = float(np.linalg.norm(wanted))
    error = float(np.linalg.norm(found - wanted))
    return error / norm if norm else error


class NetworkBuilder:
    """Writes small networks node by node: ``net.add("Relu", net.input)``."""

    def __init__(
        self, shape: tuple[int | str, ...], dtype: Any = np.float32, name: str = "image", seed: int = 0
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.graph = Graph([], {}, {name: TensorType(self.dtype, shape)}, [], 18)
        self.input = name
        self._rng = np.random.default_rng(seed)

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or self.graph.unused_name(op.lower())
        self.graph.append(helper.make_node(op, list(inputs), [output], name=f"{output}_node", **attributes))
        return output

    def constant(self, array: npt.ArrayLike, name: str = "constant") -> str:
        key = self.graph.unused_name(name)
        self.graph.constants[key] = np.asarray(array)
        return key

    def weight(self, *shape: int, scale: float | None = None) -> str:
        """Add He-initialised weights (He et al. 2015), which preserve the scale of activations."""
        fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
        spread = np.sqrt(2 / fan_in) if scale is None else scale
        return self.constant(self._rng.normal(0, spread, shape).astype(self.dtype), "weight")

    def conv(self, value: str, filters: tuple[int, int, int, int], name: str = "", **attributes: Any) -> str:
        bias = self.constant(self._rng.normal(0, 0.1, filters[0]).astype(self.dtype), "bias")
        return self.add("Conv", value, self.weight(*filters), bias, name=name, **attributes)

    def dense(self, value: str, size: tuple[int, int], name: str = "") -> str:
        bias = self.constant(self._rng.normal(0, 0.1, size[1]).astype(self.dtype), "bias")
        return self.add("Gemm", value, self.weight(*size), bias, name=name)

    def build(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        self.graph.infer_types()
        return self.graph


def small_classifier(
    dtype: Any = np.float32, batch: int | str = "batch", seed: int = 0, keeps_batch: bool = False
) -> Graph:
    """A small VGG: two convolution blocks, a flattening head of three dense layers, softmax over 5 classes.

    With ``keeps_batch`` an op that changes nothing prevents a fixed batch from being made dynamic.
    """
    net = NetworkBuilder((batch, 3, 12, 12), dtype, seed=seed)
    first = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]), name="block1")
    pooled = net.add("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2], name="pool1")
    second = net.add("Relu", net.conv(pooled, (8, 6, 3, 3), pads=[1, 1, 1, 1]), name="block2")
    pooled = net.add("MaxPool", second, kernel_shape=[2, 2], strides=[2, 2], name="pool2")
    flat = net.add("Flatten", pooled)
    hidden = net.add("Relu", net.dense(flat, (72, 16)))
    hidden = net.add("Relu", net.dense(hidden, (16, 12)))
    if keeps_batch:
        hidden = net.add("Einsum", hidden, equation="nc->nc")
    return net.build(net.add("Softmax", net.dense(hidden, (12, 5), name="scores"), axis=-1))


def overflowing_classifier() -> Graph:
    """Scores of images (N,3,4,4) of ones are finite, and the maps of its value "layer" are not.

    Scores of 9e37, 30000 times what exceeds a threshold, are; 30000 / 16 times three maps of 1e36 is beyond float32.
    """
    net = NetworkBuilder(("batch", 3, 4, 4))
    layer = net.add("Relu", net.add("Mul", net.input, net.constant(np.float32(1e36))), name="layer")
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    excess = net.add("Relu", net.add("Sub", mean, net.constant(np.float32(0.999e36))))
    return net.build(net.add("Gemm", excess, net.constant(np.full((3, 2), 30000, np.float32))))


def export_two_layers(folder: Path) -> Path:
    """Export the small classifier with full gradients of its last two blocks, and return the file."""
    path = folder / "dogs.onnx"
    model = small_classifier().to_model()
    fastcam.export(model, path, preprocess="imagenet", gradients="full", layer=["block2", "block1"])
    return path
