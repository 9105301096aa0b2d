"""Class names in all common formats."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from networks import NetworkBuilder, small_classifier

import fastcam
from fastcam.errors import ArgumentError
from fastcam.labels import class_names, config_names, stored_names

_NAMES = ["beagle", "pug", "böhmischer Hund"]

_FORMS: dict[str, Any] = {
    "list": _NAMES,
    "tuple": tuple(_NAMES),
    "array": np.array(_NAMES),
    "id2label": {2: _NAMES[2], 0: _NAMES[0], 1: _NAMES[1]},
    "id2label of JSON": {"2": _NAMES[2], "0": _NAMES[0], "1": _NAMES[1]},
    "class_indices": {"pug": 1, "beagle": 0, "böhmischer Hund": 2},
    "class_indices of NumPy": {name: np.int64(index).item() for index, name in enumerate(_NAMES)},
    "class index with WordNet ids": {str(index): [f"n0{index}", name] for index, name in enumerate(_NAMES)},
}


@pytest.mark.parametrize("form", _FORMS)
def test_every_form_gives_the_names_by_index(form: str) -> None:
    assert class_names(_FORMS[form]) == _NAMES


@pytest.mark.parametrize("form", [name for name in _FORMS if name not in ("tuple", "array", "id2label")])
def test_every_form_may_be_a_json_file(form: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(_FORMS[form]), encoding="utf-8")
    assert class_names(tmp_path / "names.json") == _NAMES


def test_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffbeagle\r\npug\r\nböhmischer Hund\r\n\r\n".encode())
    assert class_names(str(tmp_path / "names.txt")) == _NAMES
    config = {"architectures": ["ViT"], "id2label": _FORMS["id2label of JSON"], "label2id": _FORMS["class_indices"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert class_names(tmp_path / "config.json") == _NAMES


def test_names_that_are_digits() -> None:
    assert class_names({"1": 0, "0": 1}) == ["1", "0"]
    assert class_names({0: "1", 1: "0"}) == ["1", "0"]


def test_many_classes_are_ordered_by_number() -> None:
    names = [f"class {index}" for index in range(12)]
    assert class_names({str(index): names[index] for index in sorted(range(12), key=str)}) == names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({0: "a", 2: "b"}, "indices 0 to 1 on one side"),
        ({"a": 0, "b": 0}, "indices 0 to 1 on one side"),
        ({"a": 0, "b": True}, "indices 0 to 1 on one side"),
        ({0: "a", 1: 7}, r"got 7 \(int\)"),
        (["a", None], r"got None \(NoneType\)"),
        (["a", "b\n"], "classes must be names"),
        (5, "classes=5: give a list or mapping of names"),
        (b"ab", "give a list or mapping of names"),
        ("no_such_file.json", "not a readable UTF-8 text file"),
    ],
)
def test_other_things_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        class_names(source)


def test_damaged_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"names\.json' is not valid JSON"):
        class_names(tmp_path / "names.json")


def test_names_that_a_model_stores() -> None:
    assert stored_names({"names": "{0: 'beagle', 1: 'pug'}"}) == ("beagle", "pug")
    for damaged in ({}, {"names": "{0: "}, {"names": "7"}, {"names": "__import__('os')"}, {"names": "{1: 'a'}"}):
        assert stored_names(damaged) is None
    assert config_names(SimpleNamespace(id2label={0: "beagle", 1: "pug"})) == ("beagle", "pug")
    assert config_names(SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})) is None
    assert config_names(None) is None


def test_export_finds_the_names_in_the_metadata(tmp_path: Path) -> None:
    model = small_classifier().to_model(
        metadata={"names": "{0: 'a', 1: 'b', 2: 'c', 3: 'd', 4: 'e'}", "task": "classify"}
    )
    assert fastcam.export(model, tmp_path / "named.onnx").classes == tuple("abcde")
    given = fastcam.export(model, tmp_path / "given.onnx", classes={name: index for index, name in enumerate("vwxyz")})
    assert given.classes == tuple("vwxyz")
    other = small_classifier().to_model(metadata={"names": "{0: 'a', 1: 'b'}"})
    result = fastcam.export(other, tmp_path / "other.onnx")
    assert result.classes is None
    assert [note.kind for note in result.notes] == ["classes"]


def _decided(*ends: str) -> onnx.ModelProto:
    """A classifier whose outputs are decisions: as ArgMax and TopK, or Custom Vision's label and map."""
    net = NetworkBuilder(("batch", 3, 6, 6))
    layer = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)))
    scores = net.add("Softmax", net.dense(net.add("Flatten", net.add("GlobalAveragePool", layer)), (4, 3)), name="p")
    net.build(scores)
    model = net.graph.to_model()
    nodes, outputs = model.graph.node, model.graph.output
    del outputs[:]
    make = onnx.helper.make_node
    tensor = onnx.helper.make_tensor_value_info
    if "ArgMax" in ends:
        nodes.extend([make("ArgMax", ["p"], ["best"], axis=1, keepdims=0), make("Cast", ["best"], ["label"], to=6)])
        outputs.append(tensor("label", 6, ["batch"]))
    if "TopK" in ends:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "two"))
        nodes.append(make("TopK", ["p", "two"], ["values", "indices"], axis=1))
        outputs.extend([tensor("values", 1, ["batch", 2]), tensor("indices", 7, ["batch", 2])])
    if "p" in ends:
        outputs.append(tensor("p", 1, ["batch", 3]))
    if "map" in ends:
        model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
        labels = onnx.numpy_helper.from_array(np.array(["x", "y", "z"], object), "labels")
        model.graph.initializer.append(labels)
        nodes.extend(
            [
                make("ArgMax", ["p"], ["best"], axis=1, keepdims=0),
                make("ArrayFeatureExtractor", ["labels", "best"], ["classLabel"], domain="ai.onnx.ml"),
                make("ZipMap", ["p"], ["loss"], domain="ai.onnx.ml", classlabels_strings=list("xyz")),
            ]
        )
        outputs.append(tensor("classLabel", onnx.TensorProto.STRING, [1, "batch"]))
        map_type = onnx.helper.make_map_type_proto(onnx.TensorProto.STRING, onnx.helper.make_tensor_type_proto(1, []))
        outputs.append(onnx.helper.make_value_info("loss", onnx.helper.make_sequence_type_proto(map_type)))
    return model


