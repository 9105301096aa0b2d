"""Explainer: heatmaps against the formula, every kind of input, targets, threads, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from networks import Array, NetworkBuilder, export_two_layers, overflowing_classifier, relative_error, small_classifier
from PIL import Image

import fastcam
from fastcam import kernels
from fastcam.errors import (
    ArgumentError,
    DeviceError,
    FastcamError,
    FileFormatError,
    ImageError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    TargetError,
)
from fastcam.pictures.writing import palette

_CLASSES = ["beagle", "pug", "boxer", "collie", "husky"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explainer") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, classes=_CLASSES, preprocess="symmetric", gradients="full")
    return path


@pytest.fixture(scope="module")
def explainer(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, threads=2)


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(5, 3, 12, 12)).astype(np.float32)


@pytest.fixture
def photo(rng: np.random.Generator) -> Array:
    return rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)


def _bilinear(image: Array, size: tuple[int, int]) -> Array:
    """Half-pixel bilinear resize by Pillow in float32: for enlarging, its filter is the plain one."""
    resized = Image.fromarray(image.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float64)


def _formula(path: Path, batch: Array, targets: Array) -> Array:
    """Grad-CAM from the full gradients (Selvaraju et al. 2017, eq. 1 and 2), in NumPy."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    gradients, activations = session.run(["gradients", "activations"], {"image": batch, "target": targets})
    alpha = gradients.astype(np.float64).mean(axis=(3, 4))
    maps = np.einsum("nkc,nchw->nkhw", alpha, activations.astype(np.float64)).clip(min=0)
    return np.asarray(maps)


