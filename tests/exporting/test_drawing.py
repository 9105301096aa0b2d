"""Files that draw their own heatmaps: against Explainer, whose kernels are held to the specification, and Pillow."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from networks import Array, NetworkBuilder, relative_error, small_classifier
from onnx.reference import ReferenceEvaluator
from PIL import Image

import fastcam
from fastcam import cli
from fastcam.errors import ArgumentError, FileFormatError, ImageError, ModelError
from fastcam.explaining.methods import METHODS
from fastcam.explaining.selftest import _MODULES, RUNTIMES, check_selftest_answer, run_selftest, write_selftest_picture
from fastcam.exporting.drawing import METHODS as DRAWN_METHODS
from fastcam.exporting.drawing import bilinear_matrix
from fastcam.graph import Graph
from fastcam.kernels.reference import blended
from fastcam.metadata import EVIDENCE
from fastcam.pictures.writing import palette
from fastcam.selftest import hashed

# Both sum 8 channels and interpolate in float32.
_BOUND = 1e-6
_TARGETS = np.array([[1, 4], [0, 2], [3, 3]])


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    session = _session(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _export(folder: Path, model: Graph | None = None, **options: Any) -> Path:
    path = folder / "drawn.onnx"
    fastcam.export((model or small_classifier()).to_model(), path, **{"preprocess": "imagenet", **options})
    return path


def _explainer(folder: Path, model: Graph | None = None, **options: Any) -> fastcam.Explainer:
    """Return an Explainer of the same network that draws with the kernels."""
    path = folder / "full.onnx"
    merged = {"preprocess": "imagenet", "gradients": "full", **options}
    fastcam.export((model or small_classifier()).to_model(), path, **merged)
    return fastcam.Explainer(path, device="cpu")


@pytest.fixture
def images(rng: np.random.Generator) -> Array:
    return rng.normal(size=(3, 3, 12, 12)).astype(np.float32)


def test_every_method_of_the_file_is_explainers() -> None:
    assert set(DRAWN_METHODS) <= set(METHODS)


@pytest.mark.parametrize("method", DRAWN_METHODS)
def test_heatmaps_are_explainers(method: str, images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", method=method)
    expected = _explainer(tmp_path)(images, target=_TARGETS, method=method)
    found = _run(path, {"image": images, "target": _TARGETS})
    assert list(found) == ["logits", "targets", "maps", "heatmaps"]
    assert relative_error(found["heatmaps"], expected.heatmaps) < _BOUND
    reference: Any = ReferenceEvaluator(str(path)).run(["heatmaps"], {"image": images, "target": _TARGETS})
    assert relative_error(reference[0], expected.heatmaps) < _BOUND


@pytest.mark.parametrize("method", DRAWN_METHODS)
def test_explainer_opens_such_files(method: str, images: Array, tmp_path: Path) -> None:
    kernels = _explainer(tmp_path)
    drawn = fastcam.Explainer(_export(tmp_path, draw="heatmaps", method=method), device="cpu")
    for size, normalize in itertools.product(["input", "layer", (5, 40)], ["max", "minmax", None]):
        options: dict[str, Any] = {"target": _TARGETS, "method": method, "size": size, "normalize": normalize}
        expected, found = kernels(images, **options), drawn(images, **options)
        assert relative_error(found.heatmaps, expected.heatmaps) < _BOUND
        assert relative_error(found.maps, expected.maps) < _BOUND
        np.testing.assert_allclose(found.evidence, expected.evidence, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found.targets, _TARGETS)


@pytest.mark.parametrize("method", DRAWN_METHODS)
def test_signed_heatmaps_keep_the_evidence_against(method: str, images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", method=method, signed=True)
    found = _run(path, {"image": images, "target": _TARGETS})
    maps = found["maps"].astype(np.float64)
    # Methods of positive weights find nothing against a class after a ReLU.
    one = np.ones((1, 1, 1, 1), np.float32)
    assert (maps < 0).any() == (METHODS[method].weigh(one, -one[None])[1] < 0).any()
    top = np.abs(maps).max(axis=(2, 3), keepdims=True)
    rows = bilinear_matrix(6, 12).astype(np.float64)
    assert relative_error(found["heatmaps"], rows @ (maps / top) @ rows.T) < _BOUND
    positive = _explainer(tmp_path)(images, target=_TARGETS, method=method, normalize=None).maps
    assert relative_error(np.maximum(maps, 0), positive) < _BOUND
    # Explainer shows their positive part, as always.
    explained = fastcam.Explainer(path, device="cpu")(images, target=_TARGETS, method=method, normalize=None).maps
    assert relative_error(explained, positive) < _BOUND


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method", ["gradcam", "xgradcam", "hirescam"])
def test_contrasts_are_explainers(method: str, signed: bool, images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", method=method, signed=signed, contrast=True, target="required")
    targets = np.array([[1, 4, 0], [0, 2, 1], [3, 0, 2]])
    explainer, normalize = _explainer(tmp_path), "signed" if signed else "max"
    expected = explainer(images, targets[:, :1], against=targets[:, 1:], method=method, normalize=normalize)
    plain = explainer(images, targets[:, :1], method=method, normalize=normalize)
    assert relative_error(plain.heatmaps, expected.heatmaps) > 0.1
    found = _run(path, {"image": images, "target": targets})
    assert relative_error(found["heatmaps"], expected.heatmaps) < _BOUND
    np.testing.assert_array_equal(found["targets"], targets)
    alone = _run(path, {"image": images, "target": targets[:, :1]})
    assert relative_error(alone["heatmaps"], plain.heatmaps) < _BOUND
    # Without fastcam's own arithmetic: the maps before the contrast are all there.
    assert relative_error(found["maps"][:, :1], alone["maps"]) < _BOUND


def test_a_contrast_with_a_class_that_does_not_exist_is_nan(images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", contrast=True, target="required")
    found = _run(path, {"image": images, "target": np.array([[1, 4], [0, 99], [3, 0]])})
    np.testing.assert_array_equal(found["targets"], [[1, 4], [0, -1], [3, 0]])
    assert np.isnan(found["heatmaps"][1]).all()
    assert np.isfinite(found["heatmaps"][[0, 2]]).all()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_contrasts(runtime: str, images: Array, tmp_path: Path) -> None:
    pytest.importorskip(_MODULES[runtime][0], reason="one of the peers that .ci/run installs last")
    path = _export(tmp_path, draw="heatmaps", contrast=True, target="required")
    inputs = {"image": images[:1], "target": np.array([[1, 4, 0]])}
    found = RUNTIMES[runtime](importlib.import_module(_MODULES[runtime][0]), str(path), inputs)
    assert relative_error(found["heatmaps"], _run(path, inputs)["heatmaps"]) < _BOUND


def test_explainer_opens_files_that_contrast(images: Array, tmp_path: Path) -> None:
    drawn = fastcam.Explainer(_export(tmp_path, draw="heatmaps", contrast=True), device="cpu")
    full = _explainer(tmp_path)
    for options in ({"target": "top3"}, {"target": 2, "against": [0, 1]}):
        assert relative_error(drawn(images, **options).heatmaps, full(images, **options).heatmaps) < _BOUND


def test_raw_outputs_come_on_request(images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", method="layercam", gradients="full", raw_outputs=True)
    found = _run(path, {"image": images, "target": _TARGETS})
    assert list(found)[4:] == ["activations", "weights", "gradients"]
    explainer = fastcam.Explainer(path, device="cpu")
    assert explainer.methods == tuple(name for name, row in METHODS.items() if EVIDENCE.keys().isdisjoint(row.reads))
    expected = _explainer(tmp_path)(images, target=_TARGETS, method="hirescam").heatmaps
    assert relative_error(explainer(images, target=_TARGETS, method="hirescam").heatmaps, expected) == 0


def test_a_float16_network_draws_in_float32(images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", precision="fp16")
    expected = _explainer(tmp_path, precision="fp16", gradients="pooled")(images, target=_TARGETS)
    assert relative_error(_run(path, {"image": images, "target": _TARGETS})["heatmaps"], expected.heatmaps) < _BOUND


def test_a_fixed_batch(images: Array, tmp_path: Path) -> None:
    model = small_classifier(batch=3, keeps_batch=True)
    path = _export(tmp_path, model, draw="heatmaps", target="required")
    expected = _explainer(tmp_path)(images, target=_TARGETS)
    assert relative_error(_run(path, {"image": images, "target": _TARGETS})["heatmaps"], expected.heatmaps) < _BOUND
    found = fastcam.Explainer(path, device="cpu")(images[:2], target=_TARGETS[:2])
    assert relative_error(found.heatmaps, expected.heatmaps[:2]) < _BOUND
    assert run_selftest(path).passed


def _blank_classifier() -> Graph:
    """Every activation speaks against class 0 and for class 1."""
    net = NetworkBuilder(("batch", 3, 6, 6))
    layer = net.add("Relu", net.conv(net.input, (4, 3, 3, 3)), name="layer")
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    return net.build(net.add("Gemm", mean, net.constant(np.array([[-1, 1]] * 4, np.float32))))


def test_a_map_without_evidence_is_zeros(rng: np.random.Generator, tmp_path: Path) -> None:
    path = _export(tmp_path, _blank_classifier(), draw="heatmaps")
    image = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    heatmaps = _run(path, {"image": image, "target": np.array([[0, 1]])})["heatmaps"]
    assert not heatmaps[0, 0].any()
    assert heatmaps[0, 1].max() > 0.5


def test_nan_stays_nan_and_with_its_image(images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps")
    clean = _run(path, {"image": images, "target": _TARGETS})["heatmaps"]
    images[1, 0, 4, 4] = np.nan
    found = _run(path, {"image": images, "target": _TARGETS})["heatmaps"]
    assert np.isnan(found[1]).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bad", [5, 2**40, -6, -(2**62)])
def test_a_class_that_does_not_exist_fails_alone(bad: int, images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", target="required", gradients="full", raw_outputs=True)
    clean = _run(path, {"image": images, "target": _TARGETS})
    wrong = _TARGETS.copy()
    wrong[1, 0] = bad
    found = _run(path, {"image": images, "target": wrong})
    assert found["targets"].tolist() == [[1, 4], [-1, 2], [3, 3]]
    np.testing.assert_array_equal(found["logits"], clean["logits"])
    for name in ("maps", "heatmaps", "weights", "gradients"):
        assert np.isnan(found[name][1, 0]).all()
        found[name][1, 0] = clean[name][1, 0]
        np.testing.assert_allclose(found[name], clean[name], rtol=0, atol=1e-6)


def test_a_required_target_is_an_ordinary_input(images: Array, tmp_path: Path) -> None:
    path = _export(tmp_path, target="required")
    assert {item.name for item in _session(path).get_inputs()} == {"image", "target"}
    assert not [tensor for tensor in onnx.load(path).graph.initializer if tensor.name == "target"]
    expected = _explainer(tmp_path)(images, target="top2")
    found = fastcam.Explainer(path, device="cpu")(images, target="top2")
    np.testing.assert_array_equal(found.targets, expected.targets)
    assert relative_error(found.heatmaps, expected.heatmaps) < _BOUND


def _picture_networks() -> dict[str, tuple[Graph, Any]]:
    """Return networks of both layouts, of three channels and of one, with a preprocessing for each."""
    odd = {"order": "BGR", "mean": (1.5, 2, 3), "scale": (0.01, 0.02, 0.03)}
    networks: dict[str, tuple[Graph, Any]] = {
        "NCHW": (small_classifier(), "imagenet"),
        "BGR": (small_classifier(), odd),
    }
    for name, channels in (("NHWC", 3), ("grey", 1)):
        net = NetworkBuilder(("batch", 10, 14, channels))
        turned = net.add("Transpose", net.input, perm=[0, 3, 1, 2])
        layer = net.add("Relu", net.conv(turned, (4, channels, 3, 3), strides=[2, 2]), name="layer")
        networks[name] = net.build(net.dense(net.add("Flatten", layer), (96, 4))), "symmetric"
    return networks


_PICTURE_NETWORKS = _picture_networks()


@pytest.mark.parametrize("name", _PICTURE_NETWORKS)
@pytest.mark.parametrize("picture", ["input", "any"])
def test_pictures_are_prepared_as_explainer_prepares_them(
    name: str, picture: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    model, preprocess = _PICTURE_NETWORKS[name]
    path = _export(tmp_path, model, preprocess=preprocess, draw="overlays", picture=picture)
    explainer = _explainer(tmp_path, model, preprocess=preprocess)
    pixels = rng.integers(0, 256, (2, *explainer.input_size, 3), np.uint8)
    expected = explainer(list(pixels), target=[1, 2])
    found = _run(path, {"pictures": pixels, "target": np.array([[1, 2], [1, 2]])})
    assert relative_error(found["logits"], expected.logits) < _BOUND
    assert relative_error(found["heatmaps"], expected.heatmaps) < _BOUND
    # Not `overlay`, which writes a caption where there is little evidence.
    overlays = blended(expected.heatmaps.astype(np.float64), pixels, palette("jet"), 0.5)
    # A heat close to the border of two colours may fall on either side.
    assert np.mean(found["overlays"] != overlays) < 0.01
    drawn = fastcam.Explainer(path, device="cpu")
    assert (drawn.input_size, drawn.input_layout) == (explainer.input_size, "NHWC")
    if name == "grey":
        return  # Explainer resizes the luma, such a file the colours: different rounding
    large = rng.integers(0, 256, (40, 31, 3), np.uint8)
    assert relative_error(drawn([large], target=1).heatmaps, explainer([large], target=1).heatmaps) < _BOUND


def _resizer(folder: Path, size: tuple[int, int]) -> Path:
    """Return a network whose explained layer is the picture itself, resized to ``size``."""
    net = NetworkBuilder(("batch", 3, *size))
    layer = net.add("Relu", net.input, name="layer")
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    graph = net.build(net.dense(mean, (3, 2)))
    return _export(folder, graph, preprocess="none", draw="heatmaps", picture="any", raw_outputs=True)


@pytest.mark.parametrize("shape", [(300, 451), (97, 61), (24, 24), (48, 1200), (1, 1), (1000, 750), (7, 300)])
@pytest.mark.parametrize("size", [(24, 24), (64, 96)])
@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_resizing_is_within_one_level_of_pillows(
    shape: tuple[int, int], size: tuple[int, int], kind: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    picture = rng.integers(0, 256, (*shape, 3), np.uint8)
    if kind == "edges":
        picture = ((np.indices(shape).sum(axis=0) // 9 % 2)[..., None] * np.array([255, 200, 10])).astype(np.uint8)
    found = _run(_resizer(tmp_path, size), {"pictures": picture[None], "target": np.array([[0]])})["activations"][0]
    expected = Image.fromarray(picture)
    for step in ((size[1], shape[0]), size[::-1]):
        expected = expected.resize(step, Image.Resampling.BILINEAR)
    difference = np.abs(found.transpose(1, 2, 0) - np.asarray(expected, np.float32))
    assert difference.max() <= 1
    # Pillow's weights have 22 bits, so values at a half are rounded either way: rarely, but 0.8 % from 300 columns
    # to 24, a simple ratio that makes many halves.
    assert np.mean(difference > 0) <= (0.01 if 300 in shape else 0.006)


def test_overlays_of_nan_are_dark(rng: np.random.Generator, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="overlays", picture="input", target="required")
    pixels = rng.integers(0, 256, (1, 12, 12, 3), np.uint8)
    overlay = _run(path, {"pictures": pixels, "target": np.array([[99]])})["overlays"][0, 0]
    np.testing.assert_array_equal(overlay, np.rint(pixels[0] / 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "heatmap"}, "did you mean 'heatmaps'"),
        ({"draw": "heatmaps", "method": "gradcam+++"}, "'gradcam[+][+]'"),
        ({"draw": "heatmaps", "picture": "both"}, "'input', 'any'"),
        ({"draw": "heatmaps", "picture": True}, "give a string"),
        ({"target": "optional"}, "'default', 'required'"),
        ({"method": "layercam"}, 'add draw="heatmaps"'),
        ({"picture": "any"}, 'add draw="heatmaps"'),
        ({"contrast": True}, 'add draw="heatmaps"'),
        ({"draw": "heatmaps", "contrast": True, "method": "layercam"}, "'gradcam', 'xgradcam', 'hirescam'"),
        ({"draw": "overlays"}, 'add picture="input"'),
        ({"draw": "overlays", "picture": "any", "signed": True}, "have no overlays"),
        ({"draw": "heatmaps", "layer": ["block1", "block2"]}, "choose one"),
        ({"draw": "heatmaps", "picture": "any", "preprocess": None}, "pass preprocess"),
    ],
)
def test_arguments_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        _export(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_explainer_refuses_what_such_a_file_cannot_do(images: Array, tmp_path: Path) -> None:
    drawn = fastcam.Explainer(_export(tmp_path, draw="heatmaps", method="layercam", picture="any"), device="cpu")
    with pytest.raises(ImageError, match="takes pictures"):
        drawn(images, method="layercam")
    picture = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ArgumentError, match=r"method='layercam'.*raw_outputs=True"):
        drawn(picture, method="gradcam")
    np.testing.assert_array_equal(drawn(picture).maps, drawn(picture, method="layercam").maps)


def test_inspecting_such_a_file(tmp_path: Path) -> None:
    info = fastcam.inspect(_export(tmp_path, draw="overlays", picture="input", target="required"))
    plain = fastcam.inspect(_export(tmp_path))
    assert info.layers == plain.layers
    assert info.macs == plain.macs
    assert info.methods == ("gradcam",)


def test_a_pad_before_a_max_pool_stays_apart(rng: np.random.Generator, tmp_path: Path) -> None:
    """ONNX Runtime before 1.32 merges them if all bytes of the value are zero, and treats it as minus infinity."""
    net = NetworkBuilder(("batch", 3, 8, 8))
    pads = net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    below = net.add("Sub", net.conv(net.input, (4, 3, 3, 3), pads=[1, 1, 1, 1]), net.constant(np.float32(9)))
    pooled = net.add("MaxPool", net.add("Pad", below, pads), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 0, 0])
    layer = net.add("Relu", net.conv(pooled, (4, 4, 3, 3)), name="layer")
    model = net.build(net.dense(net.add("Flatten", layer), (16, 3)))
    path = _export(tmp_path, model, draw="heatmaps")
    (pad,) = (node for node in onnx.load(path).graph.node if node.op_type == "Pad")
    (value,) = (tensor for tensor in onnx.load(path).graph.initializer if tensor.name == pad.input[2])
    number = onnx.numpy_helper.to_array(value)
    assert number == 0
    assert np.signbit(number)
    image = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    reference: Any = ReferenceEvaluator(model.to_model()).run(None, {"image": image})
    assert relative_error(_run(path, {"image": image})["logits"], reference[0]) < 1e-5


def test_the_self_tests_input_is_a_plain_integer_hash() -> None:
    def level(index: int) -> int:
        x = (index + 1) * 0x9E3779B1 & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x85EBCA77 & 0xFFFFFFFF
        return x >> 24

    found = hashed((1, 5, 4, 3), 0, 255, np.uint8)
    assert found.ravel().tolist() == [level(index) for index in range(60)]
    assert hashed((1, 2), -1, 1, np.float32)[0, 1] == pytest.approx(-1 + 2 * level(1) / 255, abs=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("picture", [None, "input", "any"])
def test_every_runtime_passes_the_self_test(runtime: str, picture: str | None, tmp_path: Path) -> None:
    module = {"opencv": "cv2", "reference": "onnx"}.get(runtime, runtime)
    pytest.importorskip(module, reason=f"needs {runtime}: pip install fastcam[peers]")
    if runtime == "opencv" and picture is not None:
        pytest.skip("OpenCV does not support uint8 inputs")
    path = _export(tmp_path, draw="heatmaps", picture=picture, target="required")
    result = run_selftest(path, runtime)
    assert result.passed, result
    assert result.explained != int(np.argmax(_selftest_logits(path)))


def test_the_self_test_of_a_picture_that_is_not_square(tmp_path: Path) -> None:
    model, preprocess = _PICTURE_NETWORKS["NHWC"]
    for picture in (None, "any"):
        path = _export(tmp_path, model, preprocess=preprocess, draw="heatmaps", picture=picture, target="required")
        assert run_selftest(path).passed


def _selftest_logits(path: Path) -> list[float]:
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return [float(text) for text in entries["fastcam.selftest.logits"].split()]


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
def test_the_self_test_notices_a_changed_weight(runtime: str, tmp_path: Path) -> None:
    path = _export(tmp_path, draw="heatmaps", target="required")
    model = onnx.load(path)
    columns = next(tensor for tensor in model.graph.initializer if tensor.name == "draw/columns")
    changed = onnx.numpy_helper.to_array(columns).copy()
    changed[0, 0] *= 0.99
    columns.CopyFrom(onnx.numpy_helper.from_array(changed, "draw/columns"))
    onnx.save(model, path)
    result = run_selftest(path, runtime)
    assert not result.passed
    assert result.logits_error < 1e-5 < result.heatmap_error


def test_the_self_test_notices_a_runtime_that_folds_the_target(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install fastcam[peers]")
    result = run_selftest(_export(tmp_path, draw="heatmaps"), "openvino")
    assert not result.passed
    assert result.explained != result.target


def _command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, list(map(str, arguments)), standalone_mode=False)


def test_the_commands_export_and_selftest(tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "dogs.onnx")
    path = tmp_path / "drawn.onnx"
    options = "--draw overlays --picture any --target required --method layercam --raw-outputs --gradients full"
    result = _command("export", tmp_path / "dogs.onnx", path, "--preprocess", "imagenet", *options.split())
    assert result.exception is None
    names = ["logits", "targets", "maps", "heatmaps", "overlays", "activations", "weights", "gradients"]
    assert [item.name for item in _session(path).get_outputs()] == names
    passed = _command("selftest", path)
    assert passed.return_value == 0
    assert "passed, tolerance 1.0e-03" in passed.output

    picture = _command("selftest", path, "--picture", tmp_path / "test.png")
    target = int(picture.output.split()[-1])
    pixels = np.asarray(Image.open(tmp_path / "test.png"))[None]
    heatmap = _run(path, {"pictures": pixels, "target": np.array([[target]])})["heatmaps"]
    heatmap.tofile(tmp_path / "heatmap.f32")
    assert "passed" in _command("selftest", path, "--answer", tmp_path / "heatmap.f32").output
    (heatmap * 1.01).tofile(tmp_path / "heatmap.f32")
    failed = _command("selftest", path, "--answer", tmp_path / "heatmap.f32")
    assert failed.return_value == 1
    assert "FAILED" in failed.output
    heatmap[..., 1:].tofile(tmp_path / "heatmap.f32")
    with pytest.raises(FileFormatError, match="132 numbers; a heatmap has 12 x 12"):
        check_selftest_answer(path, tmp_path / "heatmap.f32")
    with pytest.raises(ModelError, match="cannot be read"):
        check_selftest_answer(path, tmp_path / "none.f32")
    with pytest.raises(ArgumentError, match=r"ends in \.png"):
        write_selftest_picture(path, tmp_path / "test.jpg")
    with pytest.raises(ArgumentError, match="does not take pictures"):
        write_selftest_picture(_export(tmp_path, draw="heatmaps"), tmp_path / "test.png")


def test_the_command_exports_a_contrast(images: Array, tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "dogs.onnx")
    path = tmp_path / "drawn.onnx"
    result = _command("export", tmp_path / "dogs.onnx", path, "--draw", "heatmaps", "--contrast")
    assert result.exception is None
    assert _run(path, {"image": images, "target": _TARGETS})["heatmaps"].shape[:2] == (3, 1)
    assert _command("selftest", path).return_value == 0


def test_files_without_a_self_test(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="draw='heatmaps'"):
        run_selftest(_export(tmp_path))
    with pytest.raises(ModelError, match="no such file"):
        run_selftest(tmp_path / "missing.onnx")
    with pytest.raises(ArgumentError, match="did you mean 'openvino'"):
        run_selftest(_export(tmp_path), "openvin")
