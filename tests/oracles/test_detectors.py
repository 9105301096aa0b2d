"""Boxes and their maps against torch: its autograd, and a greedy suppression written here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch_detectors
from networks import Array, relative_error
from torch_detectors import CLASSES, DETECTORS, SIDE, SUPPRESSES, detector, independent_maps, pictures

import fastcam
from fastcam import kernels
from fastcam.errors import ArgumentError, ModelError, UnsupportedOpError
from fastcam.exporting.importers import ImportOptions, import_model
from fastcam.exporting.passes.simplify import simplify
from fastcam.exporting.score_kinds.detectors import find_detector

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastcam[torch]")

nn = torch.nn

_NAMES = list("abcde")
_EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)
_COUNT = 6
# float32 sums in a different order, through networks of ten layers and a division by p (1 - p).
_BOUND = 2e-4


@pytest.fixture(scope="module", params=DETECTORS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    name = request.param
    model = detector(name)
    path = tmp_path_factory.mktemp(name) / "detector.onnx"
    fastcam.export(model, path, example_input=_EXAMPLE, score="boxes", classes=_NAMES, preprocess="scale")
    return name, model, path


def _parts(model: Any, images: Array) -> tuple[Array, Array, list[Any], Any]:
    with independent_maps():
        parts = copy.deepcopy(model).double().parts(torch.from_numpy(images).double())
    return parts.logits.detach().numpy(), parts.boxes.detach().numpy(), parts.maps, parts.logits


def _overlap(one: Array, other: Array) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    inside = float(np.prod(np.maximum(sides, 0)))
    areas = [float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other)]
    return inside / (sum(areas) - inside) if inside else 0.0


def _greedy(likely: Array, boxes: Array, *, suppresses: bool) -> list[tuple[int, int]]:
    """The best boxes of one image as (anchor, class), each anchor with its best class."""
    kept: list[tuple[int, int]] = []
    for anchor in np.argsort(-likely.max(axis=1), kind="stable"):
        best = int(likely[anchor].argmax())
        rivals = (boxes[other] for other, label in kept if label == best)
        if not suppresses or all(_overlap(boxes[anchor], rival) <= 0.5 for rival in rivals):
            kept.append((int(anchor), best))
        if len(kept) == _COUNT:
            break
    return kept


def _likely(name: str, model: Any, images: Array) -> Array:
    """Probabilities (N,A,C), from the module's own outputs where it gives them."""
    with torch.no_grad():
        outputs = model(torch.from_numpy(images))
    if name in ("detr", "detr_corners"):
        return np.asarray(outputs["logits"].softmax(-1)[..., :CLASSES].numpy())
    if name == "ssd":
        return np.asarray(outputs[0][..., 1:].numpy())
    logits, _, _, _ = _parts(model, images)
    return np.asarray(1 / (1 + np.exp(-logits)))


def test_boxes_are_those_of_a_greedy_suppression(case: tuple[str, Any, Path]) -> None:
    name, model, path = case
    images = pictures()
    likely, (_, boxes, _, _) = _likely(name, model, images), _parts(model, images)
    found = fastcam.Explainer(path, device="cpu")(images, f"top{_COUNT}", threshold=0)
    for image, explanation in enumerate(found):
        expected = _greedy(likely[image], boxes[image], suppresses=name in SUPPRESSES)
        assert explanation.boxes is not None
        assert explanation.box_scores is not None
        assert explanation.labels == [_NAMES[label] for _, label in expected]
        np.testing.assert_allclose(explanation.boxes, [boxes[image][anchor] for anchor, _ in expected], atol=2e-3)
        scores = [likely[image][anchor, label] for anchor, label in expected]
        np.testing.assert_allclose(explanation.box_scores, scores, atol=1e-5)


# Heads of convolutions that give class logits, row by row.
_IN_WINDOWS = {"yolov8", "yolov10"}


def test_heads_of_convolutions_are_differentiated_in_windows(case: tuple[str, Any, Path]) -> None:
    """Both ways give the same maps; the whole map takes several times as long."""
    name, _, path = case
    names = [node.name for node in onnx.load(path).graph.node]
    assert any(one.startswith("window/") for one in names) == (name in _IN_WINDOWS)


