"""Models that are broken, hostile or unsupported: an error that names the problem and the way out, and no file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import NetworkBuilder, small_classifier
from onnx import TensorProto, external_data_helper, helper
from PIL import Image

import fastcam
from fastcam.errors import FastcamError, LayerError, ModelError, UnsupportedOpError
from fastcam.exporting.importers import quarantine


def _refused(model: Any, folder: Path, error: type[FastcamError], message: str, **options: Any) -> None:
    """An existing file with the destination's name stays unchanged, and nothing else appears."""
    destination = folder / "out" / "explained.onnx"
    destination.parent.mkdir(exist_ok=True)
    destination.write_bytes(b"older")
    with pytest.raises(error, match=message):
        fastcam.export(model, destination, **options)
    assert destination.read_bytes() == b"older"
    assert [file.name for file in destination.parent.iterdir()] == ["explained.onnx"]


def _picture(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="JPEG")


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "a folder": (lambda path: path.mkdir(), "no such file"),
    "a picture": (_picture, "not an ONNX model|no nodes"),
    "a pickle": (_pickled, "not an ONNX model|no nodes"),
    "text": (lambda path: path.write_text("import torch"), "not an ONNX model|no nodes"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 4096), "not an ONNX model|no nodes"),
}


@pytest.mark.parametrize("name", _FILES)
def test_a_file_that_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    write, message = _FILES[name]
    write(tmp_path / "model.onnx")
    _refused(tmp_path / "model.onnx", tmp_path, ModelError, message)


def test_a_truncated_model_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = small_classifier().to_model().SerializeToString()
    for share in np.linspace(0.01, 0.99, 40):
        (tmp_path / "model.onnx").write_bytes(whole[: int(len(whole) * share)])
        _refused(tmp_path / "model.onnx", tmp_path, ModelError, ".")


