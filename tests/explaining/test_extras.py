"""Regions of a segmentation given at the call, and references of an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, NetworkBuilder, relative_error
from segmentation_graphs import segmenter

import fastcam
from fastcam.errors import ArgumentError, ImageError, TargetError


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("unet") / "unet.onnx"
    fastcam.export(segmenter(), path, score="segmentation", gradients="full", preprocess="scale")
    return fastcam.Explainer(path, device="cpu")


@pytest.fixture(scope="module")
def batch() -> Array:
    return np.random.default_rng(3).random((2, 3, 12, 12), dtype=np.float32)


def _head_gradients(batch: Array, label: int, weights: Array) -> Array:
    """The gradient of the weighted mean logit in the bottleneck, through the decoder, by hand: (N,8,3,3)."""
    from onnx.reference import ReferenceEvaluator

    model = segmenter()
    weight = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(onnx.ValueInfoProto(name="decoded"))
    found: Any = ReferenceEvaluator(probe).run(["decoded"], {"image": batch})
    last, first = weight[nodes["pixels"].input[1]], weight[nodes[nodes["decoded"].input[0]].input[1]]
    seeds = weights / weights.sum(axis=(1, 2), keepdims=True)
    gradient = np.einsum("nhw,c->nchw", seeds, last[label, :, 0, 0]) * (found[0] > 0)
    padded = np.pad(gradient, ((0, 0), (0, 0), (1, 1), (1, 1)))
    back = np.zeros((len(batch), first.shape[1], 12, 12))
    for row in range(3):
        for column in range(3):
            window = padded[:, :, 2 - row : 14 - row, 2 - column : 14 - column]
            back += np.einsum("nohw,oi->nihw", window, first[:, :, row, column])
    at = np.clip((np.arange(12) + 0.5) / 4 - 0.5, 0, 2)
    matrix = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(3)))
    return np.asarray(np.einsum("nchw,hi,wj->ncij", back[:, 6:], matrix, matrix))


@pytest.mark.parametrize("kind", ["bool", "weights", "pixel"])
def test_a_given_region_is_explained(regions: fastcam.Explainer, batch: Array, kind: str) -> None:
    mask = np.zeros((12, 12), bool)
    mask[2:7, 3:9] = True
    weights = mask.astype(np.float64)
    given: Array = mask
    if kind == "weights":
        given = weights = weights * np.linspace(0.1, 1, 12)
    if kind == "pixel":
        given = np.zeros((12, 12), bool)
        given[5, 8] = True
        weights = given.astype(np.float64)
    found = regions(batch, 1, mask=given, normalize=None, size="layer")
    expected = _head_gradients(batch, 1, np.broadcast_to(weights, (2, 12, 12)))
    session: Any = regions._session
    activations = session.run(["activations"], {"image": batch, "target": np.array([[1]])})[0]
    raw = np.einsum("nc,nchw->nhw", expected.mean(axis=(2, 3)), activations)
    assert np.abs(raw).max() > 0
    assert relative_error(found.maps[:, 0], np.maximum(raw, 0)) < 1e-4


def test_the_predicted_region_is_the_default(regions: fastcam.Explainer, batch: Array) -> None:
    plain = regions(batch, "top1")
    from onnx.reference import ReferenceEvaluator

    found: Any = ReferenceEvaluator(segmenter()).run(None, {"image": batch})
    predicted = found[0].argmax(axis=1) == plain.targets[:, 0, None, None]
    given = regions(batch, plain.targets, mask=predicted[:, None])
    np.testing.assert_allclose(given.heatmaps, plain.heatmaps, atol=1e-5)


def test_masks_of_any_size_cover_the_picture(regions: fastcam.Explainer, batch: Array) -> None:
    small = np.zeros((12, 12), bool)
    small[:6, :4] = True
    large = np.kron(small, np.ones((5, 5), bool))
    one, other = (regions(batch, 2, mask=mask) for mask in (small, large))
    np.testing.assert_array_equal(one.heatmaps, other.heatmaps)
    each = regions(batch, [0, 2], mask=np.stack([small, small[::-1]]))
    np.testing.assert_allclose(each.heatmaps[:, 1], regions(batch, 2, mask=small[::-1]).heatmaps[:, 0], atol=1e-6)


def test_a_mask_lies_in_the_letterbox(tmp_path: Path) -> None:
    fastcam.export(segmenter(), tmp_path / "boxed.onnx", score="segmentation", fit="letterbox", preprocess="scale")
    explainer = fastcam.Explainer(tmp_path / "boxed.onnx", device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    mask = np.zeros((24, 48), bool)
    mask[:, :24] = True
    whole = np.zeros((12, 12), bool)
    whole[3:9, :6] = True
    tensor = explainer.prepare(picture)
    np.testing.assert_allclose(
        explainer(picture, 1, mask=mask).heatmaps, explainer(tensor, 1, mask=whole).heatmaps, atol=1e-6
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((12, 12), bool), "a region is empty"),
        (np.full((12, 12), -1.0), "not negative"),
        (np.full((12, 12), np.nan), "finite"),
        (np.ones((3, 12, 12)), r"there are 2 images with 1 targets each"),
        (np.ones(12), r"give an array \(h,w\)"),
        ("car", r"give an array \(h,w\)"),
    ],
)
def test_wrong_masks(regions: fastcam.Explainer, batch: Array, mask: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        regions(batch, 1, mask=mask)


def _embedder() -> onnx.ModelProto:
    """Global average pooling and a dense layer, scaled to unit length, as metric learning does."""
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]), name="features")
    rows = net.dense(net.add("Flatten", net.add("GlobalAveragePool", features)), (6, 4), name="dense")
    length = net.add("ReduceL2", rows, net.constant([1]), keepdims=1)
    return net.build(net.add("Div", rows, length, name="embedding")).to_model()


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("faces") / "faces.onnx"
    fastcam.export(_embedder(), path, score="embedding", preprocess="scale")
    return fastcam.Explainer(path, device="cpu")


def test_a_similarity_is_explained(embedding: fastcam.Explainer, batch: Array) -> None:
    """Against the derivative of the cosine, through the dense layer, by hand."""
    rng = np.random.default_rng(1)
    references = rng.normal(size=(3, 4))
    found = embedding(batch, reference=references, normalize=None, size="layer")
    model = _embedder()
    weight = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (dense,) = (node for node in model.graph.node if node.op_type == "Gemm")
    matrix, bias = (weight[name].astype(np.float64) for name in dense.input[1:])
    session: Any = embedding._session
    activations = session.run(["activations"], {"image": batch})[0].astype(np.float64)
    rows = activations.mean(axis=(2, 3)) @ matrix + bias
    for k, reference in enumerate(references):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ reference[:, None] / lengths / np.linalg.norm(reference)
        assert found.similarity is not None
        np.testing.assert_allclose(found.similarity[:, k], cosine[:, 0], atol=1e-5)
        slope = reference / lengths / np.linalg.norm(reference) - cosine * rows / lengths**2
        alpha = slope @ matrix.T / 144
        expected = np.maximum(np.einsum("nc,nchw->nhw", alpha, activations), 0)
        assert relative_error(found.maps[:, k], expected) < 1e-4
    assert found.labels == [["reference 1", "reference 2", "reference 3"]] * 2


def test_a_reference_may_be_an_image(embedding: fastcam.Explainer, batch: Array) -> None:
    photos = np.random.default_rng(5).integers(0, 256, (3, 30, 20, 3), dtype=np.uint8)
    found = embedding(photos[0], reference=list(photos[1:]))
    vectors = embedding(photos[1:], reference=photos[0]).logits
    given = embedding(photos[0], reference=vectors)
    np.testing.assert_allclose(found.heatmaps, given.heatmaps, atol=1e-6)
    same = embedding(photos[0], reference=photos[0])[0]
    assert same.similarity is not None
    assert same.similarity[0] == pytest.approx(1, abs=1e-5)
    assert same.describe() == "reference 1 1.000"
    # At its maximum, no small change of the picture makes it more similar.
    assert np.abs(embedding(photos[0], reference=photos[0], normalize=None).maps).max() < 1e-6


def test_what_speaks_against_a_similarity(embedding: fastcam.Explainer, batch: Array) -> None:
    signed = embedding(batch[:1], reference=batch[1:], normalize="signed")
    opposite = embedding(batch[:1], reference=batch[1:], normalize="signed", counterfactual=True)
    np.testing.assert_allclose(opposite.maps, -signed.maps, atol=1e-6)
    assert signed.similarity is not None
    np.testing.assert_array_equal(opposite.similarity, signed.similarity)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ArgumentError, "reference is missing"),
        ({"reference": np.zeros(4)}, ArgumentError, "zero, or not finite"),
        ({"reference": np.ones((5, 2, 4))}, ArgumentError, "there are 2 images"),
        ({"reference": np.ones(5)}, ImageError, r"the batch has shape \(5,\)"),
        ({"reference": []}, ImageError, "there are no references"),
        ({"reference": np.ones(4), "target": 1}, TargetError, "an embedding has no classes"),
    ],
)
def test_wrong_references(
    embedding: fastcam.Explainer, batch: Array, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedding(batch, **arguments)


def test_masks_and_references_are_for_their_kinds(regions: fastcam.Explainer, tmp_path: Path, batch: Array) -> None:
    from networks import small_classifier

    fastcam.export(small_classifier().to_model(), tmp_path / "dogs.onnx")
    dogs = fastcam.Explainer(tmp_path / "dogs.onnx", device="cpu")
    with pytest.raises(ArgumentError, match=r"mask= applies to files exported with score=.segmentation"):
        dogs(batch, mask=np.ones((12, 12)))
    with pytest.raises(ArgumentError, match=r"reference= applies to files exported with score=.embedding"):
        regions(batch, reference=np.ones(4))


def test_batches_keep_their_rows(regions: fastcam.Explainer, embedding: fastcam.Explainer) -> None:
    images = np.random.default_rng(8).random((5, 3, 12, 12), dtype=np.float32)
    masks = np.random.default_rng(9).random((5, 1, 12, 12)) > 0.5
    references = np.random.default_rng(10).normal(size=(5, 2, 4))
    one, many = (regions(images, 1, mask=masks, batch_size=size) for size in (2, 5))
    np.testing.assert_allclose(one.heatmaps, many.heatmaps, atol=1e-6)
    one, many = (embedding(images, reference=references, batch_size=size) for size in (2, 5))
    np.testing.assert_allclose(one.heatmaps, many.heatmaps, atol=1e-6)
    assert one.similarity is not None
    assert many.similarity is not None
    np.testing.assert_allclose(one.similarity, many.similarity, atol=1e-6)


def test_one_region_serves_a_contrast(regions: fastcam.Explainer, batch: Array) -> None:
    """The difference of two classes' mean logits over the same region."""
    mask = np.zeros((12, 12), bool)
    mask[3:8, 2:9] = True
    found = regions(batch, 1, against=[0, 2], mask=mask, normalize=None, size="layer")
    signs = [_head_gradients(batch, label, np.broadcast_to(mask, (2, 12, 12)).astype(float)) for label in range(3)]
    difference = signs[1] - (signs[0] + signs[2]) / 2
    session: Any = regions._session
    activations = session.run(["activations"], {"image": batch, "target": np.array([[1]])})[0]
    raw = np.einsum("nc,nchw->nhw", difference.mean(axis=(2, 3)), activations)
    assert relative_error(found.maps[:, 0], np.maximum(raw, 0)) < 1e-4
    with pytest.raises(ArgumentError, match="compared in one region"):
        regions(batch, [0, 1], against=2, mask=np.stack([mask, mask[::-1]]))


def test_magnitudes_do_not_matter(regions: fastcam.Explainer, embedding: fastcam.Explainer, batch: Array) -> None:
    mask = np.zeros((12, 12))
    mask[2:5, 2:5] = 1
    np.testing.assert_allclose(
        regions(batch, 1, mask=1e38 * mask).heatmaps, regions(batch, 1, mask=mask).heatmaps, atol=1e-6
    )
    reference = np.random.default_rng(2).normal(size=4)
    expected = embedding(batch, reference=reference).similarity
    for factor in (1e25, 1e-30):
        found = embedding(batch, reference=factor * reference).similarity
        assert expected is not None
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=1e-5)
