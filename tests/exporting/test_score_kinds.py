"""Scores that are no classes: values, regions of a segmentation, and boxes of a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from detector_graphs import CELLS, SIDE, STRIDE, bright_cells, one_map_detector
from networks import Array, NetworkBuilder, relative_error, small_classifier
from segmentation_graphs import segmenter

import fastcam
from fastcam.errors import ArgumentError, ModelError, TargetError


def _regression() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]), name="features")
    pooled = net.add("Flatten", net.add("GlobalAveragePool", features))
    return net.build(net.add("Sigmoid", net.dense(pooled, (6, 3)), name="values")).to_model()


def _run(model: onnx.ModelProto, images: Array, output: str) -> Array:
    """Run a model in the reference implementation."""
    from onnx.reference import ReferenceEvaluator

    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    proto.graph.output.append(onnx.ValueInfoProto(name=output))
    found: Any = ReferenceEvaluator(proto).run([output], {"image": images})
    return np.asarray(found[0])


def test_values_are_explained_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    """No activation is removed: the sigmoid belongs to the value."""
    model, path = _regression(), tmp_path / "ages.onnx"
    result = fastcam.export(model, path, score="values", classes=["age", "height", "weight"])
    assert result.class_count == 3
    images = rng.random((2, 3, 12, 12), dtype=np.float32)
    explainer = fastcam.Explainer(path, device="cpu")
    asked: list[int | str] = ["age", 2]
    found = explainer(images, asked, normalize=None)
    assert (explainer.score, found.probabilities) == ("values", None)
    np.testing.assert_allclose(found.logits, _run(model, images, "values"), atol=1e-6)
    features = _run(model, images, "features")
    by_name: dict[Any, Array] = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    (dense,) = (node for node in model.graph.node if node.op_type == "Gemm")
    slope = found.logits * (1 - found.logits)
    for k, value in enumerate((0, 2)):
        alpha = by_name[dense.input[1]][:, value] * slope[:, value, None] / 144
        expected = np.maximum(np.einsum("nc,nchw->nhw", alpha, features), 0)
        assert relative_error(found.maps[:, k], expected) < 1e-5
    assert [row[0] for row in found.labels] == ["age", "age"]


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_a_region_is_scored_by_its_mean_logit(tmp_path: Path, rng: np.random.Generator, last: bool) -> None:
    model, path = segmenter(last=last), tmp_path / "cells.onnx"
    result = fastcam.export(model, path, score="segmentation", classes=["sky", "road", "car"])
    # The last decoder layer would only repeat the mask.
    assert result.layers == ("bottom",)
    images = rng.random((2, 3, 12, 12), dtype=np.float32)
    found = fastcam.Explainer(path, device="cpu")(images, [0, 1, 2])
    logits = _run(model, images, "pixels")
    region = logits.argmax(axis=1)
    for image in range(2):
        for label in range(3):
            inside = logits[image, label][region[image] == label]
            expected = inside.mean() if inside.size else 0
            np.testing.assert_allclose(found.logits[image, label], expected, rtol=1e-4, atol=1e-5)
    ranked = fastcam.Explainer(path, device="cpu")(images, "top3")
    sizes = [[(region[image] == label).sum() for label in row] for image, row in enumerate(ranked.targets)]
    assert all(row == sorted(row, reverse=True) for row in sizes)


def _in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that computes in float64; Resize keeps its scales."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    scales = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in result.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in scales:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*result.graph.input, *result.graph.output, *result.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return result


def test_the_gradient_of_a_region_is_that_of_finite_differences(tmp_path: Path, rng: np.random.Generator) -> None:
    """The region stays where it is."""
    from onnx.reference import ReferenceEvaluator

    model, path = segmenter(), tmp_path / "cells.onnx"
    fastcam.export(model, path, score="segmentation", gradients="full")
    images = rng.random((1, 3, 12, 12), dtype=np.float32)
    typed = _in_float64(onnx.shape_inference.infer_shapes(model))
    bottom, first, logits = (_run(typed, images.astype(np.float64), name) for name in ("bottom", "first", "pixels"))
    label = int(np.bincount(logits.argmax(axis=1).ravel(), minlength=3).argmax())
    region = logits[0].argmax(axis=0) == label
    head = ReferenceEvaluator(onnx.utils.Extractor(typed).extract_model(["bottom", "first"], ["pixels"]))

    def score(values: Array) -> float:
        found: Any = head.run(None, {"bottom": values, "first": first})
        return float(found[0][0, label][region].mean())

    session: Any = fastcam.Explainer(path, device="cpu")._session
    feeds = {"image": images, "target": np.array([[label]], np.int64)}
    gradients = session.run(["gradients"], feeds)[0][0, 0]
    step = 1e-6
    for channel, row, column in ((0, 1, 1), (3, 0, 2), (7, 2, 0)):
        shift = np.zeros_like(bottom)
        shift[0, channel, row, column] = step
        slope = (score(bottom + shift) - score(bottom - shift)) / (2 * step)
        assert slope == pytest.approx(gradients[channel, row, column], rel=1e-4, abs=1e-6)


def test_independent_labels_of_a_segmentation_may_overlap(tmp_path: Path, rng: np.random.Generator) -> None:
    model, path = segmenter(activation="Sigmoid", classes=2), tmp_path / "cells.onnx"
    fastcam.export(model, path, score="segmentation")
    images = rng.random((1, 3, 12, 12), dtype=np.float32)
    found = fastcam.Explainer(path, device="cpu")(images, [0, 1])
    logits = _run(model, images, "pixels")[0]
    expected = [np.where(one > 0, one, 0).sum() / max((one > 0).sum(), 1) for one in logits]
    np.testing.assert_allclose(found.logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "cells.onnx"
    fastcam.export(one_map_detector(), path, score="boxes", classes=["red", "green"], preprocess="scale")
    return path


def test_boxes_are_found_and_explained(detector: Path) -> None:
    explainer = fastcam.Explainer(detector, device="cpu")
    assert (explainer.has_boxes, explainer.class_count, explainer.layers) == (True, 2, ("features",))
    assert explainer.default_method == "hirescam"
    found = explainer(bright_cells((0, 1, 0), (3, 2, 1)))[0]
    assert sorted(found.labels) == ["green", "red"]
    assert found.boxes is not None
    assert found.box_scores is not None
    for k, label in enumerate(found.labels):
        row, column = (0, 1) if label == "red" else (3, 2)
        corners = np.array([column, row, column + 1, row + 1]) * STRIDE
        np.testing.assert_allclose(found.boxes[k], corners, atol=0.01)
        # Only the box's own cell speaks for it.
        assert np.argmax(found.maps[k]) == row * CELLS + column
        assert (found.maps[k] > 0).sum() == 1
        assert found.box_scores[k] == pytest.approx(1 / (1 + np.exp(-4)), abs=1e-5)
    assert found.describe(0).endswith("98.2%")


def test_no_box_is_an_empty_result(detector: Path) -> None:
    explainer = fastcam.Explainer(detector, device="cpu")
    both = explainer(np.concatenate([bright_cells(), bright_cells((1, 1, 0))]))
    assert [len(image.maps) for image in both] == [0, 1]
    assert both.targets[0].tolist() == [-1] * 10
    assert not both.heatmaps[0].any()
    with pytest.raises(ArgumentError, match="no box was found in this image"):
        both[0].overlay(image=np.zeros((8, 8, 3), np.uint8))
    assert both[0].labels == []
    assert both.to_dataframe()[["image", "label"]].values.tolist() == [[1, "red"]]
    assert explainer(bright_cells(), threshold=0)[0].maps.shape[0] == 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "red"}, TargetError, "is a detector: give None or 'top1'"),
        ({"target": 32}, TargetError, r"entries 0\.\.31"),
        ({"target": [[0], [1]]}, TargetError, "for each of the 1 images"),
        ({"threshold": 2}, ArgumentError, "lowest probability of a box"),
        ({"on_device": True}, ArgumentError, "cannot be on a GPU"),
        ({"method": "gradcamm"}, ArgumentError, "did you mean"),
    ],
)
def test_wrong_arguments_of_a_detector(
    detector: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastcam.Explainer(detector, device="cpu")(bright_cells(), **arguments)


def test_a_threshold_needs_boxes(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "dogs.onnx")
    with pytest.raises(ArgumentError, match=r"threshold=0\.5 applies to detectors"):
        fastcam.Explainer(tmp_path / "dogs.onnx")(np.zeros((1, 3, 12, 12), np.float32), threshold=0.5)


def test_suppression_at_the_end_is_cut_off(tmp_path: Path, detector: Path) -> None:
    path = tmp_path / "suppressed.onnx"
    result = fastcam.export(one_map_detector(suppressed=True, batch=1), path, score="boxes")
    assert any("batch was fixed at 1 and is open now" in note for note in result.notes)
    images = np.concatenate([bright_cells((0, 1, 0), (3, 2, 1)), bright_cells((2, 2, 1))])
    cut, plain = (fastcam.Explainer(file, device="cpu")(images) for file in (path, detector))
    assert cut.boxes is not None
    assert plain.boxes is not None
    np.testing.assert_array_equal(cut.targets, plain.targets)
    np.testing.assert_allclose(cut.boxes.corners, plain.boxes.corners, atol=1e-4)
    np.testing.assert_allclose(cut.heatmaps, plain.heatmaps, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 16), (16, 40), (9, 23), (16, 16), (300, 1)])
def test_a_letterbox_is_undone(detector: Path, shape: tuple[int, int]) -> None:
    """A red square at a known place of the picture: box and map are in the picture's own pixels."""
    explainer = fastcam.Explainer(detector, device="cpu")
    assert explainer.fit == "letterbox"
    height, width = shape
    frame = explainer.frame(np.zeros((*shape, 3), np.uint8))
    assert (frame.height, frame.width) != (0, 0)
    scale = min(SIDE / height, SIDE / width)
    assert abs(frame.height - height * scale) <= 0.5 or frame.height == 1
    picture = np.zeros((*shape, 3), np.uint8)
    picture[..., 0] = 255
    image = explainer(picture, threshold=0.5)[0]
    assert image.boxes is not None
    assert len(image.boxes)
    assert (image.boxes >= 0).all()
    assert (image.boxes <= np.array([width, height] * 2)).all()
    for k in range(len(image.boxes)):
        covered = image.picture_maps[k]
        row, column = np.unravel_index(np.argmax(covered), covered.shape)
        y, x = (row + 0.5) / covered.shape[0] * height, (column + 0.5) / covered.shape[1] * width
        left, top, right, bottom = image.boxes[k]
        # Half a cell beside the box at most, where the frame cuts a cell.
        slack = STRIDE / scale / 2
        assert left - slack <= x <= right + slack
        assert top - slack <= y <= bottom + slack


