"""`verify`: each check passes for a good file, and is missed for a planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from networks import Array, NetworkBuilder, small_classifier
from onnx import numpy_helper
from PIL import Image

import fastcam
from fastcam import kernels
from fastcam.cli import commands
from fastcam.errors import ArgumentError
from fastcam.evaluating.verification import CHECKS, Finding


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verifying") / "small.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet")
    return path


@pytest.fixture
def photos(rng: np.random.Generator) -> list[Array]:
    coarse = [rng.integers(0, 256, (3, 3, 3), np.uint8) for _ in range(6)]
    return [np.kron(one, np.ones((4, 4, 1), np.uint8)) for one in coarse]


def _found(verification: fastcam.Verification) -> dict[str, Finding]:
    return {finding.name: finding for finding in verification.findings}


def test_a_good_file_meets_what_is_measured_without_photos(path: Path) -> None:
    found = fastcam.verify(path)
    findings = _found(found)
    assert found.passed
    assert set(findings) == set(CHECKS) - {"agreement", "drift"}
    for name in ("gradients", "kernels", "repeats", "random_weights"):
        assert findings[name].passed, findings[name]
    for name in ("blank", "random_logit", "faithfulness"):
        assert findings[name].value is None
        assert findings[name].reason == "needs photos"


def test_every_check_is_measured_with_photos(path: Path, photos: list[Array]) -> None:
    findings = _found(fastcam.verify(path, photos, compare_with=path))
    assert set(findings) == set(CHECKS)
    for finding in findings.values():
        assert finding.value is not None, finding
        assert np.isfinite(finding.value)
    assert findings["agreement"].value == 1
    assert findings["drift"].value == 0


def _edited(source: Path, destination: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    edit(model)
    onnx.save(model, destination)
    return destination


def test_wrong_gradients_are_found(path: Path, tmp_path: Path) -> None:
    """The matrix that the file folds for its gradients, 10 % too large in one row."""

    def spoil(model: onnx.ModelProto) -> None:
        tensor = next(item for item in model.graph.initializer if "folded" in item.name)
        array = numpy_helper.to_array(tensor).copy()
        array[array.shape[0] // 2 :] *= 1.1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    finding = _found(fastcam.verify(_edited(path, tmp_path / "wrong.onnx", spoil)))["gradients"]
    assert finding.passed is False
    assert finding.value is not None
    # A half of the channels' gradients, a tenth off.
    assert 0.02 < finding.value < 0.2


def test_wrong_kernels_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = kernels.render

    def wrong(*arguments: Any, **options: Any) -> kernels.Rendered:
        found = render(*arguments, **options)
        return found._replace(heatmaps=np.roll(found.heatmaps, 1, axis=3))

    monkeypatch.setattr(kernels, "render", wrong)
    assert _found(fastcam.verify(path))["kernels"].passed is False


def test_maps_that_do_not_depend_on_the_weights_are_found(tmp_path: Path) -> None:
    """Pixels themselves as the explained layer, and even weights: every network gives the same map."""
    net = NetworkBuilder(("batch", 3, 12, 12))
    layer = net.add("Relu", net.add("Add", net.input, net.constant(np.float32(3))), name="layer")
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    scores = net.add("MatMul", mean, net.constant(np.full((3, 2), 0.5, np.float32)))
    net.build(net.add("Softmax", scores, axis=-1))
    fastcam.export(net.graph.to_model(), tmp_path / "edges.onnx", layer="layer", preprocess="imagenet")
    found = fastcam.verify(tmp_path / "edges.onnx")
    finding = _found(found)["random_weights"]
    assert finding.value == pytest.approx(1, abs=1e-6)
    assert not found.passed


def test_another_precision_is_compared(path: Path, photos: list[Array], tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "half.onnx", preprocess="imagenet", precision="fp16")
    findings = _found(fastcam.verify(path, photos, compare_with=tmp_path / "half.onnx"))
    drift = findings["drift"].value
    assert drift is not None
    assert 0 < drift < 0.02
    fastcam.export(small_classifier(seed=1).to_model(), tmp_path / "other.onnx", preprocess="imagenet")
    other = fastcam.verify(path, photos, compare_with=tmp_path / "other.onnx")
    assert _found(other)["drift"].passed is False
    assert not other.passed


def test_facts_name_what_was_checked(path: Path, photos: list[Array], tmp_path: Path) -> None:
    Image.fromarray(photos[0]).save(tmp_path / "one.png")
    found = fastcam.verify(path, [tmp_path / "one.png"])
    assert len(found.facts["model_sha256"]) == 64
    assert list(found.facts["pictures_sha256"]) == [str(tmp_path / "one.png")]
    assert found.facts["versions"]["onnxruntime"]
    found.save(tmp_path / "verification.json")
    written = json.loads((tmp_path / "verification.json").read_text())
    assert [finding["name"] for finding in written["findings"]] == [finding.name for finding in found.findings]


def test_the_command_line_gates(path: Path, photos: list[Array], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{number}.png")
    arguments = ["verify", str(path), str(folder), "-o", str(tmp_path / "out"), "--threshold", "faithfulness=-1"]
    for threshold, status in (("gradients=0.1", 0), ("gradients=0", 1)):
        done = CliRunner().invoke(commands, [*arguments, "--threshold", threshold], standalone_mode=False)
        assert done.exception is None, done.output
        assert done.return_value == status
        assert ("MISSED" in done.output) == bool(status)
        page = (tmp_path / "out" / "verification.html").read_text()
        assert ("A threshold was missed" in page) == bool(status)
        assert json.loads((tmp_path / "out" / "verification.json").read_text())["passed"] == (not status)


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="thresholds: 'gradient': did you mean 'gradients'"):
        fastcam.verify(path, thresholds={"gradient": 1})
    with pytest.raises(ArgumentError, match="thresholds: kernels='low'"):
        fastcam.verify(path, thresholds={"kernels": "low"})
    with pytest.raises(fastcam.ImageError, match="no images to check with"):
        fastcam.verify(path, [])
    fastcam.export(small_classifier().to_model(), tmp_path / "values.onnx", score="values", preprocess="imagenet")
    with pytest.raises(ArgumentError, match="these checks are for classifiers"):
        fastcam.verify(tmp_path / "values.onnx")


def test_files_without_preprocessing_are_checked_with_random_numbers(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "plain.onnx")
    findings = _found(fastcam.verify(tmp_path / "plain.onnx"))
    assert findings["gradients"].passed
    assert findings["random_weights"].value is not None


def test_checks_that_cannot_be_measured_say_why(tmp_path: Path, photos: list[Array]) -> None:
    net = NetworkBuilder(("batch", 3, 12, 12))
    first = net.add("Relu", net.conv(net.input, (8, 3, 3, 3), pads=[1, 1, 1, 1]), name="block1")
    inner = net.add("Relu", net.conv(first, (8, 8, 3, 3), pads=[1, 1, 1, 1]), name="inside")
    joined = net.add("Add", first, inner)
    net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", joined)), (8, 5)))
    fastcam.export(net.graph.to_model(), tmp_path / "skip.onnx", layer="inside", preprocess="imagenet")
    finding = _found(fastcam.verify(tmp_path / "skip.onnx"))["gradients"]
    assert finding.passed is None
    assert "the scores also depend on" in finding.reason
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx", preprocess="imagenet")
    large = NetworkBuilder(("batch", 3, 8, 8))
    layer = large.add("Relu", large.conv(large.input, (4, 3, 3, 3)))
    large.build(large.dense(large.add("Flatten", large.add("GlobalAveragePool", layer)), (4, 5)))
    fastcam.export(large.graph.to_model(), tmp_path / "other.onnx", preprocess="imagenet")
    found = _found(fastcam.verify(tmp_path / "small.onnx", photos, compare_with=tmp_path / "other.onnx"))
    assert "takes other images" in found["drift"].reason