def test_maps_are_the_papers_formula(path: Path, explainer: fastcam.Explainer, batch: Array) -> None:
    targets = np.array([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    expected = _formula(path, batch, targets)
    found = explainer(batch, targets, size="layer", normalize=None)
    assert found.heatmaps.dtype == np.float32
    assert relative_error(found.heatmaps, expected) < 1e-5
    np.testing.assert_array_equal(found.heatmaps, found.maps)
    np.testing.assert_array_equal(found.targets, targets)


def test_normalisation(path: Path, explainer: fastcam.Explainer, batch: Array) -> None:
    targets = np.array([[0], [1], [2], [3], [4]])
    raw = _formula(path, batch, targets)
    top, bottom = (getattr(raw, which)(axis=(2, 3), keepdims=True) for which in ("max", "min"))
    assert (top > 0).all()
    assert relative_error(explainer(batch, targets, size="layer").heatmaps, raw / top) < 1e-5
    found = explainer(batch, targets, size="layer", normalize="minmax").heatmaps
    assert relative_error(found, (raw - bottom) / (top - bottom)) < 1e-5


def test_sizes(explainer: fastcam.Explainer, batch: Array) -> None:
    layer = explainer(batch, 1, size="layer")
    # A list is accepted, too.
    sizes: list[tuple[Any, tuple[int, int]]] = [("input", (12, 12)), ((17, 23), (17, 23)), ([8, 9], (8, 9))]
    for size, expected in sizes:
        found = explainer(batch, 1, size=size)
        assert found.heatmaps.shape == (5, 1, *expected)
        np.testing.assert_array_equal(found.maps, layer.maps)
        for n in range(5):
            assert relative_error(found.heatmaps[n, 0], _bilinear(layer.maps[n, 0], expected)) < 1e-5


def test_all_negative_maps_give_zeros_not_nan(tmp_path: Path) -> None:
    """The case in which the textbook code divides 0 by 0 and returns NaN."""
    net = NetworkBuilder(("batch", 3, 4, 4))
    features = net.add("Relu", net.conv(net.input, (2, 3, 1, 1)))
    flat = net.add("Flatten", net.add("GlobalAveragePool", features))
    scores = net.add("Gemm", flat, net.constant(np.array([[-1, 1], [-2, 2]], np.float32)))
    fastcam.export(net.build(scores).to_model(), tmp_path / "negative.onnx")
    image = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    for normalize in ("max", "minmax", None):
        found = fastcam.Explainer(tmp_path / "negative.onnx")(image, [0, 1], normalize=normalize)
        np.testing.assert_array_equal(found.heatmaps[0, 0], 0)
        assert found.heatmaps[0, 1].max() > 0


@pytest.mark.parametrize("normalize", ["max", "minmax", None])
def test_evidence_is_the_share_of_positive_values(
    path: Path, explainer: fastcam.Explainer, batch: Array, normalize: str | None
) -> None:
    """Sum of the positive values over the sum of magnitudes, of the formula's map before its ReLU, in float64."""
    targets = np.array([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    session = onnxruntime.InferenceSession(path)
    feeds = {"image": batch, "target": targets}
    gradients, activations = (array.astype(np.float64) for array in session.run(["gradients", "activations"], feeds))
    raw = np.einsum("nkc,nchw->nkhw", gradients.mean(axis=(3, 4)), activations)
    expected = raw.clip(min=0).sum(axis=(2, 3)) / np.abs(raw).sum(axis=(2, 3))
    assert 0 < expected.min() < expected.max() <= 1
    found = explainer(batch, targets, normalize=normalize)
    assert found.evidence.dtype == np.float32
    assert relative_error(found.evidence, expected) < 1e-5
    np.testing.assert_array_equal(found[2].evidence, found.evidence[2])
    # HiResCAM weights element-wise (Draelos and Carin 2020).
    raw = (gradients * activations[:, None]).sum(axis=2)
    expected = raw.clip(min=0).sum(axis=(2, 3)) / np.abs(raw).sum(axis=(2, 3))
    assert relative_error(explainer(batch, targets, method="hirescam").evidence, expected) < 1e-5


def _with_evidence(share: float, tmp_path: Path) -> tuple[Path, Array]:
    """A network whose map for class 0 is red minus green, and a picture that makes this share of it positive."""
    net = NetworkBuilder(("batch", 3, 10, 10))
    layer = net.add("Relu", net.input, name="layer")
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    scores = net.add("Gemm", mean, net.constant(np.array([[1, 0], [-1, 0], [0, 1]], np.float32)))
    fastcam.export(net.build(net.add("Softmax", scores)).to_model(), tmp_path / "net.onnx", preprocess="scale")
    picture = np.zeros((10, 10, 3), np.uint8)
    picture[..., 1] = 10
    picture[0, 0] = [round(990 * share / (1 - share)), 0, 0]
    return tmp_path / "net.onnx", picture


def test_a_blank_map_is_not_coloured_but_captioned(tmp_path: Path) -> None:
    path, picture = _with_evidence(0, tmp_path)
    large = picture.repeat(20, 0).repeat(20, 1)
    (image,) = fastcam.Explainer(path)(large, 0)
    assert image.evidence.tolist() == [0]
    assert not image.heatmaps.any()
    overlay = image.overlay()
    rows = (overlay != large).any(axis=(1, 2))
    first = int(rows.argmax())
    # The caption covers less than a quarter at the lower edge; above it the picture is unchanged.
    assert 150 < first < 199
    np.testing.assert_array_equal(overlay[:first], large[:first])
    assert overlay[first:].min() == 0
    assert overlay[first:].max() > 200
    titles = [axes.get_title() for axes in image.plot()]
    assert titles[1].endswith("\nno positive evidence at this layer")


def test_a_map_with_little_positive_evidence_says_so(tmp_path: Path) -> None:
    path, picture = _with_evidence(0.02, tmp_path)
    (image,) = fastcam.Explainer(path)(picture, 0)
    assert image.evidence[0] == pytest.approx(0.02, rel=0.02)
    assert image.heatmaps.max() == 1
    assert image.plot()[1].get_title().endswith("\nonly 2 % of the evidence at this layer is positive")
    plain = _with_evidence(0.2, tmp_path)
    (image,) = fastcam.Explainer(plain[0])(plain[1], 0)
    assert image.evidence[0] == pytest.approx(0.2, rel=0.02)
    assert "\n" not in image.plot()[1].get_title()
    colored = kernels.colorize(image.maps[:1][None], plain[1][None], palette=palette("jet"), alpha=0.5)
    np.testing.assert_array_equal(image.overlay(), colored[0, 0])


def test_the_evidence_of_several_layers_is_their_mean(tmp_path: Path, batch: Array) -> None:
    explainer = fastcam.Explainer(export_two_layers(tmp_path))
    both = explainer(batch, 1, layer=list(explainer.layers)).evidence
    each = [explainer(batch, 1, layer=layer).evidence for layer in explainer.layers]
    np.testing.assert_allclose(both, np.mean(each, axis=0), rtol=1e-6)


def test_scores(path: Path, explainer: fastcam.Explainer, batch: Array) -> None:
    source = onnxruntime.InferenceSession(small_classifier().to_model().SerializeToString())
    (probabilities,) = source.run(None, {"image": batch})
    found = explainer(batch)
    assert relative_error(found.probabilities, probabilities) < 1e-6
    np.testing.assert_array_equal(found.targets[:, 0], probabilities.argmax(axis=1))
    assert found.labels == [[_CLASSES[index]] for index in probabilities.argmax(axis=1)]
    assert found.logits.shape == (5, 5)


def test_a_sigmoid_model_gives_independent_probabilities(tmp_path: Path, rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    features = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)))
    logits = net.dense(net.add("Flatten", net.add("GlobalAveragePool", features)), (4, 5))
    scaled = net.add("Mul", logits, net.constant(np.float32(60)))
    model = net.build(net.add("Sigmoid", scaled)).to_model()
    fastcam.export(model, tmp_path / "sigmoid.onnx")
    image = rng.normal(size=(3, 3, 6, 6)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})
    found = fastcam.Explainer(tmp_path / "sigmoid.onnx")(image)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4, atol=1e-7)


