"""The exported file: its contract, its bytes, its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import opset_networks
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier
from onnx.reference import ReferenceEvaluator
from op_support import CUDA_AND_TENSORRT_OPS
from small_networks import SOUND_NETWORKS

import fastcam
from fastcam.errors import ArgumentError, FastcamError, LayerError, ModelError, UnsupportedOpError, WriteError
from fastcam.graph import Graph, TensorType, from_model, needed_nodes


def _run(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.fixture
def image(rng: np.random.Generator) -> Array:
    return rng.normal(size=(4, 3, 12, 12)).astype(np.float32)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def test_the_file_keeps_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    result = fastcam.export(
        small_classifier().to_model(), path, classes=list("abcde"), preprocess="imagenet", gradients="full"
    )
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [item.name for item in model.graph.input] == ["image", "target"]
    shapes = {
        info.name: [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in [*model.graph.input, *model.graph.output]
    }
    assert shapes["image"] == ["batch", 3, 12, 12]
    assert shapes["target"] == ["batch", "targets"]
    assert shapes["logits"] == ["batch", 5]
    assert shapes["activations"] == ["batch", 8, 6, 6]
    assert {len(shapes["weights"]), len(shapes["targets"])} == {3, 2}
    assert shapes["gradients"][-3:] == [8, 6, 6]
    assert {item.domain for item in model.opset_import} == {""}
    assert 18 <= model.opset_import[0].version <= 20
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata["fastcam.format_version"] == "1"
    assert json.loads(metadata["fastcam.layers"]) == ["block2"]
    assert json.loads(metadata["fastcam.candidates"]) == ["block2", "block1"]
    assert json.loads(metadata["fastcam.classes"]) == list("abcde")
    assert metadata["fastcam.score_activation"] == "softmax"
    assert metadata["fastcam.framework"] == "onnx"
    assert json.loads(metadata["fastcam.preprocessing"])["name"] == "imagenet"

    assert result.path == path
    assert result.layer == "block2"
    assert result.layers == ("block2",)
    assert result.candidates == ("block2", "block1")
    assert result.classes == tuple("abcde")
    assert result.class_count == 5
    assert (result.input_name, result.input_layout) == ("image", "NCHW")
    assert result.input_shape == ("batch", 3, 12, 12)
    assert result.outputs == ("logits", "activations", "targets", "weights", "gradients")
    assert result.bytes == path.stat().st_size


def test_scores_and_activations_are_those_of_the_source(exported: Path, image: Array) -> None:
    source = small_classifier()
    source.outputs = [source.outputs[0], "block2"]
    session = onnxruntime.InferenceSession(source.to_model().SerializeToString())
    probabilities, activations = session.run(None, {"image": image})
    found = _run(exported, {"image": image})
    exponentials = np.exp(found["logits"])
    assert relative_error(exponentials / exponentials.sum(axis=1, keepdims=True), probabilities) < 1e-6
    assert relative_error(found["activations"], activations) < 1e-6


def test_weights_are_the_mean_gradient_by_finite_differences(tmp_path: Path, image: Array) -> None:
    """alpha_k = d logit / d (A_k shifted everywhere by the same amount) / Z, in float64 through only the head."""
    path = tmp_path / "small.onnx"
    fastcam.export(small_classifier().to_model(), path)
    target = np.array([[0, 4], [1, 2], [3, 3], [2, 0]], np.int64)
    found = _run(path, {"image": image, "target": target})
    evaluate = ReferenceEvaluator(_as_double(fastcam.split(small_classifier().to_model())[1]))
    step = 1e-6
    for channel in range(8):
        shift = np.zeros((1, 8, 1, 1))
        shift[0, channel] = step
        activations = found["activations"].astype(np.float64)
        (up,), (down,) = (evaluate.run(None, {"block2": activations + sign * shift}) for sign in (1, -1))
        slopes = (np.asarray(up) - np.asarray(down)) / (2 * step) / 36
        expected = np.take_along_axis(slopes, target, axis=1)
        # 1e-6 / 1e-16: rounding of the differences is 1e-10 of a logit; float32 weights carry 1e-7.
        np.testing.assert_allclose(found["weights"][:, :, channel], expected, rtol=1e-4, atol=1e-7)


def _as_double(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = from_model(model)
    graph.constants = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in graph.constants.items()
    }
    graph.inputs = {name: TensorType(np.dtype(np.float64), type_.shape) for name, type_ in graph.inputs.items()}
    graph.types = {}
    return graph.to_model()


def test_pooled_weights_are_the_mean_of_the_full_gradients(tmp_path: Path, image: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "full.onnx", gradients="full")
    found = _run(tmp_path / "full.onnx", {"image": image, "target": np.array([[0, 1, 2]] * 4)})
    assert found["gradients"].shape == (4, 3, 8, 6, 6)
    assert relative_error(found["weights"], found["gradients"].astype(np.float64).mean(axis=(3, 4))) < 1e-5


def test_many_targets_equal_one_at_a_time(exported: Path, image: Array) -> None:
    together = _run(exported, {"image": image, "target": np.array([[0, 1, 2, 3, 4]] * 4)})
    for target in range(5):
        alone = _run(exported, {"image": image, "target": np.full((4, 1), target)})
        assert relative_error(together["weights"][:, target], alone["weights"][:, 0]) < 1e-5
        np.testing.assert_array_equal(together["targets"][:, target], target)


@pytest.mark.parametrize("target", [None, [[-1]], [[-1], [-1], [-1], [-1]]])
def test_an_absent_target_is_the_top_class(exported: Path, image: Array, target: Any) -> None:
    inputs = {"image": image} if target is None else {"image": image, "target": np.array(target)}
    found = _run(exported, inputs)
    best = found["logits"].argmax(axis=1)
    np.testing.assert_array_equal(found["targets"], best[:, None])
    explicit = _run(exported, {"image": image, "target": best[:, None]})
    np.testing.assert_array_equal(found["weights"], explicit["weights"])


def test_negative_targets_are_ranks(exported: Path, image: Array) -> None:
    found = _run(exported, {"image": image, "target": np.array([[-1, -2, -5, 3]])})
    order = np.argsort(-found["logits"], axis=1)
    np.testing.assert_array_equal(found["targets"], np.column_stack([order[:, [0, 1, 4]], [3] * 4]))


def test_the_backbone_is_there_once(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx")
    ops = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert ops.count("Conv") == 2
    assert "ConvTranspose" not in ops


@pytest.mark.parametrize("gradients", ["pooled", "full"])
@pytest.mark.parametrize("source", ["small", *SOUND_NETWORKS, *opset_networks.OPSETS])
def test_the_gradient_part_runs_on_the_gpu(source: str | int, gradients: str, tmp_path: Path) -> None:
    if isinstance(source, int):
        model = opset_networks.classifier(source)
    else:
        model = SOUND_NETWORKS[source](1) if source in SOUND_NETWORKS else small_classifier().to_model()
    first = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    fastcam.export(model, tmp_path / "deep.onnx", layer=first, gradients=gradients)
    graph = from_model(onnx.load(tmp_path / "deep.onnx"))
    forward = {id(node) for node in needed_nodes(graph, ["logits", "activations"])}
    added = [node for node in graph.nodes if id(node) not in forward]
    assert len(added) > 15
    assert {node.op_type for node in added} <= CUDA_AND_TENSORRT_OPS


@pytest.mark.parametrize("gradients", ["pooled", "full"])
def test_exporting_twice_gives_the_same_bytes(tmp_path: Path, gradients: str) -> None:
    for name in ("first.onnx", "second.onnx"):
        fastcam.export(small_classifier().to_model(), tmp_path / name, gradients=gradients)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_an_onnx_path_gives_the_same_as_its_message(tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "source.onnx")
    fastcam.export(tmp_path / "source.onnx", tmp_path / "from_path.onnx")
    fastcam.export(small_classifier().to_model(), tmp_path / "from_message.onnx")
    assert (tmp_path / "from_path.onnx").read_bytes() == (tmp_path / "from_message.onnx").read_bytes()


def test_another_layer_can_be_explained(tmp_path: Path, image: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "first.onnx", layer="block1", gradients="full")
    found = _run(tmp_path / "first.onnx", {"image": image})
    assert found["activations"].shape == (4, 6, 12, 12)
    assert relative_error(found["weights"], found["gradients"].astype(np.float64).mean(axis=(3, 4))) < 1e-5


def test_names_of_the_format_give_way(tmp_path: Path, image: Array) -> None:
    graph = small_classifier()
    graph.rename("block1", "activations")
    graph.rename("pool1", "weights")
    graph.rename("scores", "target")
    fastcam.export(graph.to_model(), tmp_path / "clash.onnx")
    fastcam.export(small_classifier().to_model(), tmp_path / "plain.onnx")
    clash, plain = (_run(tmp_path / name, {"image": image}) for name in ("clash.onnx", "plain.onnx"))
    for name in ("logits", "activations", "weights"):
        np.testing.assert_array_equal(clash[name], plain[name])


@pytest.mark.parametrize("name", ["target", "logits", "weights"])
def test_an_input_with_a_name_of_the_format_is_refused(tmp_path: Path, name: str) -> None:
    graph = small_classifier()
    graph.rename("image", name)
    with pytest.raises(ModelError, match=f"input is called '{name}'"):
        fastcam.export(graph.to_model(), tmp_path / "small.onnx")


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_gradients_that_are_always_zero_are_noted(shift: float, tmp_path: Path) -> None:
    """A ReLU behind a large negative shift lets nothing through, which the structure does not show."""
    net = NetworkBuilder(("batch", 3, 8, 8))
    maps = net.add("Relu", net.add("Conv", net.input, net.weight(4, 3, 3, 3)), name="maps")
    means = net.add("ReduceMean", maps, net.constant([2, 3]), keepdims=0)
    passed = net.add("Relu", net.add("Add", means, net.constant(np.full(4, shift, np.float32))))
    graph = net.build(net.add("MatMul", passed, net.weight(4, 5)))
    result = fastcam.export(graph.to_model(), tmp_path / "m.onnx", layer="maps")
    found = [note for note in result.notes if "all zero" in note]
    assert [(note.kind, "layer 'maps'" in note) for note in found] == ([("layer", True)] if shift < 0 else [])


def test_class_names_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Böhmischer Hund\npug\nc\nd\ne\n", encoding="utf-8")
    result = fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx", classes=tmp_path / "names.txt")
    assert result.classes == ("Böhmischer Hund", "pug", "c", "d", "e")


def test_large_models_put_their_weights_beside(tmp_path: Path, image: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "inline.onnx")
    monkeypatch.setattr("fastcam.exporting.writer.INLINE_LIMIT", 4096)
    result = fastcam.export(small_classifier().to_model(), tmp_path / "large.onnx")
    (data,) = tmp_path.glob("large.onnx.*.data")
    assert result.bytes == (tmp_path / "large.onnx").stat().st_size + data.stat().st_size
    onnx.checker.check_model(tmp_path / "large.onnx", full_check=True)
    inline, large = (_run(tmp_path / name, {"image": image}) for name in ("inline.onnx", "large.onnx"))
    for name, array in inline.items():
        np.testing.assert_array_equal(large[name], array)
    initializers = onnx.load(tmp_path / "large.onnx", load_external_data=False).graph.initializer
    outside = [item for item in initializers if item.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    for item in outside:
        offset = next(int(entry.value) for entry in item.external_data if entry.key == "offset")
        assert offset % 4096 == 0


def test_a_source_with_external_data(tmp_path: Path, image: Array) -> None:
    onnx.save(
        small_classifier().to_model(),
        tmp_path / "source.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="w",
    )
    fastcam.export(tmp_path / "source.onnx", tmp_path / "small.onnx")
    fastcam.export(small_classifier().to_model(), tmp_path / "direct.onnx")
    assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "direct.onnx").read_bytes()


def test_a_fixed_batch_that_has_to_stay_stays_fixed(tmp_path: Path, image: Array) -> None:
    result = fastcam.export(small_classifier(batch=1, keeps_batch=True).to_model(), tmp_path / "one.onnx")
    assert result.input_shape == (1, 3, 12, 12)
    fastcam.export(small_classifier().to_model(), tmp_path / "open.onnx")
    one, many = (_run(tmp_path / name, {"image": image[:1]}) for name in ("one.onnx", "open.onnx"))
    assert relative_error(one["weights"], many["weights"]) < 1e-6


def _two_inputs() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 3, 4, 4))
    net.graph.inputs["mask"] = net.graph.inputs["image"]
    return net.build(net.add("Add", "image", "mask")).to_model()


def _no_rule() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 3, 9, 9))
    value = net.add("Sin", net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="last"), name="waves")
    return net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (4, 5))).to_model()


def _vectors() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 10))
    return net.build(net.dense(net.input, (10, 5))).to_model()


_BAD_MODELS: dict[str, tuple[Any, type[FastcamError], str]] = {
    "two inputs": (_two_inputs(), ModelError, "2 inputs"),
    "no picture": (_vectors(), ModelError, "fastcam explains pictures"),
    "an op without rule": (_no_rule(), UnsupportedOpError, "'Sin'"),
    "an empty message": (onnx.ModelProto(), ModelError, "opset 0"),
    "a number": (42, ModelError, "cannot export a builtins.int"),
    "a missing file": ("nowhere.onnx", ModelError, "nowhere.onnx: no such file"),
    "an unknown format": ("model.xyz", ModelError, "unknown model format '.xyz'; known: .onnx, .keras, .h5"),
}


@pytest.mark.parametrize("name", _BAD_MODELS)
def test_a_bad_model_leaves_no_file_and_keeps_the_old_one(tmp_path: Path, name: str) -> None:
    model, error, message = _BAD_MODELS[name]
    path = tmp_path / "kept.onnx"
    path.write_bytes(b"what was there before")
    with pytest.raises(error, match=message):
        fastcam.export(model, path)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", None])
def test_a_damaged_onnx_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    source = tmp_path / "damaged.onnx"
    source.write_bytes(small_classifier().to_model().SerializeToString()[:2000] if content is None else content)
    with pytest.raises(FastcamError, match=r"damaged\.onnx|model"):
        fastcam.export(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


_BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[FastcamError], str]] = {
    "gradients": ({"gradients": "some"}, ArgumentError, "'pooled', 'full'"),
    "class count": ({"classes": ["a", "b"]}, ArgumentError, "2 class names for a model of 5 classes"),
    "class type": ({"classes": ["a", "b", 3, "d", "e"]}, ArgumentError, r"got 3 \(int\)"),
    "class file": ({"classes": "no_such_file.txt"}, ArgumentError, "no_such_file.txt"),
    "preprocess": ({"preprocess": "vgg"}, ArgumentError, "vgg16"),
    "layer": ({"layer": "block9"}, LayerError, "block2"),
    "layer type": ({"layer": 3}, ArgumentError, "layer=3"),
    "gradients type": ({"gradients": ["pooled"]}, ArgumentError, "gradients=.*give a string"),
    "classes type": ({"classes": 5}, ArgumentError, "classes=5"),
    "class name": ({"classes": ["\ud800"] * 5}, ArgumentError, "classes must be names"),
    "class file name": ({"classes": "\0"}, ArgumentError, "classes="),
}


@pytest.mark.parametrize("name", _BAD_ARGUMENTS)
def test_a_bad_argument_is_named(tmp_path: Path, name: str) -> None:
    arguments, error, message = _BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_bad_destination_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"must end in \.onnx"):
        fastcam.export(small_classifier().to_model(), tmp_path / "small.pb")
    with pytest.raises(WriteError, match="does not exist"):
        fastcam.export(small_classifier().to_model(), tmp_path / "nowhere" / "small.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(WriteError, match="is a folder"):
        fastcam.export(small_classifier().to_model(), tmp_path / "folder.onnx")
    for name in ("null\0.onnx", "x" * 300 + ".onnx"):
        with pytest.raises((WriteError, ArgumentError), match=r"possible file name|give a path"):
            fastcam.export(small_classifier().to_model(), tmp_path / name)


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_other_opsets_are_converted(tmp_path: Path, opset: int, image: Array) -> None:
    # The ops of this network mean the same in all these versions.
    model = small_classifier().to_model()
    model.opset_import[0].version = opset
    fastcam.export(model, tmp_path / "converted.onnx")
    fastcam.export(small_classifier().to_model(), tmp_path / "plain.onnx")
    converted, plain = (_run(tmp_path / name, {"image": image}) for name in ("converted.onnx", "plain.onnx"))
    assert 18 <= onnx.load(tmp_path / "converted.onnx").opset_import[0].version <= 20
    np.testing.assert_array_equal(converted["weights"], plain["weights"])


def test_an_opset_from_the_future_is_refused(tmp_path: Path) -> None:
    model = small_classifier().to_model()
    model.opset_import[0].version = 999
    with pytest.raises(ModelError, match=r"opset 999 .*between 18 and 20"):
        fastcam.export(model, tmp_path / "small.onnx")


def _source_slopes(graph: Graph, value: str, image: Array, scores: str) -> Array:
    """Return d scores / d value by central differences of the *source* network in float64: (classes, *value shape).

    A delta is added to the value before anything reads it; no code of export is involved.
    """
    graph = from_model(graph.to_model())
    single = {name: array for name, array in graph.constants.items() if array.dtype == np.float32}
    graph.constants |= {name: array.astype(np.float64) for name, array in single.items()}
    graph.inputs = {name: TensorType(np.dtype(np.float64), type_.shape) for name, type_ in graph.inputs.items()}
    shape = tuple(size if isinstance(size, int) else 1 for size in graph.shape(value))
    graph.types = {}
    graph.outputs = [scores]
    graph.replace_uses(value, "moved")
    graph.inputs["delta"] = TensorType(np.dtype(np.float64), shape)
    producer = graph.producer(value)
    assert producer is not None
    graph.insert_after(producer, onnx.helper.make_node("Add", [value, "delta"], ["moved"]))
    evaluator = ReferenceEvaluator(graph.to_model())
    slopes = []
    for index in np.ndindex(*shape):
        delta = np.zeros(shape)
        delta[index] = 1e-6
        inputs = {"image": image.astype(np.float64)}
        (up,), (down,) = (evaluator.run(None, {**inputs, "delta": sign * delta}) for sign in (1, -1))
        slopes.append((np.asarray(up) - np.asarray(down))[0] / 2e-6)
    return np.stack(slopes, axis=-1).reshape(-1, *shape[1:])


def _computed_bias(net: NetworkBuilder, layer: str) -> str:
    """The last Gemm adds what another path has computed from the layer."""
    other = net.add("Flatten", net.add("Sigmoid", net.add("MaxPool", layer, kernel_shape=[6, 6])))
    bias = net.add("MatMul", other, net.weight(4, 5))
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    return net.add("Gemm", mean, net.weight(4, 5), bias, name="scores")


def _turned_rows(net: NetworkBuilder, layer: str) -> str:
    """(W x^T)^T: the batch moves to the back and returns."""
    rows = net.add("Transpose", net.add("Flatten", net.add("GlobalAveragePool", layer)), perm=[1, 0])
    return net.add("Transpose", net.add("MatMul", net.weight(5, 4), rows), perm=[1, 0], name="scores")


def _stacked_dense(net: NetworkBuilder, layer: str) -> str:
    """A dense layer whose weights have an additional axis."""
    rows = net.add(
        "MatMul",
        net.add("Flatten", layer),
        net.constant(np.random.default_rng(2).normal(size=(1, 144, 6)).astype("f4")),
    )
    hidden = net.add("Relu", net.add("ReduceMean", rows, net.constant(np.array([0])), keepdims=0))
    return net.dense(hidden, (6, 5), name="scores")


def _view(net: NetworkBuilder, layer: str) -> str:
    """How PyTorch's exporter writes x.view(-1, 144)."""
    return net.dense(net.add("Reshape", layer, net.constant(np.array([-1, 144])), allowzero=1), (144, 5), name="scores")


