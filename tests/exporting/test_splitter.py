"""Where the logits are, which layers can be explained, and the two halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier

import fastcam
from fastcam.errors import LayerError, ModelError
from fastcam.exporting.layers import choose_layer, find_value, list_candidates
from fastcam.exporting.scores import remove_score_activation
from fastcam.notes import Note


def _scores(net: NetworkBuilder) -> str:
    pooled = net.add("GlobalAveragePool", net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="features"))
    return net.dense(net.add("Flatten", pooled), (4, 5), name="scores")


@pytest.mark.parametrize(
    ("op", "attributes", "expected"),
    [
        ("Softmax", {"axis": -1}, "softmax"),
        ("Softmax", {"axis": 1}, "softmax"),
        ("Softmax", {}, "softmax"),
        ("LogSoftmax", {}, "softmax"),
        ("Sigmoid", {}, "sigmoid"),
    ],
)
def test_the_final_activation_comes_off(op: str, attributes: dict[str, Any], expected: str) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    graph = net.build(net.add("Identity", net.add(op, _scores(net), **attributes)))
    assert remove_score_activation(graph) == expected
    assert graph.outputs == ["scores"]
    assert not [node for node in graph.nodes if node.op_type in (op, "Identity")]


def test_logits_stay() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    graph = net.build(_scores(net))
    assert remove_score_activation(graph) == "none"
    assert graph.outputs == ["scores"]


def test_a_softmax_over_images_is_no_score_activation() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    graph = net.build(net.add("Softmax", _scores(net), axis=0, name="odd"))
    assert remove_score_activation(graph) == "none"
    assert graph.outputs == ["odd"]


def test_a_segmentation_network_is_refused() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    graph = net.build(net.conv(net.input, (4, 3, 1, 1), name="mask"))
    with pytest.raises(ModelError, match=r"'mask' have shape \('batch', 4, 6, 6\): a classifier gives"):
        remove_score_activation(graph)


def test_candidates_are_block_outputs_from_the_last_to_the_first() -> None:
    graph = small_classifier()
    assert list_candidates(graph) == ["block2", "block1"]
    assert choose_layer(graph, None) == "block2"


def test_swish_counts_as_one_activation() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.conv(net.input, (4, 3, 3, 3))
    swish = net.add("Mul", value, net.add("Sigmoid", value), name="swish")
    flat = net.add("Flatten", net.add("GlobalAveragePool", swish))
    graph = net.build(net.dense(flat, (4, 5)))
    assert list_candidates(graph)[0] == "swish"
    assert not [name for name in list_candidates(graph) if "sigmoid" in name]


def test_side_branches_are_no_candidates() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="side")
    graph = net.build(_scores(net))
    assert list_candidates(graph) == ["features"]


@pytest.mark.parametrize("name", ["block1", "block1_node", "first_convolution"])
def test_a_layer_is_found_by_layer_value_or_node_name(name: str) -> None:
    assert find_value(small_classifier(), name, {"first_convolution": "block1"}) == "block1"


def test_a_wrong_name_brings_the_nearest() -> None:
    with pytest.raises(LayerError, match=r"no layer 'blok2': did you mean 'block2'.*Candidates: block2, block1"):
        find_value(small_classifier(), "blok2", {})


def test_a_layer_without_a_map_is_refused() -> None:
    graph = small_classifier()
    with pytest.raises(LayerError, match=r"'scores' has shape \('batch', 5\): not a map.*candidates: block2"):
        choose_layer(graph, "scores")


def test_a_layer_that_the_scores_do_not_need_is_refused() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    side = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="side")
    graph = net.build(_scores(net), side)
    graph.outputs = ["scores"]
    with pytest.raises(LayerError, match="do not depend on layer 'side'"):
        choose_layer(graph, "side")


def test_a_network_without_maps_is_refused() -> None:
    net = NetworkBuilder(("batch", 3, 4, 4))
    graph = net.build(net.dense(net.add("Flatten", net.input), (48, 5)))
    with pytest.raises(LayerError, match="nothing to explain"):
        choose_layer(graph, None)


def _run(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    return list(onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs))


@pytest.mark.parametrize("layer", [None, "block1"])
def test_the_halves_make_the_whole(layer: str | None, rng: np.random.Generator) -> None:
    whole = small_classifier().to_model()
    image = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    (probabilities,) = _run(whole, {"image": image})
    features, head = fastcam.split(whole, layer)
    for half in (features, head):
        onnx.checker.check_model(half, full_check=True)
    (activations,) = _run(features, {"image": image})
    assert features.graph.output[0].name == (layer or "block2")
    (logits,) = _run(head, {layer or "block2": activations})
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert relative_error(exponentials / exponentials.sum(axis=1, keepdims=True), probabilities) < 1e-6


def test_a_cut_inside_a_residual_block_hands_the_skip_connection_over(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    stem = net.add("Relu", net.conv(net.input, (4, 3, 3, 3), pads=[1, 1, 1, 1]), name="stem")
    inner = net.add("Relu", net.conv(stem, (4, 4, 3, 3), pads=[1, 1, 1, 1]), name="inner")
    joined = net.add("Add", stem, net.conv(inner, (4, 4, 1, 1)))
    flat = net.add("Flatten", net.add("GlobalAveragePool", joined))
    whole = net.build(net.dense(flat, (4, 5), name="scores")).to_model()
    features, head = fastcam.split(whole, "inner")
    assert [output.name for output in features.graph.output] == ["inner", "stem"]
    image = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    (expected,) = _run(whole, {"image": image})
    inner_value, stem_value = _run(features, {"image": image})
    (found,) = _run(head, {"inner": inner_value, "stem": stem_value})
    assert relative_error(found, expected) < 1e-6


def test_a_softmax_over_a_single_pixel_comes_off() -> None:
    """The fully convolutional ending: (N,C,1,1), softmax, then flattened."""
    net = NetworkBuilder(("batch", 3, 6, 6))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)))
    pooled = net.add("GlobalAveragePool", net.conv(features, (5, 4, 1, 1)), name="scores")
    graph = net.build(net.add("Flatten", net.add("Softmax", pooled, axis=1), name="rows"))
    assert remove_score_activation(graph) == "softmax"
    assert graph.outputs == ["rows"]
    assert "Softmax" not in {node.op_type for node in graph.nodes}
    assert graph.shape("rows") == ("batch", 5)


def test_scores_of_a_single_pixel_become_rows() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)))
    graph = net.build(net.add("Softmax", net.add("GlobalAveragePool", net.conv(features, (5, 4, 1, 1))), axis=1))
    assert remove_score_activation(graph) == "softmax"
    assert graph.shape(graph.outputs[0]) == ("batch", 5)
    assert [node.op_type for node in graph.nodes][-1] == "Flatten"


def test_a_softmax_over_groups_of_classes_stays() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    pooled = net.add("Flatten", net.add("GlobalAveragePool", net.conv(net.input, (4, 3, 3, 3))))
    pairs = net.add("Reshape", net.dense(pooled, (4, 10)), net.constant(np.array([-1, 5])))
    graph = net.build(
        net.add("Reshape", net.add("Softmax", pairs, axis=-1), net.constant(np.array([-1, 10])), name="y")
    )
    assert remove_score_activation(graph) == "none"
    assert graph.outputs == ["y"]


def test_scores_turned_into_integers_are_no_probabilities() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    graph = net.build(net.add("Cast", net.add("Sigmoid", _scores(net)), to=7, name="decisions"))
    assert remove_score_activation(graph) == "none"


def test_channels_last_values_are_turned(rng: np.random.Generator) -> None:
    """A layer whose channels are last, because what follows needs them there."""
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.add("Relu", net.conv(net.input, (4, 3, 1, 1)))
    last = net.add("Relu", net.add("Transpose", value, perm=[0, 2, 3, 1]), name="layer")
    rows = net.add("Reshape", last, net.constant(np.array([0, 144])))
    whole = net.build(net.dense(rows, (144, 5), name="scores"))
    whole.outputs = ["scores", "layer"]
    whole.infer_types()
    image = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    scores, activations = _run(whole.to_model(), {"image": image})
    whole.outputs = ["scores"]
    for layer in (None, "layer"):
        features, head = fastcam.split(whole.to_model(), layer)
        (found,) = _run(features, {"image": image})
        np.testing.assert_allclose(found, activations.transpose(0, 3, 1, 2), rtol=1e-6)
        (again,) = _run(head, {features.graph.output[0].name: found})
        assert relative_error(again, scores) < 1e-6


def test_a_layer_of_unknown_order_is_refused() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.add("Relu", net.conv(net.input, (4, 3, 1, 1)))
    turned = net.add("Reshape", value, net.constant(np.array([0, 6, 4, 6])), name="odd")
    graph = net.build(net.dense(net.add("Flatten", net.add("Relu", turned, name="odder")), (144, 5)))
    assert "odder" not in list_candidates(graph)
    with pytest.raises(LayerError, match=r"'odder' has shape .* not a map of known, fixed axes"):
        choose_layer(graph, "odder")


def test_a_node_that_the_clean_up_folds_is_still_found_by_name(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    parameters = [net.constant(rng.uniform(0.5, 1.5, 4).astype(np.float32)) for _ in range(4)]
    net.add("BatchNormalization", net.conv(net.input, (4, 3, 3, 3)), *parameters, name="normalised")
    flat = net.add("Flatten", net.add("GlobalAveragePool", net.add("Relu", "normalised")))
    whole = net.build(net.dense(flat, (4, 5))).to_model()
    features, _ = fastcam.split(whole, "normalised_node")
    assert features.graph.output[0].name == "normalised"


def test_a_block_is_explained_behind_its_thresholded_relu() -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    rectified = net.add("ThresholdedRelu", net.conv(net.input, (4, 3, 3, 3), name="conv"), alpha=0.1, name="rectified")
    graph = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", rectified)), (4, 5)))
    assert list_candidates(graph) == ["rectified"]


def _two_branches(second: str) -> NetworkBuilder:
    """Two convolutions over the picture, or one of them over another value, whose means together form the scores."""
    net = NetworkBuilder(("batch", 3, 6, 6))
    net.graph.constants["other"] = np.random.default_rng(1).random((1, 3, 6, 6)).astype(np.float32)
    shape = net.add("Shape", net.input)
    net.add("Expand", "other", shape, name="spread")
    net.add("Add", net.add("Mul", net.input, net.constant(np.float32(0))), "other", name="added")
    means = []
    for name, source in (("first", net.input), ("second", second)):
        features = net.add("Relu", net.conv(source, (4, 3, 3, 3)), name=name)
        means.append(net.add("Flatten", net.add("GlobalAveragePool", features)))
    net.build(net.dense(net.add("Concat", *means, axis=1), (8, 5)))
    return net


def _layer_notes(result: fastcam.ExportResult) -> list[Note]:
    return [note for note in result.notes if note.kind == "layer"]


@pytest.mark.parametrize("second", ["spread", "added"])
def test_a_layer_of_another_picture_is_not_explained(second: str, tmp_path: Path) -> None:
    model = _two_branches(second).graph.to_model()
    result = fastcam.export(model, tmp_path / "model.onnx")
    assert (result.layer, result.candidates, _layer_notes(result)) == ("first", ("first",), [])
    with pytest.raises(LayerError, match="'second' is the same for every picture"):
        fastcam.export(model, tmp_path / "second.onnx", layer="second")


def test_a_branch_that_is_not_explained_is_named(tmp_path: Path) -> None:
    model = _two_branches("image").graph.to_model()
    result = fastcam.export(model, tmp_path / "model.onnx")
    assert result.layer == "second"
    (note,) = _layer_notes(result)
    assert "also depend on the picture through 'first'" in note
    assert "layer=['second', 'first']" in note
    assert _layer_notes(fastcam.export(model, tmp_path / "both.onnx", layer=["second", "first"])) == []


def test_an_earlier_layer_on_the_way_leaves_no_branch_out(tmp_path: Path) -> None:
    result = fastcam.export(small_classifier().to_model(), tmp_path / "model.onnx", layer="block1")
    assert _layer_notes(result) == []
