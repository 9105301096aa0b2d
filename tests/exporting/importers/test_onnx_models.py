"""ONNX files of any opset and form: scores as ONNX Runtime's for the source, gradients by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import opset_networks
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier
from onnx import TensorProto, external_data_helper, helper, numpy_helper

import fastcam
from fastcam.errors import ArgumentError, ModelError
from fastcam.exporting.importers import ImportOptions, import_model, opsets


def _run(model: onnx.ModelProto | Path, images: Array, *outputs: str) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(list(outputs) or None, {session.get_inputs()[0].name: images}))


def _explained(model: Any, path: Path, images: Array, **options: Any) -> fastcam.Explanation:
    fastcam.export(model, path / "explained.onnx", **options)
    return fastcam.Explainer(path / "explained.onnx")(images, size="layer", normalize=None)


@pytest.mark.parametrize("opset", opset_networks.OPSETS)
def test_every_opset_exports(opset: int, tmp_path: Path, rng: np.random.Generator) -> None:
    model = opset_networks.classifier(opset)
    images = rng.normal(size=(2, 3, 16, 12)).astype(np.float32)
    found = _explained(model, tmp_path, images, layer=opset_networks.LAYER)
    assert relative_error(found.probabilities, _run(model, images)[0]) < 1e-5
    exported = onnx.load(tmp_path / "explained.onnx")
    onnx.checker.check_model(exported, full_check=True)
    assert exported.opset_import[0].version in (18, 19, 20)

    expected = _map_by_differences(model, images[:1], int(found.targets[0, 0]))
    # Differences in float32: 6e-8 of rounding over a step of 1e-2 and slopes of 0.1, and the head's curvature.
    assert relative_error(found.maps[0, 0], expected) < 1e-3


def _map_by_differences(model: onnx.ModelProto, image: Array, target: int) -> Array:
    """Grad-CAM of the source's own head: shifting a whole channel gives the sum of its gradient."""
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model, data_prop=True))
    (activations,) = _run(extractor.extract_model(["image"], [opset_networks.LAYER]), image)
    head = extractor.extract_model([opset_networks.LAYER], ["raw"])
    step = 1e-2
    steps = step * np.eye(activations.shape[1], dtype=np.float32)[:, :, None, None]
    above, below = (_run(head, activations + sign * steps)[0][:, target] for sign in (1, -1))
    weights = (above - below) / (2 * step)
    heatmap: Array = np.maximum(np.einsum("c,nchw->hw", weights, activations), 0) / activations[0, 0].size
    return heatmap


@pytest.mark.parametrize("softmax", ["Softmax", "LogSoftmax"])
def test_an_old_softmax_over_all_that_follows_the_batch_is_taken_off(softmax: str, tmp_path: Path) -> None:
    fastcam.export(opset_networks.classifier(11, softmax), tmp_path / "old.onnx")
    assert "Softmax" not in {node.op_type for node in onnx.load(tmp_path / "old.onnx").graph.node}


def test_an_opset_of_the_future_is_refused() -> None:
    model = opset_networks.classifier(22)
    model.opset_import[0].version = 26
    with pytest.raises(ModelError, match=r"opset 26 .*newer than this version of fastcam.*between 18 and 20"):
        import_model(model)