def test_what_the_file_says(path: Path, explainer: fastcam.Explainer) -> None:
    assert explainer.path == path
    assert explainer.layer == "block2"
    assert explainer.candidates == ("block2", "block1")
    assert explainer.classes == tuple(_CLASSES)
    assert explainer.class_count == 5
    assert explainer.input_layout == "NCHW"
    assert explainer.input_size == (12, 12)
    assert explainer.providers == ["CPUExecutionProvider"]
    assert explainer.preprocessing == fastcam.Preprocessing.of("symmetric")


def test_every_kind_of_picture_gives_the_same(explainer: fastcam.Explainer, photo: Array, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    expected = explainer(photo)
    assert expected.images[0] is not None
    np.testing.assert_array_equal(expected.images[0], photo)
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(photo), [photo], photo[None]):
        found = explainer(source)
        np.testing.assert_array_equal(found.heatmaps, expected.heatmaps)
        np.testing.assert_array_equal(found.logits, expected.logits)
    mixed = explainer([tmp_path / "photo.png", Image.fromarray(photo), photo])
    assert len(mixed) == 3
    for n in range(3):
        assert relative_error(mixed.heatmaps[n], expected.heatmaps[0]) < 1e-5


def test_a_picture_is_prepared_as_the_file_says(explainer: fastcam.Explainer) -> None:
    red = np.zeros((12, 12, 3), np.uint8)
    red[..., 0] = 255
    tensor = explainer.prepare(red)
    np.testing.assert_allclose(tensor[0, 0], 1)
    np.testing.assert_allclose(tensor[0, 1:], -1)
    np.testing.assert_array_equal(explainer(red).logits, explainer(tensor).logits)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (2, [[2]] * 5),
        (np.int64(2), [[2]] * 5),
        ("collie", [[3]] * 5),
        ([1, "husky"], [[1, 4]] * 5),
        ((0, 0), [[0, 0]] * 5),
        ([[0], ["pug"], [2], [3], [4]], [[0], [1], [2], [3], [4]]),
        (np.array([[1, 2]] * 5), [[1, 2]] * 5),
        (np.array([4, 3]), [[4, 3]] * 5),
    ],
)
def test_targets(explainer: fastcam.Explainer, batch: Array, target: Any, expected: list[list[int]]) -> None:
    found = explainer(batch, target)
    assert found.targets.tolist() == expected
    assert found.labels == [[_CLASSES[index] for index in row] for row in expected]


