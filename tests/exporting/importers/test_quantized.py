"""Quantised networks: QDQ is explained through the real numbers that it represents, integer arithmetic is rejected."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier
from quantized_networks import quantized

import fastcam
from fastcam.errors import ModelError, UnsupportedOpError
from fastcam.exporting.gradients.autodiff import backpropagate
from fastcam.graph import TensorType


@pytest.fixture(autouse=True)
def _quiet_quantizer() -> None:
    logging.getLogger().setLevel(logging.ERROR)


def _scores(model: onnx.ModelProto, images: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores: Array = session.run(None, {"image": images})[0]
    return scores


@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_a_quantised_network_keeps_its_scores_and_its_size(
    activations: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    source = quantized(small_classifier().to_model(), tmp_path, "QDQ", activations)
    result = fastcam.export(source, tmp_path / "explained.onnx")
    assert result.layer == "block2_DequantizeLinear_Output"
    assert result.candidates == ("block2_DequantizeLinear_Output", "block1_DequantizeLinear_Output")
    images = rng.normal(size=(3, 3, 12, 12)).astype(np.float32)
    softmax = next(node for node in source.graph.node if node.op_type == "Softmax")
    logits = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(source)).extract_model(
        ["image"], [softmax.input[0]]
    )
    found = fastcam.Explainer(tmp_path / "explained.onnx")(images)
    assert relative_error(found.logits, _scores(logits, images)) < 1e-6
    # The source returns its probabilities in steps of 1/255.
    assert np.abs(found.probabilities - _scores(source, images)).max() < 1.5 / 255
    kernels = {
        w.name: w.data_type for w in onnx.load(tmp_path / "explained.onnx").graph.initializer if len(w.dims) == 4
    }
    assert set(kernels.values()) == {onnx.TensorProto.INT8}


def test_maps_are_near_those_of_the_float_network(tmp_path: Path, rng: np.random.Generator) -> None:
    """Eight bits leave steps of 1/255 of the range; the maps of this network differ by a tenth."""
    model = small_classifier().to_model()
    fastcam.export(quantized(model, tmp_path, "QDQ"), tmp_path / "quantized_explained.onnx")
    fastcam.export(model, tmp_path / "float_explained.onnx")
    images = rng.normal(size=(8, 3, 12, 12)).astype(np.float32)
    exact = fastcam.Explainer(tmp_path / "float_explained.onnx")(images)
    found = fastcam.Explainer(tmp_path / "quantized_explained.onnx")(images, exact.targets)
    assert relative_error(found.heatmaps, exact.heatmaps) < 0.2


def _pair(scale: Array, zero: Array, dequantized_scale: Array | None = None, **attributes: Any) -> NetworkBuilder:
    net = NetworkBuilder((1, 2, 3))
    steps = [net.constant(scale.astype(np.float32)), net.constant(zero)]
    number = net.add("QuantizeLinear", net.input, *steps, **attributes)
    if dequantized_scale is not None:
        steps[0] = net.constant(dequantized_scale.astype(np.float32))
    net.build(net.add("DequantizeLinear", number, *steps, name="y", **attributes))
    net.graph.inputs["upstream"] = TensorType(np.dtype(np.float32), (1, 1, 2, 3))
    return net


@pytest.mark.parametrize(
    ("scale", "zero", "values", "expected"),
    [
        # 0..25.5: values outside saturate.
        (np.array(0.1), np.array(0, np.uint8), [-1, 0, 12, 25, 26, 99], [0, 1, 1, 1, 0, 0]),
        # -12.8..12.7
        (np.array(0.1), np.array(0, np.int8), [-13, -12, 0, 12.6, 12.8, 1], [0, 1, 1, 1, 0, 1]),
        # Row 0: -1..1.55, row 1: -20..31.
        (np.array([0.01, 0.2]), np.array([100, 100], np.uint8), [-2, 0, 1.6, -19, 30, 32], [0, 1, 0, 1, 1, 0]),
    ],
    ids=["unsigned", "signed", "per channel"],
)
def test_a_number_that_saturates_has_no_gradient(
    scale: Array, zero: Array, values: list[float], expected: Array
) -> None:
    graph = _pair(scale, zero, axis=1).graph
    gradient = backpropagate(graph, {"y": "upstream"}, ["image"])[0]
    graph.outputs = [gradient]
    upstream = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 2, 3)
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.array(values, np.float32).reshape(1, 2, 3)
    (found,) = session.run(None, {"image": image, "upstream": upstream})
    np.testing.assert_array_equal(found, upstream * np.reshape(expected, upstream.shape))


def test_scales_that_differ_are_refused() -> None:
    graph = _pair(np.array(0.1), np.array(0, np.uint8), np.array(0.2)).graph
    with pytest.raises(UnsupportedOpError, match="its scale is not that of the QuantizeLinear before it"):
        backpropagate(graph, {"y": "upstream"}, ["image"])[0]


@pytest.mark.parametrize(("format_", "op"), [("QOperator", "QLinearConv"), ("dynamic", "DynamicQuantizeLinear")])
def test_integer_arithmetic_is_refused(format_: str, op: str, tmp_path: Path) -> None:
    source = quantized(small_classifier().to_model(), tmp_path, format_)
    with pytest.raises(ModelError, match=rf"(?s){op}.*no gradient.*QDQ format.*float model"):
        fastcam.export(source, tmp_path / "explained.onnx")
    assert not (tmp_path / "explained.onnx").exists()