def test_the_conversion_leaves_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that copied them would triple the memory, and fail above 2 GB."""
    seen: list[int] = []

    def watched(work: str, data: bytes) -> bytes:
        model = onnx.ModelProto.FromString(data)
        seen.append(max((int(np.prod(tensor.dims)) for tensor in model.graph.initializer), default=0))
        return opsets.converted_bytes(data)

    monkeypatch.setattr(opsets, "QUARANTINE", watched)
    model = opset_networks.classifier(13)
    assert max(np.prod(tensor.dims) for tensor in model.graph.initializer) > 64
    import_model(model)
    import_model(_constant_nodes(model, Path()))
    assert len(seen) == 2
    assert max(seen) <= 64


def _two_heads() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 3, 8, 8))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
    pooled = net.add("Flatten", net.add("GlobalAveragePool", features))
    breed = net.add("Softmax", net.dense(pooled, (4, 5)), name="breed", axis=1)
    colour = net.add("Softmax", net.dense(pooled, (4, 3)), name="colour", axis=1)
    return net.build(breed, colour).to_model()


@pytest.mark.parametrize(("output", "classes"), [("breed", 5), ("colour", 3)])
def test_one_of_several_outputs_is_explained(
    output: str, classes: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = _two_heads()
    images = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    found = _explained(model, tmp_path, images, output=output)
    assert found.logits.shape == (2, classes)
    assert relative_error(found.probabilities, _run(model, images, output)[0]) < 1e-5
    # The other output's nodes are gone.
    assert len([node for node in onnx.load(tmp_path / "explained.onnx").graph.node if node.op_type == "Gemm"]) == 1


def test_several_outputs_without_a_choice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"2 outputs, 'breed', 'colour'.*output='breed'"):
        fastcam.export(_two_heads(), tmp_path / "out.onnx")
    with pytest.raises(ModelError, match=r"no output 'bread': did you mean 'breed'\? Outputs: 'breed', 'colour'"):
        fastcam.export(_two_heads(), tmp_path / "out.onnx", output="bread")
    assert not list(tmp_path.iterdir())


def _fully_convolutional(shape: tuple[int | str, ...]) -> onnx.ModelProto:
    """Takes any size, and queries it, as exporters write it for images of dynamic size."""
    net = NetworkBuilder(shape)
    first = net.input if shape[1] == 3 else net.add("Transpose", net.input, perm=[0, 3, 1, 2])
    small = net.add("Relu", net.conv(first, (4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]), name="features")
    sizes = net.add("Slice", net.add("Shape", first), net.constant([2]), net.constant([4]))
    whole = net.add("Concat", net.add("Shape", small, start=0, end=2), sizes, axis=0)
    large = net.add("Resize", small, "", "", whole, mode="linear")
    rows = net.add("Flatten", net.add("GlobalAveragePool", large))
    return net.build(net.dense(rows, (4, 5), name="scores")).to_model()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (("batch", 3, "height", "width"), (24, 16)),
        (("batch", "height", "width", 3), (24, 16)),
        (("batch", 3, 24, "width"), (24, 16)),
    ],
)
def test_an_open_size_is_fixed(
    shape: tuple[int | str, ...], size: tuple[int, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    model = _fully_convolutional(shape)
    image_shape = (2, 3, *size) if shape[1] == 3 else (2, *size, 3)
    images = rng.normal(size=image_shape).astype(np.float32)
    found = _explained(model, tmp_path, images, input_size=size, layer="features")
    assert relative_error(found.logits, _run(model, images)[0]) < 1e-5
    assert found.maps.shape[2:] == (12, 8)
    assert "Shape" not in {node.op_type for node in _forward(tmp_path / "explained.onnx")}
    assert fastcam.Explainer(tmp_path / "explained.onnx").input_size == size


def _forward(path: Path) -> list[onnx.NodeProto]:
    """The nodes up to the logits."""
    nodes = list(onnx.load(path).graph.node)
    producers = {output: node for node in nodes for output in node.output}
    found, pending = [], ["logits"]
    while pending:
        node = producers.pop(pending.pop(), None)
        if node is not None:
            found.append(node)
            pending.extend(node.input)
    return found


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        (("batch", 3, "height", "width"), None, r"open shape.*input_size=\(224, 224\)"),
        (("batch", 3, 24, "width"), (20, 16), r"fixed shape \('batch', 3, 24, 'width'\), not input_size=\(20, 16\)"),
        (("batch", 3, 24, 16), (20, 16), r"fixed shape \('batch', 3, 24, 16\), not"),
        (("batch", "channels", "height", "width"), None, r"open shape.*input_size=\(224, 224\)"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(
    shape: tuple[int | str, ...], size: tuple[int, int] | None, message: str
) -> None:
    source = _fully_convolutional(("batch", 3, "height", "width"))
    for dim, length in zip(source.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.Clear()
        if isinstance(length, int):
            dim.dim_value = length
        else:
            dim.dim_param = length
    with pytest.raises(ModelError, match=message):
        import_model(source, ImportOptions(input_size=size))


@pytest.mark.parametrize("size", [224, (), (1, 2, 3, 4), (0, 224), (224.0, 224), "224", (True, 3)])
def test_a_size_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"input_size=.*\(height, width\)"):
        fastcam.export(small_classifier().to_model(), tmp_path / "out.onnx", input_size=size)


def _listed_among_inputs(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in model.graph.initializer]
    model.graph.input.extend(infos)
    return model


def _constant_nodes(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], [w.name], value=w) for w in model.graph.initializer]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    return model


def _computed_weights(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Weights by ConstantOfShape and arithmetic on it."""
    for index, weight in enumerate(list(model.graph.initializer)):
        array = numpy_helper.to_array(weight)
        filled = numpy_helper.from_array(array.reshape(-1)[:1])
        sizes, zero = f"sizes{index}", f"zero{index}"
        model.graph.node.insert(0, helper.make_node("Add", [zero, f"kept{index}"], [weight.name]))
        model.graph.node.insert(0, helper.make_node("Mul", [f"full{index}", f"none{index}"], [zero]))
        model.graph.node.insert(0, helper.make_node("ConstantOfShape", [sizes], [f"full{index}"], value=filled))
        model.graph.initializer.append(numpy_helper.from_array(np.array(array.shape), sizes))
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), f"none{index}"))
        weight.name = f"kept{index}"
    return model


