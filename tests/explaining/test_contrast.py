"""Signed maps, contrasts and counterfactuals, against the gradient of the same scalar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_graphs import bright_cells, one_map_detector
from networks import Array, relative_error, small_classifier
from PIL import Image

import fastcam
from fastcam.errors import ArgumentError, TargetError
from fastcam.explaining.methods import FORMULAS
from fastcam.explaining.methods import METHODS as TABLE

CLASSES = ["beagle", "boxer", "chow", "pug", "saluki"]


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("dogs") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, classes=CLASSES, gradients="full", preprocess="scale")
    return fastcam.Explainer(path, device="cpu")


@pytest.fixture(scope="module")
def batch() -> Array:
    return np.random.default_rng(3).random((4, 3, 12, 12), dtype=np.float32)


def _outputs(explainer: fastcam.Explainer, batch: Array) -> tuple[Array, Array, Array]:
    """Activations (N,C,h,w), gradients of all classes (N,K,C,h,w), and logits."""
    session: Any = explainer._session
    targets = np.tile(np.arange(len(CLASSES)), (len(batch), 1))
    feeds = {explainer._model.input_name: batch, "target": targets}
    found = session.run(["activations", "gradients", "logits"], feeds)
    return found[0].astype(np.float64), found[1].astype(np.float64), found[2]


def _raw(method: str, activations: Array, gradients: Array) -> Array:
    """The map of one target before its ReLU, (N,h,w), from its gradients (N,C,h,w)."""
    if method == "hirescam":
        return np.asarray((gradients * activations).sum(axis=1))
    if method == "xgradcam":
        totals = activations.sum(axis=(2, 3))
        products = (gradients * activations).sum(axis=(2, 3))
        share = np.divide(products, totals, out=np.zeros_like(totals), where=totals != 0)
        return np.asarray(np.einsum("nc,nchw->nhw", share, activations))
    return np.asarray(np.einsum("nc,nchw->nhw", gradients.mean(axis=(2, 3)), activations))


METHODS = ["gradcam", "hirescam", "xgradcam"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("against", [["pug"], ["pug", "chow"]], ids=["one", "several"])
def test_a_contrast_is_the_map_of_the_difference(
    explainer: fastcam.Explainer, batch: Array, method: str, against: list[str]
) -> None:
    """The gradient of y_c - mean(y_d), not the difference of two rectified maps."""
    activations, gradients, _ = _outputs(explainer, batch)
    difference = gradients[:, 0] - gradients[:, [CLASSES.index(name) for name in against]].mean(axis=1)
    expected = np.maximum(_raw(method, activations, difference), 0)
    found = explainer(batch, "beagle", against=against, method=method, normalize=None, size="layer")
    assert found.maps.shape[1] == 1
    assert found.targets.tolist() == [[0]] * 4
    assert np.abs(expected).max() > 0
    assert relative_error(found.maps[:, 0], expected) < 1e-5


def test_several_targets_share_what_they_are_contrasted_with(explainer: fastcam.Explainer, batch: Array) -> None:
    both = explainer(batch, ["beagle", "saluki"], against="pug")
    for k, name in enumerate(["beagle", "saluki"]):
        single = explainer(batch, name, against="pug")
        np.testing.assert_allclose(both.heatmaps[:, k], single.heatmaps[:, 0], atol=1e-6)
        np.testing.assert_allclose(both.evidence[:, k], single.evidence[:, 0], atol=1e-6)


@pytest.mark.parametrize("target", [None, "chow"], ids=["top", "named"])
def test_finer_cam_subtracts_the_three_nearest_classes(
    explainer: fastcam.Explainer, batch: Array, target: str | None
) -> None:
    activations, gradients, logits = _outputs(explainer, batch)
    found = explainer(batch, target, against="nearest", normalize=None, size="layer")
    for image in range(len(batch)):
        own = int(logits[image].argmax()) if target is None else CLASSES.index(target)
        nearest = [c for c in np.argsort(np.abs(logits[image] - logits[image, own])) if c != own][:3]
        gradient = gradients[image, own] - 0.6 * gradients[image, nearest].mean(axis=0)
        expected = np.maximum(_raw("gradcam", activations[[image]], gradient[None]), 0)
        assert found.targets[image].tolist() == [own]
        assert relative_error(found.maps[image], expected) < 1e-5


def test_torchcam_agrees_on_finer_cam(tmp_path: Path) -> None:
    """The factor and the number of classes are torchcam's."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    methods = pytest.importorskip("torchcam.methods", reason="needs torchcam: pip install fastcam[peers]")
    if not hasattr(methods, "FinerCAM"):
        pytest.skip("needs a torchcam with FinerCAM")
    nn = torch.nn
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
    ).eval()
    images = torch.rand(1, 3, 12, 12)
    fastcam.export(network, tmp_path / "small.onnx", example_input=images, layer="1")
    extractor = methods.FinerCAM(network, target_layer="1", input_shape=(3, 12, 12))
    scores = network(images)
    own = int(scores[0].argmax())
    (expected,) = extractor(own, scores, normalized=False)
    found = fastcam.Explainer(tmp_path / "small.onnx")(images.numpy(), against="nearest", normalize=None, size="layer")
    theirs = expected.detach().numpy().reshape(12, 12)
    np.testing.assert_allclose(found.maps[0, 0] / found.maps.max(), theirs / theirs.max(), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_signed_maps_keep_the_evidence_against_a_target(
    explainer: fastcam.Explainer, batch: Array, method: str
) -> None:
    activations, gradients, _ = _outputs(explainer, batch)
    found = explainer(batch, [0, 3], method=method, normalize="signed")
    for k, label in enumerate((0, 3)):
        raw = _raw(method, activations, gradients[:, label])
        expected = raw / np.abs(raw).max(axis=(1, 2), keepdims=True)
        assert relative_error(found.maps[:, k], expected) < 1e-5
        share = np.maximum(raw, 0).sum(axis=(1, 2)) / np.abs(raw).sum(axis=(1, 2))
        np.testing.assert_allclose(found.evidence[:, k], share, atol=1e-5)
    assert found.heatmaps.min() < 0
    assert np.abs(found.heatmaps).max() <= 1


def test_a_signed_map_is_the_plain_one_where_it_is_positive(explainer: fastcam.Explainer, batch: Array) -> None:
    for method in [name for name in FORMULAS if TABLE[name].merge == "mean"]:
        signed = explainer(batch, "top2", method=method, normalize="signed", size="layer").maps
        plain = explainer(batch, "top2", method=method, normalize="max", size="layer").maps
        positive = np.maximum(signed, 0)
        top = positive.max(axis=(2, 3), keepdims=True)
        np.testing.assert_allclose(np.divide(positive, top, where=top > 0, out=positive), plain, atol=1e-5)


def test_a_counterfactual_has_the_opposite_sign(explainer: fastcam.Explainer, batch: Array) -> None:
    signed = explainer(batch, "pug", normalize="signed")
    opposite = explainer(batch, "pug", normalize="signed", counterfactual=True)
    np.testing.assert_allclose(opposite.maps, -signed.maps, atol=1e-7)
    np.testing.assert_allclose(opposite.evidence, 1 - signed.evidence, atol=1e-5)
    against = explainer(batch, "pug", counterfactual=True)
    assert against.heatmaps.min() >= 0


def test_signed_overlays_are_blue_and_red(explainer: fastcam.Explainer) -> None:
    """White where nothing speaks for or against the target: the photo shows through evenly."""
    photo = np.full((48, 48, 3), 128, np.uint8)
    photo[:, 24:] = 10
    image = explainer(photo, "chow", normalize="signed")[0]
    drawn = image.overlay(alpha=1.0).astype(int)
    heat = image.maps[0]
    strongest = np.unravel_index(np.abs(heat).argmax(), heat.shape)
    row, column = ((index * 2 + 1) * 48 // (2 * side) for index, side in zip(strongest, heat.shape, strict=True))
    channel = 0 if heat[strongest] > 0 else 2
    assert drawn[row, column, channel] > drawn[row, column, 2 - channel] + 100


def test_layers_are_averaged_before_they_are_signed(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "two.onnx", layer=["block1", "block2"])
    explainer = fastcam.Explainer(tmp_path / "two.onnx", device="cpu")
    first, second = (explainer(batch, 1, layer=name, normalize="signed", size="layer") for name in explainer.layers)
    both = explainer(batch, 1, layer=list(explainer.layers), normalize="signed", size="layer")
    assert both.maps.shape == first.maps.shape
    assert second.maps.shape != first.maps.shape
    assert np.abs(both.maps).max() == pytest.approx(1, abs=1e-6)


def test_boxes_may_be_signed(tmp_path: Path) -> None:
    fastcam.export(one_map_detector(), tmp_path / "cells.onnx", score="boxes", classes=["red", "green"])
    explainer = fastcam.Explainer(tmp_path / "cells.onnx", device="cpu")
    plain, signed = (explainer(bright_cells((0, 1, 0)), normalize=normalize) for normalize in ("max", "signed"))
    assert signed[0].labels == plain[0].labels == ["red"]
    np.testing.assert_allclose(np.maximum(signed[0].maps, 0), plain[0].maps, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"against": "pug", "method": "layercam"}, ArgumentError, "methods linear in the gradient: 'gradcam'"),
        ({"target": ["pug", "chow"], "against": "nearest"}, TargetError, "one target per image"),
        ({"against": "pugg"}, TargetError, "no class 'pugg': did you mean 'pug'"),
        ({"counterfactual": 1}, ArgumentError, "counterfactual"),
        ({"normalize": "sign"}, ArgumentError, "choose 'max', 'minmax', 'signed' or None"),
        ({"against": "pug", "on_device": True}, ArgumentError, "cannot be on a GPU"),
    ],
)
def test_wrong_contrasts(
    explainer: fastcam.Explainer, batch: Array, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explainer(batch, **arguments)


def test_a_drawing_file_is_signed_but_not_contrasted_by_other_classes(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "drawn.onnx", draw="heatmaps")
    fastcam.export(small_classifier().to_model(), tmp_path / "plain.onnx")
    drawn, plain = (
        fastcam.Explainer(tmp_path / f"{name}.onnx", device="cpu")(batch, 2, normalize="signed", against=1)
        for name in ("drawn", "plain")
    )
    np.testing.assert_allclose(drawn.maps, plain.maps, atol=1e-5)


def test_pictures_are_saved_with_both_signs(explainer: fastcam.Explainer, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = explainer(photo, normalize="signed")[0]
    image.save(tmp_path / "signed.png")
    saved = np.asarray(Image.open(tmp_path / "signed.png"), np.int64)
    np.testing.assert_array_equal(saved, image.overlay())
    # Red where the evidence is for the class, blue where it is against it.
    redness = saved[..., 0] - saved[..., 2] - (photo[..., 0].astype(np.int64) - photo[..., 2]) // 2
    heat = np.asarray(Image.fromarray(image.picture_maps[0]).resize((40, 30), Image.Resampling.BILINEAR))
    assert redness[heat > 0.5].mean() > 30
    assert redness[heat < -0.5].mean() < -30


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("values") / "values.onnx"
    fastcam.export(small_classifier().to_model(), path, score="values", gradients="full", classes=CLASSES)
    return fastcam.Explainer(path, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_explains_the_difference_to_it(method: str, regression: fastcam.Explainer, batch: Array) -> None:
    activations, gradients, values = _outputs(regression, batch)
    raw = np.stack([_raw(method, activations, gradients[:, target]) for target in (1, 3)], axis=1)
    chosen = values[:, [1, 3]]
    # For each value some images lie above, and some below.
    references = np.median(chosen, axis=0)
    assert (chosen > references).any(axis=0).all()
    assert (chosen < references).any(axis=0).all()
    above = (chosen > references)[..., None, None]
    expected = np.maximum(np.where(above, raw, -raw), 0)
    for given in (references, references.tolist(), np.tile(references, (len(batch), 1))):
        found = regression(batch, [1, 3], reference=given, method=method, size="layer", normalize=None)
        assert relative_error(found.maps, expected) < 1e-5
    single = regression(batch, "pug", reference=float(references[1]), method=method, size="layer", normalize=None)
    assert relative_error(single.maps, expected[:, 1:]) < 1e-5


def test_a_value_that_is_its_reference_has_a_blank_map(regression: fastcam.Explainer, batch: Array) -> None:
    value = regression(batch[:1], "chow").logits[0, CLASSES.index("chow")]
    assert regression(batch[:1], "chow", reference=float(value))[0].blank == [True]


@pytest.mark.parametrize("reference", ["much", [1, 2], np.zeros((3, 1)), float("nan"), [None], 10**400, object()])
def test_a_reference_that_does_not_fit_is_refused(reference: Any, regression: fastcam.Explainer, batch: Array) -> None:
    with pytest.raises(ArgumentError, match="reference"):
        regression(batch, "pug", reference=reference)


def test_a_reference_is_for_values(explainer: fastcam.Explainer, regression: fastcam.Explainer, batch: Array) -> None:
    with pytest.raises(ArgumentError, match='score="values"'):
        explainer(batch, reference=1.0)
    with pytest.raises(ArgumentError, match="omit against"):
        regression(batch, "pug", reference=1.0, against="chow")