@pytest.mark.parametrize("method", ["hirescam", "layercam"])
def test_maps_are_those_of_autograd(case: tuple[str, Any, Path], method: str) -> None:
    name, model, path = case
    images = pictures()
    explainer = fastcam.Explainer(path, device="cpu")
    found = explainer(images, "top3", threshold=0, method=method, size="layer", normalize=None)
    likely, (_, boxes, maps, logits) = _likely(name, model, images), _parts(model, images)
    assert len(explainer.layers) == len(maps)
    for image in range(len(images)):
        chosen = _greedy(likely[image], boxes[image], suppresses=name in SUPPRESSES)[:3]
        for k, (anchor, label) in enumerate(chosen):
            # A box of one level does not depend on the heads of the others.
            gradients = torch.autograd.grad(
                logits[image, anchor, label], maps, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for layer, values, gradient in zip(explainer.layers, maps, gradients, strict=True):
                weights = gradient[image].clamp(min=0) if method == "layercam" else gradient[image]
                expected = (weights * values[image]).sum(0).clamp(min=0).detach().numpy()
                single = explainer(
                    images, "top3", threshold=0, method=method, layer=layer, size="layer", normalize=None
                )
                assert relative_error(single.maps[image, k], expected) < _BOUND
    assert np.abs(found.maps).max() > 0


def test_a_target_of_an_earlier_call_is_the_same_box(case: tuple[str, Any, Path]) -> None:
    _, _, path = case
    explainer = fastcam.Explainer(path, device="cpu")
    images = pictures()
    first = explainer(images, "top4", threshold=0)
    again = explainer(images, first.targets[:, 2:], threshold=0.9)
    assert first.boxes is not None
    assert again.boxes is not None
    np.testing.assert_array_equal(again.targets, first.targets[:, 2:])
    np.testing.assert_array_equal(again.boxes.corners, first.boxes.corners[:, 2:])
    np.testing.assert_allclose(again.heatmaps, first.heatmaps[:, 2:], atol=1e-6)


def test_an_image_does_not_depend_on_its_neighbours(case: tuple[str, Any, Path]) -> None:
    _, _, path = case
    explainer = fastcam.Explainer(path, device="cpu")
    images = pictures(3)
    together, alone = explainer(images, "top3", threshold=0), explainer(images[2:], "top3", threshold=0)
    np.testing.assert_array_equal(together.targets[2:], alone.targets)
    np.testing.assert_allclose(together.heatmaps[2:], alone.heatmaps, atol=1e-5)


def test_earlier_targets_may_be_incomplete(case: tuple[str, Any, Path]) -> None:
    """A missing box, -1, stays missing."""
    _, _, path = case
    explainer = fastcam.Explainer(path, device="cpu")
    images = pictures()
    first = explainer(images, threshold=0)
    assert first.boxes is not None
    middle = float(np.median(first.boxes.scores[first.targets >= 0]))
    some = explainer(images, threshold=middle)
    again = explainer(images, some.targets)
    np.testing.assert_array_equal(again.targets, some.targets)
    assert (some.targets == -1).any()
    np.testing.assert_allclose(again.heatmaps, some.heatmaps, atol=1e-6)


def test_signed_maps_of_all_layers_are_those_of_the_boxs_own(case: tuple[str, Any, Path]) -> None:
    name, _, path = case
    explainer = fastcam.Explainer(path, device="cpu")
    images = pictures()
    both = explainer(images, "top3", threshold=0, size="layer", normalize="signed")
    singles = [
        explainer(images, "top3", threshold=0, layer=layer, size="layer", normalize="signed").maps
        for layer in explainer.layers
    ]
    resized = np.stack([kernels.resize(single, both.maps.shape[2:]) for single in singles])
    contributes = np.stack([single.any(axis=(2, 3)) for single in singles])
    assert contributes.any(axis=0).sum() > 2, name
    # The only layer with evidence, or the mean of all if a box has evidence in several.
    alone = (contributes.sum(axis=0) <= 1).all()
    np.testing.assert_allclose(both.maps, resized.sum(axis=0) if alone else resized.mean(axis=0), rtol=1e-5, atol=1e-7)


class _Undecoded(torch_detectors.Ssd):
    def forward(self, images: Any) -> Any:
        maps, logits, _ = self._raw(images)
        n = images.shape[0]
        offsets = [head(f).permute(0, 2, 3, 1).reshape(n, -1, 4) for head, f in zip(self.boxes, maps, strict=True)]
        return logits.softmax(-1), torch.cat(offsets, 1)


class _Raw(torch_detectors.YoloX):
    def forward(self, images: Any) -> Any:
        stems, raw = self._raw(images)
        outputs = torch.cat([torch.cat(level, 1).flatten(2) for level in raw], 2).permute(0, 2, 1)
        return self._decode(outputs, stems)


def test_undecoded_boxes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="offsets from anchors"):
        fastcam.export(_Undecoded().eval(), tmp_path / "x.onnx", example_input=_EXAMPLE, score="boxes")


