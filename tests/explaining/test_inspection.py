"""`inspect`: counts computed by hand, published figures, and the facts in the file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from mutations import STRUCTURAL, flip_bytes
from networks import NetworkBuilder, small_classifier

import fastcam
from fastcam.errors import FileFormatError, ModelError
from fastcam.explaining.methods import METHODS
from fastcam.metadata import EVIDENCE


def _dense_head(path: Path, **options: Any) -> fastcam.ModelInfo:
    """A network with products that can be counted by hand: (3,12,12) -> conv -> (8,10,10) -> 2 dense layers -> 5."""
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (8, 3, 3, 3)))
    hidden = net.add("Relu", net.add("MatMul", net.add("Flatten", features), net.weight(800, 20)))
    scores = net.add("Gemm", hidden, net.weight(20, 5), net.weight(5))
    fastcam.export(net.build(net.add("Softmax", scores, axis=-1)).to_model(), path, **options)
    return fastcam.inspect(path)


def test_counts_worked_out_by_hand(tmp_path: Path) -> None:
    info = _dense_head(tmp_path / "m.onnx")
    assert info.macs == 8 * 100 * 27 + 800 * 20 + 20 * 5
    assert info.parameters == (8 * 27 + 8) + 800 * 20 + (20 * 5 + 5)
    # The sum over the map is folded into the dense layer: 8 channels instead of 800 activations, by 20 units.
    assert info.gradient_macs == 8 * 20
    assert info.gradient_parameters == 8 * 20
    assert info.layers == {info.candidates[0]: (8, 10, 10)}


def test_full_gradients_cost_the_whole_product(tmp_path: Path) -> None:
    info = _dense_head(tmp_path / "m.onnx", gradients="full")
    assert info.gradient_macs >= 800 * 20
    assert info.methods == tuple(name for name, row in METHODS.items() if EVIDENCE.keys().isdisjoint(row.reads))
    assert info.outputs["gradients"] == ("batch", "targets", 8, 10, 10)


def test_facts_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "dogs.onnx"
    result = fastcam.export(small_classifier().to_model(), path, classes=list("abcde"), preprocess="imagenet")
    info = fastcam.inspect(path)
    assert info.path == path
    assert info.bytes == result.bytes == path.stat().st_size
    assert info.inputs == {"image": ("batch", 3, 12, 12)}
    assert info.outputs["weights"][:2] == ("batch", "targets")
    assert (info.classes, info.class_count) == (tuple("abcde"), 5)
    assert info.preprocessing == fastcam.Preprocessing.of("imagenet")
    assert tuple(info.layers) == result.layers
    assert info.candidates == result.candidates
    assert info.framework == "onnx"
    assert info.opset == onnx.load(path).opset_import[0].version


def test_providers_say_what_runs_here(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx")
    providers = fastcam.inspect(tmp_path / "m.onnx").providers
    assert set(providers) == {*onnxruntime.get_available_providers()} - {"AzureExecutionProvider"}
    assert providers["CPUExecutionProvider"] is None


def test_external_data_are_counted(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx")
    whole = fastcam.inspect(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="outside.data", size_threshold=256)
    info = fastcam.inspect(tmp_path / "outside.onnx")
    assert info.bytes == sum((tmp_path / name).stat().st_size for name in ("outside.onnx", "outside.data"))
    assert (info.parameters, info.macs) == (whole.parameters, whole.macs)


def test_json_holds_everything(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx", preprocess="scale")
    info = fastcam.inspect(tmp_path / "m.onnx")
    told = json.loads(json.dumps(info.to_json()))
    assert told["macs"] == info.macs
    assert told["layers"] == {name: list(sides) for name, sides in info.layers.items()}
    assert told["preprocessing"]["order"] == "RGB"
    assert set(told) == set(type(info).__dataclass_fields__)


def test_einsum_counts_each_combination_of_indices(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (8, 3, 3, 3)))
    rows = net.add("Reshape", features, net.constant(np.array([0, 8, 100])))
    mixed = net.add("Einsum", rows, net.weight(8, 6), equation="ncs,cd->nds")
    scores = net.add("MatMul", net.add("Flatten", mixed), net.weight(600, 5))
    fastcam.export(net.build(net.add("Softmax", scores, axis=-1)).to_model(), tmp_path / "m.onnx")
    assert fastcam.inspect(tmp_path / "m.onnx").macs == 8 * 100 * 27 + 8 * 6 * 100 + 600 * 5


def test_what_export_did_not_make_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.onnx").write_bytes(small_classifier().to_model().SerializeToString())
    with pytest.raises(FileFormatError, match=r"run fastcam\.export on it first"):
        fastcam.inspect(tmp_path / "plain.onnx")
    with pytest.raises(ModelError, match="no such file"):
        fastcam.inspect(tmp_path / "gone.onnx")


def test_changed_files_end_in_an_error_or_in_facts(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "good.onnx")
    good = (tmp_path / "good.onnx").read_bytes()
    looked = refused = 0
    for seed in range(150):
        pick = random.Random(seed)
        data = flip_bytes(good, pick)
        if seed % 2:
            model = onnx.load_from_string(good)
            pick.choice(STRUCTURAL)(model, pick)
            data = model.SerializeToString()
        (tmp_path / "changed.onnx").write_bytes(data)
        try:
            fastcam.inspect(tmp_path / "changed.onnx")
            looked += 1
        except fastcam.FastcamError:
            refused += 1
    assert min(looked, refused) > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [
        # Simonyan and Zisserman 2015: 138 M weights; 15.47 G multiply-adds.
        ("VGG16", 15_470_264_320, 138_357_544),
        # Sandler et al. 2018: 300 M multiply-adds, 3.4 M weights. Keras counts 3,504,872 trainable ones, 17,056
        # scales of normalisations among them, which disappear into the convolutions.
        ("MobileNetV2", 300_774_272, 3_504_872 - 17_056),
    ],
)
def test_published_networks_have_their_published_sizes(tmp_path: Path, name: str, macs: int, parameters: int) -> None:
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    fastcam.export(getattr(keras.applications, name)(weights=None), tmp_path / "m.onnx")
    info = fastcam.inspect(tmp_path / "m.onnx")
    assert info.macs == macs
    assert info.parameters == parameters
    assert info.framework == "keras"
    assert info.gradient_macs < 0.01 * macs
