"""Boxes and their maps against torch: its autograd, and a greedy suppression written here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import Array, relative_error
from torch_detectors import CLASSES, DETECTORS, SIDE, SUPPRESSES, detector, independent_maps, pictures

import fastcam

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastcam[torch]")

_NAMES = list("abcde")
_COUNT = 6
# float32 sums in a different order, through networks of ten layers and a division by p (1 - p).
_BOUND = 2e-4


@pytest.fixture(scope="module", params=DETECTORS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    name = request.param
    model = detector(name)
    path = tmp_path_factory.mktemp(name) / "detector.onnx"
    example = torch.zeros(1, 3, SIDE, SIDE)
    fastcam.export(model, path, example_input=example, score="boxes", classes=_NAMES, preprocess="scale")
    return name, model, path


def _parts(model: Any, images: Array) -> tuple[Array, Array, list[Any], Any]:
    with independent_maps():
        parts = copy.deepcopy(model).double().parts(torch.from_numpy(images).double())
    return parts.logits.detach().numpy(), parts.boxes.detach().numpy(), parts.maps, parts.logits


def _probabilities(name: str, logits: Array, raw: Any) -> Array:
    if name == "detr":
        return np.asarray(raw)
    return np.asarray(1 / (1 + np.exp(-logits)))


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
    if name == "detr":
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
