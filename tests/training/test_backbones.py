"""The networks of keras.applications: their preprocessing, their blocks, their weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from fastcam.errors import ArgumentError, ModelError
from fastcam.preprocessing import Preprocessing
from fastcam.training.backbones import find_backbone, find_blocks

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[train]")

_NAMES = sorted(name for name in dir(keras.applications) if name[0].isupper())


@pytest.mark.parametrize("name", _NAMES)
def test_photos_go_through_what_keras_sends_them_through(name: str) -> None:
    backbone = find_backbone(keras, name)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3)).astype(np.float32)
    module = sys.modules[getattr(keras.applications, name).__module__]
    expected = module.preprocess_input(pixels.copy(), data_format="channels_last")
    preprocessing = Preprocessing.of(backbone.preprocessing)
    ordered = pixels[..., ::-1] if preprocessing.order == "BGR" else pixels
    found = (ordered - np.array(preprocessing.mean, np.float32)) * np.array(preprocessing.scale, np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


_BUILT = (
    "ConvNeXtTiny DenseNet121 EfficientNetB0 EfficientNetB1 EfficientNetB3 EfficientNetV2B0 EfficientNetV2B2 "
    "EfficientNetV2S InceptionV3 MobileNet MobileNetV2 MobileNetV3Small NASNetMobile ResNet50 ResNet50V2 VGG16 Xception"
).split()
_EVERY_TIME = {"EfficientNetB0", "MobileNetV3Small", "VGG16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in _EVERY_TIME else pytest.mark.nightly) for name in _BUILT],
)
def test_the_side_is_what_keras_takes_where_nothing_is_said(name: str) -> None:
    model = getattr(keras.applications, name)(weights=None)
    expected = model.input_shape[1] or 224  # MobileNetV3 leaves it open, and was trained with 224
    assert find_backbone(keras, name).side == expected
    blocks = find_blocks(find_backbone(keras, name).build(keras, None, expected))
    assert 4 <= len(blocks) <= 9
    assert all(blocks)


@pytest.mark.parametrize("name", ["VGG16", "vgg16", "vgg-16", "VGG_16"])
def test_names_are_found_however_they_are_written(name: str) -> None:
    assert find_backbone(keras, name).name == "VGG16"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"did you mean 'mobilenetv2'.*known are .*Xception"):
        find_backbone(keras, "mobilnetv2")


def _names(blocks: list[list[Any]]) -> list[list[str]]:
    return [[layer.name for layer in block] for block in blocks]


def test_the_blocks_of_vgg16_are_its_own() -> None:
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(64, 64, 3))
    assert _names(find_blocks(network)) == [
        [f"block{block}_conv{conv}" for conv in range(1, 3 if block < 3 else 4)] for block in range(1, 6)
    ]


def test_squeezed_layers_belong_to_the_maps_that_they_weigh() -> None:
    network = keras.applications.MobileNetV3Small(weights=None, include_top=False, input_shape=(96, 96, 3))
    blocks = _names(find_blocks(network))
    squeezes = [name for name in blocks[-1] if "squeeze_excite" in name]
    assert len(squeezes) == 6
    assert sum(len(block) for block in blocks) == sum(bool(layer.weights) for layer in network.layers)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = keras.applications.MobileNet(weights=None, include_top=False, input_shape=(32, 32, 3), alpha=0.25)
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(ModelError, match=r"do not fit VGG16 without its head: .* ends in notop"):
        find_backbone(keras, "vgg16").build(keras, tmp_path / "other.weights.h5", 32)


@pytest.mark.parametrize("content", [None, b"", b"no HDF5"])
def test_weights_that_are_no_weights_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.weights.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"some\.weights\.h5'"):
        find_backbone(keras, "vgg16").build(keras, path, 32)


def test_given_weights_are_the_networks(tmp_path: Path) -> None:
    source = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    source.save_weights(tmp_path / "vgg.weights.h5")
    built = find_backbone(keras, "vgg16").build(keras, tmp_path / "vgg.weights.h5", 48)
    for expected, found in zip(source.get_weights(), built.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(ArgumentError, match="size=16: VGG16 cannot be built"):
        find_backbone(keras, "vgg16").build(keras, None, 16)


def test_without_internet_the_error_says_which_file_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_internet(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", no_internet)
    monkeypatch.setattr("keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path))
    with pytest.raises(ModelError, match=r"Download 'vgg16_weights\S*_notop\.h5' .*pass its path as weights"):
        find_backbone(keras, "vgg16").build(keras, "imagenet", 64)