def test_the_best_classes(explainer: fastcam.Explainer, batch: Array) -> None:
    found = explainer(batch, "top3")
    np.testing.assert_array_equal(found.targets, np.argsort(-found.logits, axis=1)[:, :3])
    explicit = explainer(batch, found.targets)
    np.testing.assert_array_equal(found.heatmaps, explicit.heatmaps)


_BAD_TARGETS: dict[str, tuple[Any, str]] = {
    "too large": (5, r"target 5 is out of range: the model has classes 0\.\.4"),
    "negative": (-1, "target -1 is out of range"),
    "unknown name": ("beagel", "no class 'beagel': did you mean 'beagle'"),
    "nothing like it": ("zzz", "no class 'zzz'"),
    "float": (1.5, "give None, 'top3'"),
    "float in a list": ([1.5], "target 1.5 is neither"),
    "bool": ([True], "target True is neither"),
    "empty": ([], "give None"),
    "empty rows": ([[]] * 5, r"lists of \[0\] classes"),
    "ragged": ([[0], [1, 2], [0], [0], [0]], r"lists of \[1, 2\] classes"),
    "wrong count": ([[0], [1]], "2 lists for 5 images"),
    "mixed": ([0, [1]], "mixes classes and lists"),
    "top too many": ("top6", "its best 1..5"),
    "top none": ("top0", "its best 1..5"),
    "top of nothing": ("top" + "9" * 5000, "no class 'top999"),
    "three axes": (np.zeros((5, 1, 1), int), "neither a class index"),
}


@pytest.mark.parametrize("name", _BAD_TARGETS)
def test_a_bad_target_is_named(explainer: fastcam.Explainer, batch: Array, name: str) -> None:
    target, message = _BAD_TARGETS[name]
    with pytest.raises(TargetError, match=message):
        explainer(batch, target)


def test_names_need_a_file_with_names(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "nameless.onnx")
    nameless = fastcam.Explainer(tmp_path / "nameless.onnx")
    assert nameless.classes is None
    assert nameless(batch, 3).labels == [["3"]] * 5
    with pytest.raises(TargetError, match="has no class names"):
        nameless(batch, "pug")
    fastcam.export(small_classifier().to_model(), tmp_path / "twins.onnx", classes=["crane", "a", "crane", "b", "c"])
    with pytest.raises(TargetError, match=r"names the classes \[0, 2\]"):
        fastcam.Explainer(tmp_path / "twins.onnx")(batch, "crane")


def test_a_class_named_like_a_rank_wins(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "top.onnx", classes=["a", "b", "c", "top3", "e"])
    assert fastcam.Explainer(tmp_path / "top.onnx")(batch, "top3").targets.tolist() == [[3]] * 5


_BAD_INPUTS: dict[str, tuple[Any, type[FastcamError], str]] = {
    "wrong size": (np.zeros((1, 3, 11, 12), np.float32), ImageError, r"model takes \(N, 3, 12, 12\), NCHW"),
    "channels last": (np.zeros((1, 12, 12, 3), np.float32), ImageError, "NCHW"),
    "one image of another size": (np.zeros((3, 10, 12), np.float32), ImageError, r"\(3, 10, 12\)"),
    "empty batch": (np.zeros((0, 3, 12, 12), np.float32), ImageError, "no images"),
    "empty list": ([], ImageError, "no images"),
    "nan": (np.full((2, 3, 12, 12), np.nan, np.float32), ImageError, "image 0 of the batch holds NaN"),
    "floats beyond 0..1 in a list": ([np.full((12, 12, 3), 2, np.float32)], ImageError, "holds floats 2..2"),
    "missing file": ("no_such_dog.jpg", ImageError, "no_such_dog.jpg"),
    "a number": (3, ImageError, "int"),
}


