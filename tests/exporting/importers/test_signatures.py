"""Inputs and outputs of deployed files: other types, dynamic sizes, further inputs, labels, fused ops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error
from onnx import TensorProto, helper, numpy_helper

import fastcam
from fastcam.errors import ModelError


def _network(
    channels: int = 3, ops: Callable[[NetworkBuilder, str], str] = lambda net, value: value
) -> onnx.ModelProto:
    net = NetworkBuilder(("batch", channels, 8, 10))
    features = net.add("Relu", net.conv(net.input, (4, channels, 3, 3)), name="features")
    rows = net.add("Flatten", net.add("GlobalAveragePool", ops(net, features)))
    return net.build(net.dense(rows, (4, 5))).to_model()


def _run(model: onnx.ModelProto, feeds: dict[str, Any]) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    array: Array = session.run(None, feeds)[0]
    return array


def _maps(model: onnx.ModelProto, folder: Path, images: Array, **options: Any) -> Any:
    fastcam.export(model, folder / "explained.onnx", **options)
    return fastcam.Explainer(folder / "explained.onnx")(images, 1, size="layer", normalize=None)


@pytest.fixture
def images(rng: np.random.Generator) -> Array:
    return rng.normal(size=(3, 3, 8, 10)).astype(np.float32)


def test_all_four_sizes_open_are_fixed_by_the_weights(images: Array, tmp_path: Path) -> None:
    model = _network()
    expected = _maps(model, tmp_path, images)
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim, "nchw", strict=True):
        dim.dim_param = name
    del model.graph.value_info[:]
    found = _maps(model, tmp_path, images, input_size=(8, 10))
    assert np.array_equal(found.maps, expected.maps)


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_any_number_of_channels_is_explained(channels: int, rng: np.random.Generator, tmp_path: Path) -> None:
    model, images = _network(channels), rng.normal(size=(2, channels, 8, 10)).astype(np.float32)
    found = _maps(model, tmp_path, images)
    assert relative_error(found.logits, _run(model, {model.graph.input[0].name: images})) < 1e-5


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float64", "float16"])
def test_images_of_other_types_are_taken_as_float32(dtype: str, rng: np.random.Generator, tmp_path: Path) -> None:
    model = _network()
    name = model.graph.input[0].name
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model.graph.input[0].type.tensor_type.elem_type = kind
    model.graph.node[0].input[0] = "floats"
    model.graph.node.insert(0, helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT))
    pixels = rng.integers(0, 256, (2, 3, 8, 10))
    result = fastcam.export(model, tmp_path / "m.onnx", preprocess="none")
    assert {note.kind for note in result.notes} <= {"inputs", "widened", "preprocessing", "scores"}
    assert any(dtype in note or "16 bits" in note for note in result.notes)
    found = fastcam.Explainer(tmp_path / "m.onnx")(pixels.astype(np.float32))
    assert relative_error(found.logits, _run(model, {name: pixels.astype(dtype)})) < 1e-5


def _with_metadata() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 3, 8, 10))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
    rows = net.add("Flatten", net.add("GlobalAveragePool", features))
    model = net.build(net.dense(net.add("Concat", rows, "meta", axis=1), (6, 5))).to_model()
    model.graph.input.append(helper.make_tensor_value_info("meta", TensorProto.FLOAT, ["batch", 2]))
    model.graph.input.append(helper.make_tensor_value_info("unused", TensorProto.INT64, ["batch"]))
    return model


@pytest.mark.parametrize("meta", [[0.5, -2.0], [[0.5, -2.0]]])
def test_further_inputs_become_constants(meta: Any, images: Array, tmp_path: Path) -> None:
    model = _with_metadata()
    name = model.graph.input[0].name
    with pytest.raises(ModelError, match=r"2 inputs.*inputs="):
        fastcam.export(model, tmp_path / "m.onnx")
    found = _maps(model, tmp_path, images, inputs={"meta": np.array(meta)})
    rows = np.tile(np.array([[0.5, -2.0]], np.float32), (3, 1))
    expected = _run(model, {name: images, "meta": rows, "unused": np.zeros(3, np.int64)})
    assert relative_error(found.logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"age": np.zeros(2)}, "no such input"),
        ({"meta": np.zeros(3)}, r"shape \(3,\)"),
        ({"meta": "young"}, "not an array"),
    ],
)
def test_values_that_do_not_fit_an_input_are_refused(inputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        fastcam.export(_with_metadata(), tmp_path / "m.onnx", inputs=inputs)


def _gelu(net: NetworkBuilder, value: str, op: str, **attributes: Any) -> str:
    return net.add(op, value, domain="com.microsoft", **attributes)


@pytest.mark.parametrize("op", ["Gelu", "FastGelu", "QuickGelu"])
def test_fused_activations_are_written_back(op: str, images: Array, tmp_path: Path) -> None:
    model = _network()
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = op, "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = _maps(model, tmp_path, images)
    assert relative_error(found.logits, _run(model, {model.graph.input[0].name: images})) < 1e-5


@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED"])
def test_files_that_the_runtime_has_optimised_explain_the_same(level: str, images: Array, tmp_path: Path) -> None:
    """FusedConv with an added branch, and an activation that is fused too."""

    def residual(net: NetworkBuilder, value: str) -> str:
        second = net.conv(value, (4, 4, 3, 3), pads=[1, 1, 1, 1])
        return net.add("Relu", net.add("Add", second, value))

    model = _network(ops=residual)
    expected = _maps(model, tmp_path, images, layer="features")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = os.fspath(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert "FusedConv" in {node.op_type for node in optimised.graph.node}
    found = _maps(optimised, tmp_path, images, layer="features")
    assert relative_error(found.maps, expected.maps) < 1e-5


@pytest.mark.parametrize(
    ("domain", "way_out"), [("com.microsoft.nchwc", "ORT_ENABLE_BASIC"), ("somebody", "standard ONNX ops")]
)
def test_an_unknown_op_is_named_with_its_domain(domain: str, way_out: str, tmp_path: Path) -> None:
    model = _network()
    node = next(node for node in model.graph.node if node.op_type == "GlobalAveragePool")
    node.op_type, node.domain = "Secret", domain
    model.opset_import.append(helper.make_opsetid(domain, 1))
    with pytest.raises(ModelError, match=rf"'Secret' of domain '{domain}'.*{way_out}"):
        fastcam.export(model, tmp_path / "m.onnx")


def _labelled() -> onnx.ModelProto:
    """The ends of a pipeline: a label, and a map from names to scores per image."""
    model = _network()
    scores = model.graph.output[0].name
    labels = ["a", "b", "c", "d", "e"]
    model.graph.node.append(helper.make_node("ArgMax", [scores], ["label"], axis=1))
    model.graph.node.append(
        helper.make_node("ZipMap", [scores], ["loss"], domain="ai.onnx.ml", classlabels_strings=labels)
    )
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    del model.graph.output[:]
    mapped = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output.append(helper.make_value_info("loss", helper.make_sequence_type_proto(mapped)))
    model.graph.output.append(helper.make_tensor_value_info("label", TensorProto.INT64, None))
    return model


def test_the_scores_behind_labels_and_maps_are_found(images: Array, tmp_path: Path) -> None:
    expected = _maps(_network(), tmp_path, images)
    model = _labelled()
    result = fastcam.export(model, tmp_path / "m.onnx")
    assert result.classes == ("a", "b", "c", "d", "e")
    assert np.array_equal(_maps(model, tmp_path, images).maps, expected.maps)
    del model.graph.output[0]
    assert np.array_equal(_maps(model, tmp_path, images).maps, expected.maps)


def test_any_value_may_be_named_as_the_scores(tmp_path: Path) -> None:
    model = _network()
    gemm = model.graph.node[-1]
    model.graph.node.append(helper.make_node("Softmax", [gemm.output[0]], ["p"], axis=1))
    model.graph.node.append(helper.make_node("ReduceSum", ["p"], ["sum"], keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("sum", TensorProto.FLOAT, []))
    assert fastcam.export(model, tmp_path / "m.onnx", output="p").class_count == 5


@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin"])
@pytest.mark.parametrize("size", [4, 400])
def test_a_constant_node_reads_no_file_of_the_current_folder(
    location: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, folder = tmp_path / "current", tmp_path / "model"
    for path in (current, folder):
        path.mkdir()
    for path in (current, tmp_path):
        (path / "secret.bin").write_bytes(b"\x01" * 4 * size)
    monkeypatch.chdir(current)
    model = _network(4 if size == 4 else 3)
    tensor = numpy_helper.from_array(np.ones((1, size // 4 if size == 400 else 4, 1, 1), np.float32), "stolen")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["stolen"], value=tensor))
    model.graph.node[-1].input[2] = "stolen"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    for source in (model, folder / "model.onnx"):
        with pytest.raises(ModelError, match=r"are in a file|weights cannot be read"):
            fastcam.export(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_small_constant_beside_the_model_is_read(images: Array, tmp_path: Path) -> None:
    model = _network()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == model.graph.node[-1].input[2])
    expected = _maps(model, tmp_path, images)
    (tmp_path / "bias.bin").write_bytes(numpy_helper.to_array(bias).tobytes())
    tensor = TensorProto(dims=bias.dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="bias.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], [bias.name], value=tensor))
    model.graph.initializer.remove(bias)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    fastcam.export(tmp_path / "model.onnx", tmp_path / "explained.onnx")
    found = fastcam.Explainer(tmp_path / "explained.onnx")(images, 1, size="layer", normalize=None)
    assert np.array_equal(found.logits, expected.logits)
