"""The table of preprocessing: against the published formulas."""

from __future__ import annotations

import numpy as np
import pytest
from networks import Array

from fastcam.errors import ArgumentError
from fastcam.preprocessing import FAMILIES, KNOWN, Landmark, Preprocessing, find_families, find_family

_PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.float64)

# Written from the publications: keras.applications.imagenet_utils, torchvision, and OpenAI's CLIP.
_FORMULAS = {
    "caffe": lambda x: x[..., ::-1] - [103.939, 116.779, 123.68],
    "torch": lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
    "tf": lambda x: x / 127.5 - 1,
    "clip": lambda x: (x / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711],
    "scale": lambda x: x / 255,
    "none": lambda x: x,
}
_ALIASES = {"caffe": "vgg16", "torch": "imagenet", "tf": "symmetric"}


def _applied(preprocessing: Preprocessing) -> Array:
    ordered = _PIXELS[..., ::-1] if preprocessing.order == "BGR" else _PIXELS
    return np.asarray((ordered - preprocessing.mean) * preprocessing.scale)


@pytest.mark.parametrize("name", _FORMULAS)
def test_each_name_is_its_published_formula(name: str) -> None:
    found = Preprocessing.of(name)
    np.testing.assert_allclose(_applied(found), _FORMULAS[name](_PIXELS), rtol=1e-12, atol=1e-12)
    assert found.name == _ALIASES.get(name, name)
    assert Preprocessing.of(_ALIASES.get(name, name)) == found
    assert Preprocessing.from_json(found.to_json()) == found


def test_every_name_is_tested() -> None:
    assert set(KNOWN) == {_ALIASES.get(name, name) for name in _FORMULAS}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"'vgg16', .*'none', 'caffe', 'tf', 'torch'"):
        Preprocessing.of("vgg")


_VGG = {
    "block1_conv1": (64, 64, 64),
    "block2_conv2": (32, 32, 128),
    "block3_conv3": (16, 16, 256),
    "block5_conv3": (4, 4, 512),
}


def test_a_network_is_recognised_by_all_its_landmarks() -> None:
    assert [(stem, family.title) for stem, family in find_families(_VGG, (64, 64))] == [
        ("block1_conv1", "VGG16 and VGG19")
    ]
    nested = {f"body/vgg16/{layer}": size for layer, size in _VGG.items()}
    assert [stem for stem, _ in find_families(nested, (64, 64))] == ["body/vgg16/block1_conv1"]


@pytest.mark.parametrize("layer", _VGG)
def test_a_network_with_a_few_names_of_a_family_is_not_of_it(layer: str) -> None:
    """Only the names, other widths, or other strides are not enough."""
    height, width, channels = _VGG[layer]
    for other in (
        None,
        (height, width, channels // 2),
        (height // 2 - 2, width, channels),
        (height * 2 + 2, width, channels),
    ):
        changed = {**_VGG, layer: other} if other else {name: _VGG[name] for name in _VGG if name != layer}
        assert not list(find_families(changed, (64, 64)))


def test_no_two_families_have_the_same_landmarks() -> None:
    def maps(landmarks: tuple[Landmark, ...]) -> dict[str, tuple[int, int, int]]:
        return {mark.layer: (256 // mark.stride, 256 // mark.stride, mark.channels or 7) for mark in landmarks}

    for family in FAMILIES:
        if family.landmarks:
            assert [found for _, found in find_families(maps(family.landmarks), (256, 256))] == [family]


def test_every_network_of_keras_applications_has_a_family() -> None:
    """The mode that its own ``preprocess_input`` applies, read from its effect on one pixel."""
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    applications = keras.applications
    names = [name for name in dir(applications) if name[0].isupper() and callable(getattr(applications, name))]
    assert len(names) > 30
    modules = {
        name: module
        for module in vars(applications).values()
        for name in names
        if hasattr(module, "preprocess_input") and getattr(module, name, None) is getattr(applications, name)
    }
    # This one's module is not that of its name.
    modules |= dict.fromkeys(["MobileNetV3Small", "MobileNetV3Large"], applications.mobilenet_v3)
    assert set(names) == set(modules)
    for name, module in modules.items():
        family = find_family(name)
        assert family is not None, name
        expected = module.preprocess_input(_PIXELS.copy(), data_format="channels_last")
        np.testing.assert_allclose(_applied(Preprocessing.of(family.preprocessing)), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
def test_every_network_of_keras_applications_is_recognised() -> None:
    """By its landmarks, if the arithmetic is not in the network."""
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    for name in dir(keras.applications):
        family = find_family(name) if name[0].isupper() else None
        if family is None or not family.landmarks:
            continue
        network = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(224, 224, 3))
        maps = {layer.name: tuple(layer.output.shape[1:]) for layer in network.layers if len(layer.output.shape) == 4}
        assert [found for _, found in find_families(maps, (224, 224))] == [family], name