@pytest.mark.parametrize("name", _BAD_INPUTS)
def test_a_bad_input_is_named(explainer: fastcam.Explainer, name: str) -> None:
    images, error, message = _BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        explainer(images)


def test_infinity_names_its_image(explainer: fastcam.Explainer, batch: Array) -> None:
    batch[3, 1, 2, 2] = np.inf
    with pytest.raises(ImageError, match="image 3 of the batch holds NaN or infinity"):
        explainer(batch)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_doubles_are_taken_as_far_as_float32_goes(explainer: fastcam.Explainer, batch: Array) -> None:
    np.testing.assert_array_equal(explainer(batch.astype(np.float64)).logits, explainer(batch).logits)
    with pytest.raises(ImageError, match="beyond float32"):
        explainer(np.full((1, 3, 12, 12), 1e300))


def test_large_finite_pixels_are_no_infinity(explainer: fastcam.Explainer, batch: Array) -> None:
    """Values whose squares overflow float32 are still numbers."""
    batch[0, 0, 0, 0] = 1e25
    assert np.isfinite(explainer(batch).heatmaps).all()


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_scores_beyond_float32_name_their_image(explainer: fastcam.Explainer, batch: Array, chunk: int) -> None:
    batch[3] = 3e38
    with pytest.raises(NonFiniteError, match="scores of image 3 are not finite"):
        explainer(batch, batch_size=chunk)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"size": size} for size in ("full", 7, (1, 2, 3), (0, 5), (-1, 4), (2.5, 3), "ab", (10**6, 10**6), None)),
        *({"normalize": normalize} for normalize in ("std", 1, ["max"], np.zeros(2))),
        *({"batch_size": batch} for batch in (0, -1, 2.5, "a", None)),
    ],
    ids=str,
)
def test_other_bad_arguments_are_named(explainer: fastcam.Explainer, batch: Array, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ArgumentError, match=f"{name}="):
        explainer(batch, **arguments)


def test_sizes_of_any_whole_numbers(explainer: fastcam.Explainer, batch: Array) -> None:
    size: Any = np.array([8, 9])
    assert explainer(batch, size=size).heatmaps.shape == (5, 1, 8, 9)


def test_a_file_without_preprocessing_takes_batches_only(tmp_path: Path, batch: Array, photo: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "silent.onnx")
    silent = fastcam.Explainer(tmp_path / "silent.onnx")
    assert silent.preprocessing is None
    assert len(silent(batch)) == 5
    with pytest.raises(ImageError, match=r"export it again with preprocess="):
        silent(photo)


def test_chunks_equal_single_images(explainer: fastcam.Explainer, batch: Array) -> None:
    found = explainer(batch, "top2", batch_size=2)
    whole = explainer(batch, "top2")
    np.testing.assert_array_equal(found.targets, whole.targets)
    assert relative_error(found.heatmaps, whole.heatmaps) < 1e-5
    per_image = explainer(batch, [[0], [1], [2], [3], [4]], batch_size=2)
    assert per_image.targets[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fixed", [1, 2])
def test_a_file_of_fixed_batch_explains_any_number(
    tmp_path: Path, explainer: fastcam.Explainer, batch: Array, fixed: int
) -> None:
    fastcam.export(small_classifier(batch=fixed, keeps_batch=True).to_model(), tmp_path / "fixed.onnx")
    fixed_explainer = fastcam.Explainer(tmp_path / "fixed.onnx")
    for target in (None, "top2", [[0], [1], [2], [3], [4]]):
        found, expected = fixed_explainer(batch, target), explainer(batch, target)
        np.testing.assert_array_equal(found.targets, expected.targets)
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5


def test_many_threads_at_once_give_what_one_gives(explainer: fastcam.Explainer, rng: np.random.Generator) -> None:
    batches = [rng.normal(size=(2, 3, 12, 12)).astype(np.float32) for _ in range(40)]
    serial = [explainer(batch, "top2", size=(20, 20)) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda batch: explainer(batch, "top2", size=(20, 20)), batches))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one.heatmaps, other.heatmaps)
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.targets, other.targets)