def _external(tmp_path: Path, **changes: str) -> Path:
    """A model with external weights; the entries of the first one are changed."""
    model = small_classifier().to_model()
    external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    weight = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    for entry in weight.external_data:
        entry.value = changes.pop(entry.key, entry.value)
    for key, value in changes.items():
        weight.external_data.add(key=key, value=value)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(
    "changes",
    [
        {"location": "../secret.bin"},
        {"location": "/etc/passwd"},
        {"location": "inner/../../secret.bin"},
        {"location": "link.bin"},
        {"location": "nowhere.bin"},
        {"location": ""},
        {"offset": "999999999"},
        {"offset": "-4"},
        {"length": "-1"},
        {"length": "4"},
        {"offset": "many"},
    ],
    ids=str,
)
def test_external_data_that_lies_elsewhere_or_is_too_short_is_refused(changes: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\x01" * 2**20)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    _refused(_external(folder, **changes), tmp_path, ModelError, "weights cannot be read|cannot be brought")


def _huge(op: str, **attributes: Any) -> Callable[[], onnx.ModelProto]:
    """A constant of 2**40 elements in one node, added to the map."""

    def build() -> onnx.ModelProto:
        net = NetworkBuilder(("batch", 3, 8, 8))
        features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
        one, sizes = net.constant(np.ones((1, 1), np.float32)), net.constant([2**20, 2**20])
        inputs = {
            "ConstantOfShape": [sizes],
            "Expand": [one, sizes],
            "Tile": [one, sizes],
            "Resize": [one, "", "", sizes],
            "Pad": [one, net.constant([0, 0, 2**20, 2**20])],
            "Range": [*map(net.constant, (np.array(0), np.array(2**40), np.array(1)))],
        }[op]
        made = net.add(op, *inputs, **attributes)
        least = net.add("ReduceMax", net.add("Cast", made, to=TensorProto.FLOAT), keepdims=0)
        rows = net.add("Flatten", net.add("GlobalAveragePool", net.add("Add", features, least)))
        return net.build(net.dense(rows, (4, 5))).to_model()

    return build


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile", "Resize", "Pad", "Range"])
def test_a_kilobyte_cannot_ask_for_terabytes(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "SECONDS", 3.0)
    _refused(
        _huge(op)(),
        tmp_path,
        ModelError,
        f"{op}.*(elements|evaluated|bytes|impossible)|claims .* elements|needs more memory|crashed on this model",
    )


def test_weights_that_claim_terabytes_are_refused(tmp_path: Path) -> None:
    model = small_classifier().to_model()
    model.graph.initializer[0].dims[:] = [2**20, 2**20]
    _refused(model, tmp_path, ModelError, "weights cannot be read")


def test_an_input_of_terabytes_is_refused(tmp_path: Path) -> None:
    model = small_classifier().to_model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 2**30
    _refused(model, tmp_path, ModelError, ".")


def _cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = model.graph.node[3].output[0]


def _made_twice(model: onnx.ModelProto) -> None:
    model.graph.node[2].output[0] = model.graph.node[1].output[0]


def _nameless(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = ""


def _future(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def _recursive(model: onnx.ModelProto) -> None:
    call = helper.make_node("Again", ["a"], ["b"], domain="local")
    model.functions.append(helper.make_function("local", "Again", ["a"], ["b"], [call], [helper.make_opsetid("", 18)]))
    model.functions[0].opset_import.append(helper.make_opsetid("local", 1))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node[1].CopyFrom(
        helper.make_node("Again", model.graph.node[1].input[:1], model.graph.node[1].output, domain="local")
    )


def _unknown_domain(model: onnx.ModelProto) -> None:
    model.graph.node[-2].domain, model.graph.node[-2].op_type = "somebody", "Secret"
    model.opset_import.append(helper.make_opsetid("somebody", 1))


_BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "cyclic": (_cyclic, "cycle|inference|topolog|before it is"),
    "a value made twice": (_made_twice, "."),
    "an output without a name": (_nameless, "nothing makes the outputs|no nodes"),
    "an opset of the future": (_future, "opset 99"),
    "a function that calls itself": (_recursive, "."),
    "an op of a foreign domain": (_unknown_domain, "somebody|shape"),
}


@pytest.mark.parametrize("name", _BROKEN)
def test_a_broken_graph_is_refused(name: str, tmp_path: Path) -> None:
    damage, message = _BROKEN[name]
    model = small_classifier().to_model()
    damage(model)
    _refused(model, tmp_path, ModelError, message)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    graph = small_classifier()
    name = next(name for name, array in graph.constants.items() if array.ndim == 4)
    graph.constants[name] = graph.constants[name].copy()
    graph.constants[name].flat[[3, 8]] = np.nan
    _refused(graph.to_model(), tmp_path, ModelError, rf"2 of 162 numbers in '{name}' are NaN")


def test_infinity_in_a_mask_is_legal(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 8, 8))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
    rows = net.add("Flatten", net.add("GlobalAveragePool", features))
    mask = net.constant(np.array([0, -np.inf, 0, np.inf - 1, -np.inf], np.float32).clip(-np.inf, 0))
    masked = net.add("Softmax", net.add("Add", net.dense(rows, (4, 5)), mask), axis=1)
    fastcam.export(net.build(net.dense(masked, (5, 4))).to_model(), tmp_path / "masked.onnx")
    found = fastcam.Explainer(tmp_path / "masked.onnx")(np.ones((1, 3, 8, 8), np.float32))
    assert np.isfinite(found.logits).all()


def test_a_model_without_a_map_says_so(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 8, 8))
    model = net.build(net.dense(net.add("Flatten", net.input), (192, 5))).to_model()
    _refused(model, tmp_path, LayerError, "nothing to explain")


def test_an_op_without_a_rule_is_named_with_the_ways_out(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 8, 8))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
    odd = net.add("Sin", features, name="wave")
    model = net.build(net.dense(net.add("Flatten", odd), (144, 5))).to_model()
    message = r"'Sin' \(node 'wave_node', between value '[a-z]+' and the logits\).*later layer.*fastcam\.defvjp"
    _refused(model, tmp_path, UnsupportedOpError, message)


def test_a_chain_of_thousands_of_nodes_is_done_in_reasonable_time(tmp_path: Path) -> None:
    """No pass over the graph may take quadratic time; pytest's timeout is the limit."""
    net = NetworkBuilder(("batch", 3, 8, 8))
    value = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features")
    for _ in range(20_000):
        net.graph.append(helper.make_node("Sigmoid", [value], [f"{value[:8]}{len(net.graph.nodes)}"]))
        value = net.graph.nodes[-1].output[0]
    model = net.build(net.dense(net.add("Flatten", value), (144, 5))).to_model()
    assert fastcam.export(model, tmp_path / "chain.onnx", layer="features").layer == "features"


def test_odd_names_survive(tmp_path: Path) -> None:
    graph = small_classifier()
    graph.rename("block2", 'блок 2 / "активация" 🐶\n')
    result = fastcam.export(graph.to_model(), tmp_path / "names.onnx", classes=["a", "ü", "犬", "d'e", "f g"])
    explainer = fastcam.Explainer(tmp_path / "names.onnx")
    assert explainer.layer == result.layer == 'блок 2 / "активация" 🐶\n'
    assert explainer(np.ones((1, 3, 12, 12), np.float32), "犬").labels == [["犬"]]
