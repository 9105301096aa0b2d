"""How pictures become the input: certain if the arithmetic determines it, a noted guess, or unknown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import NetworkBuilder

import fastcam
from fastcam.notes import Note

_MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
_CAFFE = np.array([103.939, 116.779, 123.68], np.float32).reshape(1, 3, 1, 1)


def _export(begin: Callable[[NetworkBuilder, str], str], path: Path, channels: int = 3, **options: Any) -> Any:
    net = NetworkBuilder(("batch", channels, 8, 8))
    begun = begin(net, net.input)
    inner = 3 if channels == 3 else channels
    value = net.add("Relu", net.conv(begun, (4, inner, 3, 3)))
    scores = net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (4, 5))
    return fastcam.export(net.build(net.add("Softmax", scores)).to_model(), path / "net.onnx", **options)


def _do(net: NetworkBuilder, op: str, value: str, array: Any) -> str:
    return net.add(op, value, net.constant(np.asarray(array, np.float32)))


def _normalized(net: NetworkBuilder, value: str, unit: float) -> str:
    return _do(net, "Div", _do(net, "Sub", value, _MEAN * unit), _DEVIATION * unit)


def _reversed(net: NetworkBuilder, value: str) -> str:
    ends = (net.constant(np.array([number])) for number in (-1, -(2**31), 1, -1))
    return net.add("Slice", value, *ends)


def _batch_norm(net: NetworkBuilder, value: str, mean: float, variance: float) -> str:
    arrays = (np.full(3, number, np.float32) for number in (1, 0, mean, variance))
    return net.add("BatchNormalization", value, *map(net.constant, arrays))


def _resized(net: NetworkBuilder, value: str) -> str:
    return net.add("Resize", value, "", "", net.constant(np.array([1, 3, 12, 12])), mode="linear")


_BYTES: dict[str, Callable[[NetworkBuilder, str], str]] = {
    "divided by 255": lambda net, x: _do(net, "Div", x, 255),
    "times 1 / 127.5, minus 1": lambda net, x: _do(net, "Sub", _do(net, "Mul", x, 1 / 127.5), 1),
    "normalised in 0..255": lambda net, x: _normalized(net, x, 255),
    "divided, then normalised": lambda net, x: _normalized(net, _do(net, "Div", x, 255), 1),
    "caffe with its reversal": lambda net, x: _do(net, "Sub", _reversed(net, x), _CAFFE),
    "minus the means of RGB": lambda net, x: _do(net, "Sub", x, _CAFFE[:, ::-1]),
    "padded, then divided": lambda net, x: _do(
        net, "Div", net.add("Pad", x, net.constant(np.array([0, 0, 1, 1] * 2))), 255
    ),
    "divided, then anything": lambda net, x: net.add("Tanh", _do(net, "Div", x, 255)),
    "statistics of bytes": lambda net, x: _batch_norm(net, x, 117.0, 3600.0),
}


@pytest.mark.parametrize("name", _BYTES)
def test_arithmetic_for_bytes_is_certain(name: str, tmp_path: Path) -> None:
    result = _export(_BYTES[name], tmp_path)
    assert result.preprocessing == fastcam.Preprocessing.of("none")
    assert not [note for note in result.notes if note.kind == "preprocessing"]


@pytest.mark.parametrize("reverses", [False, True])
def test_the_means_tell_the_order_of_the_channels(reverses: bool, tmp_path: Path) -> None:
    """Caffe's means are those of blue, green, red."""

    def begin(net: NetworkBuilder, image: str) -> str:
        return _do(net, "Sub", _reversed(net, image) if reverses else image, _CAFFE[:, ::-1] if reverses else _CAFFE)

    assert _export(begin, tmp_path).preprocessing == fastcam.Preprocessing("BGR", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    "begin", [lambda net, x: _normalized(net, x, 1), lambda net, x: _do(net, "Sub", _do(net, "Mul", x, 2), 1)]
)
def test_a_known_normalisation_of_0_to_1_is_a_noted_guess(
    begin: Callable[[NetworkBuilder, str], str], tmp_path: Path
) -> None:
    result = _export(begin, tmp_path)
    assert result.preprocessing == fastcam.Preprocessing.of("scale")
    (note,) = result.notes
    assert note.kind == "preprocessing"
    assert note.startswith("Preprocessing 'scale' is a guess: ")
    assert "override it with preprocess=" in note
    stored = fastcam.inspect(result.path)
    assert stored.notes == (note,)


