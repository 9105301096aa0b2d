"""Straight-through gradients of a QDQ network against those of torch's fake quantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, relative_error, small_classifier
from onnx import numpy_helper
from quantized_networks import quantized

import fastcam

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")

_LAYER = "block2_DequantizeLinear_Output"


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


class _Head:
    """What follows the layer, node by node, in torch."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = list(model.graph.node)
        self._constants = _constants(model)
        self._ops: dict[str, Callable[..., Any]] = {
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": lambda x, scale, zero: x,
            "MaxPool": lambda x: torch.nn.functional.max_pool2d(x, 2),
            "Flatten": lambda x: x.flatten(1),
            "Gemm": lambda x, weight, bias: x @ weight + bias,
        }

    def __call__(self, layer: Any) -> Any:
        values: dict[str, Any] = {_LAYER: layer}
        for node in self._nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self._constants:
                numbers, scale, zero = (self._constants[name].astype(np.float32) for name in node.input)
                axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
                if scale.ndim:
                    shape = [-1 if index == axis else 1 for index in range(numbers.ndim)]
                    scale, zero = scale.reshape(shape), zero.reshape(shape)
                values[node.output[0]] = torch.tensor((numbers - zero) * scale)
            elif node.input[0] in values and node.op_type != "Softmax":
                arguments = (values.get(name, name) for name in node.input)
                values[node.output[0]] = self._ops[node.op_type](*arguments)
                logits = values[node.output[0]]
        return logits

    def _quantize(self, x: Any, scale: str, zero: str) -> Any:
        limits = np.iinfo(self._constants[zero].dtype)
        step, start = float(self._constants[scale]), int(self._constants[zero])
        return torch.fake_quantize_per_tensor_affine(x, step, start, limits.min, limits.max)


def test_gradients_are_those_of_fake_quantisation(tmp_path: Path, rng: np.random.Generator) -> None:
    source = quantized(small_classifier().to_model(), tmp_path, "QDQ")
    fastcam.export(source, tmp_path / "explained.onnx", gradients="full")
    images = rng.normal(size=(4, 3, 12, 12)).astype(np.float32)
    session = fastcam.Explainer(tmp_path / "explained.onnx")._session
    names = ["logits", "activations", "gradients", "targets"]
    logits, activations, gradients, targets = session.run(names, {"image": images})

    layer = torch.tensor(activations, requires_grad=True)
    scores = _Head(source)(layer)
    assert relative_error(scores.detach(), logits) < 1e-5
    scores[torch.arange(4), torch.tensor(targets[:, 0])].sum().backward()
    assert relative_error(gradients[:, 0], layer.grad) < 1e-5