def test_a_result_is_a_sequence_of_images(explainer: fastcam.Explainer, batch: Array) -> None:
    found = explainer(batch, "top2")
    assert len(found) == len(list(found)) == 5
    np.testing.assert_array_equal(found[-1].heatmaps, found.heatmaps[4])
    assert [item.labels for item in found[1:3]] == found.labels[1:3]
    assert found[0].image is None
    with pytest.raises(IndexError):
        found[5]


def test_overlay_is_the_blend_at_the_pictures_own_size(explainer: fastcam.Explainer, photo: Array) -> None:
    item = explainer(photo, "top2")[0]
    overlay = item.overlay(1, alpha=0.4)
    assert overlay.shape == photo.shape
    heat = _bilinear(item.maps[1], (30, 40))
    colours = palette("jet")[np.rint(heat * 255).astype(int)]
    expected = 0.6 * photo + 0.4 * colours
    # A value on the border of two colours may get either: one step of the palette.
    assert np.abs(overlay - expected).mean() < 0.6
    np.testing.assert_array_equal(item.overlay(alpha=0), photo)
    assert (item.overlay(colormap="viridis") != item.overlay()).any()


def test_overlay_of_raw_maps_uses_the_whole_palette(explainer: fastcam.Explainer, photo: Array) -> None:
    raw, normalised = explainer(photo, normalize=None)[0], explainer(photo)[0]
    assert abs(raw.maps.max() - 1) > 0.05
    difference = raw.overlay().astype(int) - normalised.overlay()
    assert np.abs(difference).max() <= 3


def test_overlay_on_another_picture(explainer: fastcam.Explainer, batch: Array, photo: Array) -> None:
    item = explainer(batch)[0]
    with pytest.raises(ArgumentError, match=r"overlay\(image=\.\.\.\)"):
        item.overlay()
    assert item.overlay(image=photo).shape == photo.shape


def test_overlay_arguments(explainer: fastcam.Explainer, photo: Array) -> None:
    item = explainer(photo)[0]
    for k in (1, -2, 0.5):
        with pytest.raises(ArgumentError, match=rf"k={k}: this image has 1 heatmaps"):
            item.overlay(k)
    with pytest.raises(ArgumentError, match="colormap=3: give a string"):
        item.overlay(colormap=3)
    with pytest.raises(ArgumentError, match="jett"):
        item.overlay(colormap="jett")
    with pytest.raises(FastcamError, match="alpha"):
        item.overlay(alpha=2)


def test_save_writes_the_overlay(explainer: fastcam.Explainer, photo: Array, tmp_path: Path) -> None:
    item = explainer(photo)[0]
    item.save(tmp_path / "why.png", alpha=0.3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "why.png")), item.overlay(alpha=0.3))


def test_plot_needs_a_picture(explainer: fastcam.Explainer, batch: Array) -> None:
    with pytest.raises(ArgumentError, match="no picture to plot"):
        explainer(batch)[0].plot()


def test_explanations_compare_by_identity(explainer: fastcam.Explainer, batch: Array) -> None:
    first, second = explainer(batch), explainer(batch)
    assert first in [second, first]
    assert first != second
    assert len({first[0], first[1]}) == 2