_UNKNOWN: dict[str, Callable[[NetworkBuilder, str], str]] = {
    "nothing": lambda net, x: net.add("Identity", x),
    "statistics of 0..1": lambda net, x: _batch_norm(net, x, 0.45, 0.06),
    "untrained statistics": lambda net, x: _batch_norm(net, x, 0, 1),
    "resizing": _resized,
    "1x1 convolution": lambda net, x: net.conv(x, (3, 3, 1, 1)),
    "instance normalisation": lambda net, x: net.add(
        "InstanceNormalization", x, net.constant(np.ones(3, np.float32)), net.constant(np.zeros(3, np.float32))
    ),
    "some scale": lambda net, x: _do(net, "Mul", x, 0.8),
    "a channel erased": lambda net, x: _do(net, "Mul", x, np.array([0, 1 / 255, 1 / 255]).reshape(1, 3, 1, 1)),
    "reversal alone": _reversed,
}


@pytest.mark.parametrize("name", _UNKNOWN)
def test_what_does_not_tell_stays_unknown(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    result = _export(_UNKNOWN[name], tmp_path)
    assert result.preprocessing is None
    assert result.notes == ()
    with pytest.raises(fastcam.ImageError, match="export it again with preprocess="):
        fastcam.Explainer(result.path)(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_a_greyscale_network_stays_unknown_unless_it_divides(tmp_path: Path) -> None:
    assert _export(lambda net, x: net.add("Identity", x), tmp_path, channels=1).preprocessing is None
    divided = _export(lambda net, x: _do(net, "Div", x, 255), tmp_path, channels=1)
    assert divided.preprocessing == fastcam.Preprocessing.of("none")


def test_what_the_caller_says_counts_and_needs_no_note(tmp_path: Path) -> None:
    result = _export(lambda net, x: _normalized(net, x, 1), tmp_path, preprocess="symmetric")
    assert (result.preprocessing, result.notes) == (fastcam.Preprocessing.of("symmetric"), ())


def _keras_model(name: str) -> Any:
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    layers = keras.layers

    def head(value: Any) -> Any:
        return layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(value))

    def body(value: Any) -> Any:
        value = layers.MaxPooling2D()(layers.Conv2D(8, 3, activation="relu")(value))
        return head(layers.Conv2D(16, 3, activation="relu", name="last")(value))

    def vgg(value: Any) -> Any:
        return head(keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))(value))

    def named_like_vgg(value: Any) -> Any:
        for block in range(1, 6):
            for number in range(1, 4):
                named = layers.Conv2D(4, 3, padding="same", activation="relu", name=f"block{block}_conv{number}")
                value = named(value)
            value = layers.MaxPooling2D()(value)
        return head(value)

    build, channels = {
        "greyscale": (body, 1),
        "rescaling": (lambda x: body(layers.Rescaling(1 / 255)(x)), 3),
        "greyscale rescaling": (lambda x: body(layers.Rescaling(1 / 255)(x)), 1),
        "batch norm": (lambda x: body(layers.BatchNormalization()(x)), 3),
        "layer norm": (lambda x: body(layers.LayerNormalization()(x)), 3),
        "resizing": (lambda x: body(layers.Resizing(24, 24)(x)), 3),
        "grey to colour": (lambda x: body(layers.Concatenate()([x, x, x])), 1),
        "grey by 1x1": (lambda x: body(layers.Conv2D(3, 1)(x)), 1),
        "vgg": (vgg, 3),
        "own conv, vgg": (lambda x: vgg(layers.Conv2D(3, 3, padding="same")(x)), 3),
        "grey, own conv, vgg": (lambda x: vgg(layers.Conv2D(3, 3, padding="same")(x)), 1),
        "rescaling, vgg": (lambda x: vgg(layers.Rescaling(1 / 255)(x)), 3),
        "named like vgg": (named_like_vgg, 3),
    }[name]
    image = keras.Input((32, 32, channels))
    return keras.Model(image, build(image))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("greyscale", None),
        ("rescaling", "none"),
        ("greyscale rescaling", "none"),
        ("batch norm", None),
        ("layer norm", None),
        ("resizing", None),
        ("grey to colour", None),
        ("grey by 1x1", None),
        ("vgg", "vgg16"),
        ("own conv, vgg", None),
        ("grey, own conv, vgg", None),
        ("rescaling, vgg", "none"),
        ("named like vgg", None),
    ],
)
def test_keras_models(name: str, expected: str | None, tmp_path: Path) -> None:
    result = fastcam.export(_keras_model(name), tmp_path / "net.onnx")
    assert (result.preprocessing and result.preprocessing.name) == expected
    notes: list[Note] = [note for note in result.notes if note.kind == "preprocessing"]
    assert len(notes) == (name == "vgg")
    assert all("keras.applications' VGG16 and VGG19" in note and "preprocess=" in note for note in notes)