def _channels_last_head(net: NetworkBuilder, layer: str) -> str:
    rows = net.add(
        "Reshape", net.add("Tanh", net.add("Transpose", layer, perm=[0, 2, 3, 1])), net.constant(np.array([0, 144]))
    )
    return net.dense(rows, (144, 5), name="scores")


@pytest.mark.parametrize("name", ["layer", "logits"])
@pytest.mark.parametrize("head", [_computed_bias, _turned_rows, _stacked_dense, _view, _channels_last_head])
def test_gradients_are_those_of_the_source_network(
    head: Callable[[NetworkBuilder, str], str], name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    layer = net.add("Tanh", net.conv(net.input, (4, 3, 3, 3), pads=[1, 1, 1, 1]), name=name)
    graph = net.build(head(net, layer))
    image = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    expected = _source_slopes(graph, name, image, "scores")
    fastcam.export(graph.to_model(), tmp_path / "net.onnx", layer=name, gradients="full")
    found = _run(tmp_path / "net.onnx", {"image": image, "target": np.array([[0, 1, 2, 3, 4]])})
    assert relative_error(found["gradients"][0], expected) < 1e-5
    assert relative_error(found["weights"][0], expected.mean(axis=(2, 3))) < 1e-5
    twice = _run(tmp_path / "net.onnx", {"image": image.repeat(2, axis=0), "target": np.array([[0, 1, 2, 3, 4]])})
    assert relative_error(twice["weights"][1], found["weights"][0]) < 1e-5


def test_a_greyscale_model_refuses_a_colour_preprocessing_at_once(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 1, 6, 6))
    value = net.add("Relu", net.conv(net.input, (4, 1, 3, 3)))
    model = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (4, 5))).to_model()
    with pytest.raises(ArgumentError, match="greyscale"):
        fastcam.export(model, tmp_path / "grey.onnx", preprocess="imagenet")
    assert fastcam.export(model, tmp_path / "grey.onnx", preprocess="scale").input_shape == ("batch", 1, 6, 6)


def test_an_open_image_size_says_so(tmp_path: Path) -> None:
    model = small_classifier().to_model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    with pytest.raises(ModelError, match=r"for example input_size=\(224, 224\)"):
        fastcam.export(model, tmp_path / "open.onnx")


def test_a_batch_beyond_reason_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="claims 7247757312 elements"):
        fastcam.export(small_classifier(batch=2**24, keeps_batch=True).to_model(), tmp_path / "many.onnx")


def test_the_callers_message_is_not_changed(tmp_path: Path) -> None:
    for opset in (18, 17):
        model = small_classifier().to_model()
        model.opset_import[0].version = opset
        before = model.SerializeToString()
        fastcam.export(model, tmp_path / "small.onnx", gradients="full")
        assert model.SerializeToString() == before


def test_a_class_file_with_a_mark_and_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\nc\r\nd\r\ne\r\n\r\n")
    result = fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx", classes=tmp_path / "names.txt")
    assert result.classes == tuple("abcde")