def test_plot_shows_picture_and_overlays(explainer: fastcam.Explainer, photo: Array) -> None:
    item = explainer(photo, "top2")[0]
    panels = item.plot()
    assert panels == panels[0].figure.axes
    assert [axes.get_title() for axes in panels] == [
        "image",
        *(f"{label}  {item.probabilities[index]:.1%}" for label, index in zip(item.labels, item.targets, strict=True)),
    ]
    np.testing.assert_array_equal(panels[1].images[0].get_array(), item.overlay(0))


def _metadata_file(tmp_path: Path, **changes: str) -> Path:
    model = onnx.load(_explained(tmp_path))
    metadata = {item.key: item.value for item in model.metadata_props}
    onnx.helper.set_model_props(model, {**metadata, **{f"fastcam.{key}": value for key, value in changes.items()}})
    onnx.save(model, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def _explained(tmp_path: Path) -> Path:
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def test_a_file_that_does_not_explain_itself_is_refused(tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "plain.onnx")
    with pytest.raises(FileFormatError, match=r"plain\.onnx.*run fastcam\.export"):
        fastcam.Explainer(tmp_path / "plain.onnx")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="format 99"):
        fastcam.Explainer(_metadata_file(tmp_path, format_version="99"))


@pytest.mark.parametrize(
    "key", ["layers", "classes", "candidates", "input_layout", "preprocessing", "score_activation"]
)
def test_damaged_metadata_is_refused_at_once(tmp_path: Path, key: str) -> None:
    for damage in ("{damaged", "3", '["a", 3]', '{"mean": 1}'):
        with pytest.raises(FileFormatError, match=rf"fastcam\.{key}.*export the model again"):
            fastcam.Explainer(_metadata_file(tmp_path, **{key: damage}))


@pytest.mark.parametrize("key", ["layers", "classes", "framework", "preprocessing"])
def test_missing_metadata_is_refused_at_once(tmp_path: Path, key: str) -> None:
    with pytest.raises(FileFormatError, match=rf"fastcam\.{key}"):
        fastcam.Explainer(_without(tmp_path, key))


def _without(tmp_path: Path, key: str) -> Path:
    model = onnx.load(_explained(tmp_path))
    kept = {item.key: item.value for item in model.metadata_props if item.key != f"fastcam.{key}"}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def test_metadata_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"fastcam\.classes"):
        fastcam.Explainer(_metadata_file(tmp_path, classes=json.dumps(["a"])))