@pytest.mark.parametrize("ends", [("ArgMax",), ("TopK",), ("ArgMax", "p"), ("map",)])
@pytest.mark.parametrize("opset", [18, 13])
def test_the_scores_behind_decisions_are_found(ends: tuple[str, ...], opset: int, tmp_path: Path) -> None:
    """Custom Vision exports ``classLabel`` and ``loss``, a sequence of maps."""
    model = _decided(*ends)
    model.opset_import[0].version = opset
    result = fastcam.export(model, tmp_path / "net.onnx")
    plain = fastcam.export(_decided("p"), tmp_path / "plain.onnx")
    image = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
    found, expected = (fastcam.Explainer(path)(image) for path in (result.path, plain.path))
    assert found.score_activation == "softmax"
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.heatmaps, expected.heatmaps)
    assert result.classes == (("x", "y", "z") if "map" in ends else None)
    (note,) = result.notes
    assert note.kind == "scores"
    assert "'p', are explained" in note


def test_any_inner_value_may_be_the_output(tmp_path: Path) -> None:
    model = _decided("ArgMax")
    inner = next(node.output[0] for node in model.graph.node if node.op_type == "Gemm")
    result = fastcam.export(model, tmp_path / "net.onnx", output=inner, score_activation="softmax")
    plain = fastcam.export(_decided("p"), tmp_path / "plain.onnx")
    image = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
    found, expected = (fastcam.Explainer(path)(image) for path in (result.path, plain.path))
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