def test_the_selection_of_queries_is_not_taken_for_the_final_one(tmp_path: Path) -> None:
    """RT-DETR's encoder sorts, too: its scores would be those of 336 places, not of 12 queries."""
    torch.manual_seed(0)
    model = torch_detectors.TwoStageDetr().eval()
    with pytest.raises(UnsupportedOpError, match="GatherElements"):
        fastcam.export(model, tmp_path / "x.onnx", example_input=_EXAMPLE, score="boxes")
    graph = import_model(model, ImportOptions(example_input=_EXAMPLE, all_outputs=True)).graph
    simplify(graph)
    found = find_detector(graph, None)
    assert (found.scores.value, found.boxes.value) == tuple(graph.outputs)
    assert graph.shape(found.scores.value)[1] == model.queries


def test_raw_scores_with_an_objectness_need_their_sigmoid(tmp_path: Path) -> None:
    torch.manual_seed(1)
    raw = _Raw().eval()
    with pytest.raises(ArgumentError, match=r'leave 0\.\.1: give score_activation="sigmoid"'):
        fastcam.export(raw, tmp_path / "x.onnx", example_input=_EXAMPLE, score="boxes")
    options: dict[str, Any] = {"example_input": _EXAMPLE, "score": "boxes", "classes": _NAMES}
    fastcam.export(raw, tmp_path / "raw.onnx", score_activation="sigmoid", **options)
    active = torch_detectors.YoloX().eval()
    active.load_state_dict(raw.state_dict())
    fastcam.export(active, tmp_path / "active.onnx", **options)
    found, expected = (
        fastcam.Explainer(tmp_path / f"{name}.onnx", device="cpu")(pictures(), "top5", threshold=0)
        for name in ("raw", "active")
    )
    np.testing.assert_array_equal(found.targets, expected.targets)
    np.testing.assert_allclose(found.heatmaps, expected.heatmaps, atol=1e-4)


@pytest.mark.parametrize(("name", "count"), [("yolov8", 4), ("yolov8", 2), ("yolov5", 3), ("yolov5", 7)])
def test_a_wrong_number_of_names_is_refused(tmp_path: Path, name: str, count: int) -> None:
    """Names never decide how the columns are read."""
    names = [str(number) for number in range(count)]
    with pytest.raises(ArgumentError, match=rf"{count} class names for a detector of"):
        fastcam.export(detector(name), tmp_path / "x.onnx", example_input=_EXAMPLE, score="boxes", classes=names)


class _FourColumns(torch_detectors.Detr):
    """Three classes and "no object": scores and boxes have four columns each."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 4)


class _Unnamed(_FourColumns):
    def forward(self, images: Any) -> Any:
        return tuple(super().forward(images).values())


@pytest.mark.parametrize("kind", [_FourColumns, _Unnamed])
def test_four_scores_are_not_taken_for_boxes(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(4)
    model = kind().eval()
    path = tmp_path / "four.onnx"
    result = fastcam.export(model, path, example_input=_EXAMPLE, score="boxes", score_activation="softmax")
    assert result.class_count == 3
    assert any("taken for the background" in note for note in result.notes)
    found = fastcam.Explainer(path, device="cpu")(pictures(), "top1", threshold=0)
    _, logits, boxes = model._raw(torch.from_numpy(pictures()))
    best = logits.softmax(-1)[..., :3].amax(-1).argmax(1)
    expected = torch_detectors.corners(boxes)[range(2), best].detach().numpy() * SIDE
    assert found.boxes is not None
    np.testing.assert_allclose(found.boxes.corners[:, 0], expected, atol=1e-3)