def _edited(tmp_path: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(_explained(tmp_path))
    edit(model)
    onnx.save(model, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def test_outputs_are_found_by_name(tmp_path: Path, batch: Array) -> None:
    turned = _edited(tmp_path, lambda model: model.graph.output.append(model.graph.output.pop(0)))
    assert fastcam.Explainer(turned).class_count == 5
    assert len(fastcam.Explainer(turned)(batch, 3)) == 5


@pytest.mark.parametrize("index", range(4))
def test_a_missing_output_is_refused_at_once(tmp_path: Path, index: int) -> None:
    with pytest.raises(FileFormatError, match="is missing or changed: export the model again"):
        fastcam.Explainer(_edited(tmp_path, lambda model: model.graph.output.pop(index)))


def test_metadata_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = _explained(tmp_path)
    damaged = path.read_bytes().replace(b"fastcam.framework", b"fastcam.framew\xff\xfek")
    path.write_bytes(damaged)
    with pytest.raises(FastcamError, match=r"small\.onnx"):
        fastcam.Explainer(path)


def test_a_model_that_fails_while_it_runs_is_named(path: Path, batch: Array) -> None:
    explainer = fastcam.Explainer(path)
    explainer._image_shape = (2, 12, 12)
    with pytest.raises(ModelError, match="ONNX Runtime cannot run this model"):
        explainer(batch[:, :2])


@pytest.mark.parametrize("side", ["open", 0, 2**40])
def test_an_input_that_holds_no_picture_is_refused(tmp_path: Path, side: str | int) -> None:
    def change(model: onnx.ModelProto) -> None:
        dim = model.graph.input[0].type.tensor_type.shape.dim[2]
        if isinstance(side, str):
            dim.dim_param = side
        else:
            dim.dim_value = side

    with pytest.raises(ModelError, match=r"changed\.onnx"):
        fastcam.Explainer(_edited(tmp_path, change))


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    data = _explained(tmp_path).read_bytes().replace(b"batch", b"\xf4\xf4\xf4\xf4\xf4")
    (tmp_path / "bytes.onnx").write_bytes(data)
    with pytest.raises(FileFormatError, match="a name in it is damaged"):
        fastcam.Explainer(tmp_path / "bytes.onnx")


@pytest.mark.parametrize("content", [None, b"", b"no model", "truncated"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: Any) -> None:
    broken = tmp_path / "broken.onnx"
    if content == "truncated":
        broken.write_bytes(_explained(tmp_path).read_bytes()[:3000])
    elif content is not None:
        broken.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        fastcam.Explainer(broken)


def test_devices(path: Path, batch: Array) -> None:
    assert fastcam.Explainer(path, device="cpu").providers == ["CPUExecutionProvider"]
    assert len(fastcam.Explainer(path, providers=[("CPUExecutionProvider", {})])(batch)) == 5
    with pytest.raises(ArgumentError, match="device='tpu'"):
        fastcam.Explainer(path, device="tpu")
    with pytest.raises(ArgumentError, match=r"providers=\[\]"):
        fastcam.Explainer(path, providers=[])
    with pytest.raises(DeviceError, match="has no NoSuchProvider; it has"):
        fastcam.Explainer(path, providers=["NoSuchProvider"])
    wrong: list[Any] = [0, "2", 2.0]
    for threads in wrong:
        with pytest.raises(ArgumentError, match="threads="):
            fastcam.Explainer(path, threads=threads)
    for providers in ([("CPUExecutionProvider", None)], "CPUExecutionProvider", [()], [3], [("CPUExecutionProvider",)]):
        with pytest.raises(ArgumentError, match="providers="):
            fastcam.Explainer(path, providers=providers)


def test_a_provider_that_did_not_start_is_no_silent_fallback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself only warns and runs on the CPU."""
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, **_: session(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(DeviceError, match="CUDAExecutionProvider could not start"):
        fastcam.Explainer(path, providers=["CUDAExecutionProvider"])


def test_a_missing_onnxruntime_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[cpu\]"):
        fastcam.Explainer(path)


def test_a_missing_matplotlib_is_named(
    explainer: fastcam.Explainer, photo: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = explainer(photo)[0]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[demo\]"):
        item.plot()


def test_activations_beyond_float32_name_their_image(tmp_path: Path) -> None:
    fastcam.export(overflowing_classifier().to_model(), tmp_path / "large.onnx", layer="layer")
    explainer = fastcam.Explainer(tmp_path / "large.onnx")
    images = np.zeros((3, 3, 4, 4), np.float32)
    images[2] = 1
    assert len(explainer(images[:2])) == 2
    for chunk in (1, 16):
        with pytest.raises(NonFiniteError, match="activations or gradients of image 2") as caught:
            explainer(images, batch_size=chunk)
        assert caught.value.image == 2


def test_memory_stays(explainer: fastcam.Explainer, batch: Array) -> None:
    """A thousand explanations after a warm-up leave no more than pages of allocator noise behind."""
    process = psutil.Process()
    for _ in range(300):
        explainer(batch, "top3", size=(64, 64))
    before = process.memory_info().rss
    for _ in range(1000):
        explainer(batch, "top3", size=(64, 64))
    # One leaked heatmap array per call would be 245 MB, one leaked map 2 MB.
    assert process.memory_info().rss - before < 1.5e6