def test_an_overlay_outlines_its_box(detector: Path) -> None:
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:32, 32:64, 0] = 255
    image = fastcam.Explainer(detector, device="cpu")(picture, threshold=0.5)[0]
    drawn = image.overlay(0, alpha=0.0)
    assert image.boxes is not None
    left, top, right, bottom = image.boxes[0].round().astype(int)
    changed = np.argwhere((drawn != picture).any(axis=2))
    assert len(changed)
    assert changed[:, 0].min() >= top - 1
    assert changed[:, 0].max() <= bottom + 1
    assert changed[:, 1].min() >= left - 1
    assert changed[:, 1].max() <= right + 1
    assert image._repr_png_().startswith(b"\x89PNG")
    assert "red" in image._repr_html_()


def test_pictures_may_be_stretched(tmp_path: Path) -> None:
    path = tmp_path / "stretched.onnx"
    fastcam.export(one_map_detector(), path, score="boxes", fit="stretch", preprocess="scale")
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[8:16, 16:32, 0] = 255
    image = fastcam.Explainer(path, device="cpu")(picture)[0]
    assert image.boxes is not None
    np.testing.assert_allclose(image.boxes, [[16, 8, 32, 16]], atol=0.05)


def test_classifiers_may_be_letterboxed(tmp_path: Path) -> None:
    path = tmp_path / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, fit="letterbox", preprocess="scale")
    picture = np.random.default_rng(0).integers(0, 256, (12, 24, 3), dtype=np.uint8)
    explanation = fastcam.Explainer(path)(picture)
    assert explanation[0].picture_maps.shape == (1, 6, 12)
    np.testing.assert_array_equal(explanation[0].picture_maps[0], explanation.heatmaps[0, 0, 3:9])
    assert explanation[0].overlay().shape == (12, 24, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score": "boxs"}, ArgumentError, "score='boxs' is not known; choose one of 'classes'"),
        ({"score": "boxes"}, ModelError, r"no layout of a detector.*omit score=\"boxes\""),
        ({"score": "segmentation"}, ModelError, r"one score per pixel and class.*Omit score=\"segmentation\""),
        ({"score": "values", "score_activation": "sigmoid"}, ArgumentError, "have no probabilities: omit it"),
        ({"score": "values", "classes": ["a"]}, ArgumentError, "1 class names for a model of 5 classes"),
        ({"fit": "crop"}, ArgumentError, "fit='crop' is not known; choose one of 'stretch', 'letterbox'"),
        ({"fit": "letterbox", "draw": "heatmaps"}, ArgumentError, "over stretched pictures"),
        ({"score": "boxes", "precision": "fp16"}, ArgumentError, "computes in fp32"),
    ],
)
def test_kinds_that_do_not_fit(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastcam.export(small_classifier().to_model(), tmp_path / "dogs.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_files_of_classes_keep_their_format(tmp_path: Path, detector: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "dogs.onnx")
    versions = [
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}["fastcam.format_version"]
        for path in (tmp_path / "dogs.onnx", detector)
    ]
    assert versions == ["1", "3"]


def test_raw_scores_of_a_detector_need_their_activation(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 16, 16))
    features = net.add("Relu", net.conv(net.input, (4, 3, 4, 4), strides=[4, 4]), name="features")
    rows = [
        net.add(
            "Transpose", net.add("Reshape", net.conv(features, (n, 4, 1, 1)), net.constant([0, n, 16])), perm=[0, 2, 1]
        )
        for n in (3, 4)
    ]
    model = net.build(rows[0], net.add("Sigmoid", rows[1])).to_model()
    with pytest.raises(ArgumentError, match=r'raw scores of 3 classes: give score_activation="softmax"'):
        fastcam.export(model, tmp_path / "raw.onnx", score="boxes")
    two = fastcam.export(model, tmp_path / "two.onnx", score="boxes", score_activation="softmax")
    three = fastcam.export(model, tmp_path / "three.onnx", score="boxes", classes=list("abc"))
    assert (two.class_count, three.class_count) == (2, 3)


