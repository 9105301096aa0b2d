"""Model repositories for Triton: the rules of its ONNX Runtime backend, and its own parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from networks import small_classifier

import fastcam
from fastcam.cli import commands
from fastcam.errors import ArgumentError, FileFormatError, WriteError

_BREEDS = ["beagle", "pug", "boxer", "collie", "husky"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "dogs.onnx"
    fastcam.export(
        small_classifier().to_model(), path, draw="heatmaps", target="required", classes=_BREEDS, preprocess="imagenet"
    )
    return path


def _parsed(config: Path) -> Any:
    """The configuration, as Triton itself reads it."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    text_format = pytest.importorskip("google.protobuf.text_format", reason="part of protobuf")
    return text_format.Parse(config.read_text(), schema.ModelConfig())


def test_the_configuration_follows_the_backends_rules(path: Path, tmp_path: Path) -> None:
    written = fastcam.write_triton_repository(path, tmp_path / "repository", max_batch=8, tensorrt=True, instances=2)
    config = _parsed(written.config)
    session = onnxruntime.InferenceSession(written.folder / "1" / "model.onnx")
    assert (config.name, config.backend, config.max_batch_size) == ("dogs", "onnxruntime", 8)
    # Every input of the file and no other: with batching none may be optional.
    required = {item.name: item for item in session.get_inputs()}
    assert [item.name for item in config.input] == list(required)
    assert not any(item.optional for item in config.input)
    assert {item.name for item in config.output} == {item.name for item in session.get_outputs()}
    names = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for item in (*config.input, *config.output):
        found = required.get(item.name) or next(o for o in session.get_outputs() if o.name == item.name)
        # Without the batch; names are dynamic sides.
        assert list(item.dims) == [side if isinstance(side, int) else -1 for side in found.shape[1:]]
        kind = type(item).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[item.data_type].name
        assert kind == names[found.type]
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4, 8]
    assert config.instance_group[0].count == 2
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert (accelerator.name, dict(accelerator.parameters)) == ("tensorrt", {"precision_mode": "FP32"})
    labelled = [item.name for item in config.output if item.label_filename]
    assert labelled == ["logits"]
    assert (written.folder / "labels.txt").read_text().splitlines()[2] == "boxer"


def test_warm_ups_run(path: Path, tmp_path: Path) -> None:
    written = fastcam.write_triton_repository(path, tmp_path / "repository", max_batch=4, device="cpu")
    session = onnxruntime.InferenceSession(written.folder / "1" / "model.onnx")
    config = _parsed(written.config)
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4]
    kinds = {11: np.float32, 9: np.int64}
    for sample in config.model_warmup:
        feeds = {}
        for name, tensor in sample.inputs.items():
            assert tensor.zero_data == (name == "target")
            assert tensor.random_data == (name != "target")
            feeds[name] = np.zeros((sample.batch_size, *tensor.dims), kinds[tensor.data_type])
        (heatmaps,) = session.run(["heatmaps"], feeds)
        assert heatmaps.shape == (sample.batch_size, 1, 12, 12)


def test_one_bad_class_spoils_one_answer_only(path: Path, tmp_path: Path) -> None:
    """What Triton does with eight requests: one batch."""
    written = fastcam.write_triton_repository(path, tmp_path / "repository")
    session = onnxruntime.InferenceSession(written.folder / "1" / "model.onnx")
    batch = np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32)
    targets = np.arange(8)[:, None] % 5
    good = session.run(["heatmaps", "targets"], {"image": batch, "target": targets})
    bad = targets.copy()
    bad[3] = 99
    heatmaps, explained = session.run(["heatmaps", "targets"], {"image": batch, "target": bad})
    assert explained[3] == -1
    assert np.isnan(heatmaps[3]).all()
    others = [number for number in range(8) if number != 3]
    np.testing.assert_array_equal(heatmaps[others], good[0][others])
    expected = fastcam.Explainer(path, device="cpu")(batch, targets.tolist())
    np.testing.assert_allclose(good[0], expected.heatmaps, atol=1e-5)


def test_fixed_batches_and_pictures(tmp_path: Path) -> None:
    model = small_classifier(batch=2, keeps_batch=True).to_model()
    fastcam.export(model, tmp_path / "two.onnx", target="required", draw="heatmaps", preprocess="imagenet")
    config = _parsed(fastcam.write_triton_repository(tmp_path / "two.onnx", tmp_path / "repository").config)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 3, 12, 12]
    assert not config.HasField("dynamic_batching")
    fastcam.export(
        small_classifier().to_model(), tmp_path / "any.onnx", target="required", draw="heatmaps", picture="any",
        preprocess="imagenet",
    )  # fmt: skip
    config = _parsed(fastcam.write_triton_repository(tmp_path / "any.onnx", tmp_path / "repository").config)
    assert list(config.input[0].dims) == [-1, -1, 3]


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "default.onnx")
    with pytest.raises(ArgumentError, match='export the model again with target="required"'):
        fastcam.write_triton_repository(tmp_path / "default.onnx", tmp_path / "repository")
    with pytest.raises(ArgumentError, match=r"name='\.\./x'"):
        fastcam.write_triton_repository(path, tmp_path / "repository", name="../x")
    with pytest.raises(ArgumentError, match="tensorrt=True needs device='gpu'"):
        fastcam.write_triton_repository(path, tmp_path / "repository", device="cpu", tensorrt=True)
    (tmp_path / "plain.onnx").write_bytes(small_classifier().to_model().SerializeToString())
    with pytest.raises(FileFormatError, match="does not explain itself"):
        fastcam.write_triton_repository(tmp_path / "plain.onnx", tmp_path / "repository")
    with pytest.raises(FileFormatError, match="cannot be read"):
        fastcam.write_triton_repository(tmp_path / "missing.onnx", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
    fastcam.write_triton_repository(path, tmp_path / "repository")
    with pytest.raises(WriteError, match="exists already"):
        fastcam.write_triton_repository(path, tmp_path / "repository")


def test_from_the_command_line(path: Path, tmp_path: Path) -> None:
    arguments = ["triton", str(path), "-o", str(tmp_path / "repository"), "--name", "breeds", "--device", "cpu"]
    done = CliRunner().invoke(commands, [*arguments, "--max-batch", "1"])
    assert done.exit_code == 0, done.output
    assert "image, target to logits, targets, maps, heatmaps" in done.output
    config = _parsed(tmp_path / "repository" / "breeds" / "config.pbtxt")
    assert (config.name, config.max_batch_size) == ("breeds", 1)
    assert not config.HasField("dynamic_batching")