def _external(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    (folder / "weights").mkdir()
    external_data_helper.convert_model_to_external_data(model, location="weights/data.bin", size_threshold=0)
    return model


_FORMS: dict[str, Callable[[onnx.ModelProto, Path], onnx.ModelProto]] = {
    "inputs": _listed_among_inputs,
    "constant nodes": _constant_nodes,
    "computed": _computed_weights,
    "external data": _external,
}


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("form", _FORMS)
def test_weights_are_found_in_every_form(form: str, opset: int, tmp_path: Path, rng: np.random.Generator) -> None:
    images = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    plain = small_classifier().to_model()
    plain.opset_import[0].version = opset
    expected = _explained(plain, tmp_path, images)
    (tmp_path / "source").mkdir()
    onnx.save(_FORMS[form](plain, tmp_path / "source"), tmp_path / "source" / "model.onnx")
    found = _explained(tmp_path / "source" / "model.onnx", tmp_path, images)
    assert relative_error(found.logits, expected.logits) < 1e-6
    assert relative_error(found.maps, expected.maps) < 1e-6
    assert {file.name for file in tmp_path.iterdir()} == {"source", "explained.onnx"}


def test_functions_are_inlined(tmp_path: Path, rng: np.random.Generator) -> None:
    """A function that calls another one with a different opset."""
    new, old = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)], [helper.make_opsetid("", 11)]
    squeeze = helper.make_function(
        "local", "Rows", ["a"], ["b"], [helper.make_node("Squeeze", ["a"], ["b"], axes=[2, 3])], old
    )
    pool = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Rows", ["pooled"], ["y"], domain="local"),
    ]
    nested = helper.make_function("local", "PooledRows", ["x"], ["y"], pool, new)
    net = NetworkBuilder(("batch", 3, 8, 8))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
    kernel = net.weight(4, 5)
    net.graph.append(helper.make_node("PooledRows", [features], ["rows"], domain="local"))
    net.graph.append(helper.make_node("MatMul", ["rows", kernel], ["scores"]))
    net.graph.outputs = ["scores"]
    model = net.graph.to_model()
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.extend([squeeze, nested])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5]))
    images = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    found = _explained(model, tmp_path, images)
    # ONNX Runtime rejects functions with another opset; this is what ours compute.
    activations = _run(fastcam.split(model)[0], images)[0]
    assert relative_error(found.logits, activations.mean(axis=(2, 3)) @ net.graph.constants[kernel]) < 1e-5


def test_half_precision_is_exported_in_float32(tmp_path: Path, rng: np.random.Generator) -> None:
    full = small_classifier()
    half = small_classifier(np.float16)
    for name, array in half.constants.items():
        if array.dtype == np.float16:
            full.constants[name] = array.astype(np.float32)
    images = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    result = fastcam.export(half.to_model(), tmp_path / "half.onnx")
    assert any("float32" in note for note in result.notes)
    found = fastcam.Explainer(tmp_path / "half.onnx")(images)
    assert relative_error(found.probabilities, _run(full.to_model(), images)[0]) < 1e-5