@pytest.mark.parametrize("count", [21, 22])
def test_classes_are_not_taken_for_a_side(tmp_path: Path, count: int) -> None:
    """A map of 20 x 20 with 21 classes: the proportions of the picture are exact for one axis only."""
    net = NetworkBuilder(("batch", 3, 80, 80))
    features = net.add("Relu", net.conv(net.input, (4, 3, 4, 4), strides=[4, 4]), name="features")
    model = net.build(net.add("Softmax", net.conv(features, (count, 4, 1, 1)), axis=1))
    plain = model.copy()
    plain.outputs = [plain.nodes[-1].input[0]]
    for graph in (model, plain):
        result = fastcam.export(graph.to_model(), tmp_path / "net.onnx", score="segmentation")
        assert result.class_count == count


def test_a_sigmoid_before_an_upsampling_is_noted_and_cut_at_a_half(tmp_path: Path, rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]), name="features")
    small = net.add("Sigmoid", net.conv(features, (2, 6, 2, 2), strides=[2, 2]))
    model = net.build(
        net.add("Resize", small, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear", name="large")
    ).to_model()
    result = fastcam.export(model, tmp_path / "net.onnx", score="segmentation")
    assert any("look like probabilities" in note for note in result.notes)
    images = rng.random((2, 3, 12, 12), dtype=np.float32)
    found = fastcam.Explainer(tmp_path / "net.onnx", device="cpu")(images, [0, 1])
    likely = _run(model, images, "large")
    for image, label in np.ndindex(2, 2):
        inside = likely[image, label][likely[image, label] > 0.5]
        np.testing.assert_allclose(found.logits[image, label], inside.mean() if inside.size else 0, atol=1e-5)


@pytest.mark.parametrize("order", ["xyxy", "yxyx"])
def test_the_order_of_corners_is_told_by_a_picture_that_is_not_square(tmp_path: Path, order: str) -> None:
    net = NetworkBuilder((1, 3, 16, 32))
    features = net.add("Relu", net.conv(net.input, (4, 3, 4, 4), strides=[4, 4]), name="features")
    scores = net.add("Sigmoid", net.add("Reshape", net.conv(features, (2, 4, 1, 1)), net.constant([1, 2, 32])))
    y, x = (4.0 * grid.ravel() for grid in np.mgrid[:4, :8])
    corners = [x, y, x + 4, y + 4] if order == "xyxy" else [y, x, y + 4, x + 4]
    flat = net.add("ReduceMean", features, net.constant([1, 2, 3]), keepdims=1)
    nothing = net.add("Mul", net.add("Reshape", flat, net.constant([1, 1, 1])), net.constant(np.float32(1e-6)))
    boxes = net.add("Add", net.constant(np.stack(corners, -1).astype(np.float32)[None]), nothing)
    limits = (np.array([5], np.int64), np.array([0.5], np.float32), np.array([0.1], np.float32))
    kept = net.add("NonMaxSuppression", boxes, scores, *(net.constant(limit) for limit in limits))
    path = tmp_path / "wide.onnx"
    result = fastcam.export(net.build(kept).to_model(), path, score="boxes")
    assert not any("is a guess" in note for note in result.notes)
    images = np.random.default_rng(0).random((1, 3, 16, 32), dtype=np.float32)
    found = fastcam.Explainer(path, device="cpu")(images, "top3", threshold=0)
    assert found.boxes is not None
    anchors = found.targets[0] % 32
    np.testing.assert_allclose(found.boxes.corners[0, :, :2], np.stack([x, y], -1)[anchors], atol=1e-3)


def test_the_order_of_centres_is_not_a_guess(tmp_path: Path) -> None:
    result = fastcam.export(one_map_detector(suppressed=True, batch=1), tmp_path / "centres.onnx", score="boxes")
    assert not any("is a guess" in note for note in result.notes)
