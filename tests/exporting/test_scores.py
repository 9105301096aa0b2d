"""The scores behind probabilities written in many ways, and what the file says about them, against the source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error
from onnx.reference import ReferenceEvaluator

import fastcam
from fastcam.errors import ArgumentError, ModelError
from fastcam.graph import TensorType, from_model

_AXIS = np.array([1], np.int64)
Ending = Callable[[NetworkBuilder, str], str]


def _network(end: Ending, classes: int = 4, shift: float = 0) -> onnx.ModelProto:
    """Three times the scores of a dense layer, minus a number, and whatever follows them."""
    net = NetworkBuilder(("batch", 3, 6, 6))
    layer = net.add("Relu", net.conv(net.input, (6, 3, 3, 3)), name="layer")
    scores = net.dense(net.add("Flatten", net.add("GlobalAveragePool", layer)), (6, classes), name="scores")
    return net.build(
        end(net, net.add("Sub", net.add("Mul", scores, _constant(net, 3)), _constant(net, shift)))
    ).to_model()


def _constant(net: NetworkBuilder, value: Any) -> str:
    return net.constant(np.asarray(value, np.float32))


def _softmax(net: NetworkBuilder, z: str) -> str:
    return net.add("Softmax", z, axis=-1)


def _sigmoid(net: NetworkBuilder, z: str) -> str:
    return net.add("Sigmoid", z)


def _written_out(net: NetworkBuilder, z: str, *, shifted: bool = True, reciprocal: bool = False) -> str:
    if shifted:
        z = net.add("Sub", z, net.add("ReduceMax", z, net.constant(_AXIS), keepdims=1))
    exponential = net.add("Exp", z)
    total = net.add("ReduceSum", exponential, net.constant(_AXIS), keepdims=1)
    if reciprocal:
        return net.add("Mul", net.add("Reciprocal", total), exponential)
    return net.add("Div", exponential, total)


def _log_written_out(net: NetworkBuilder, z: str) -> str:
    total = net.add("ReduceSum", net.add("Exp", z), net.constant(_AXIS), keepdims=1)
    return net.add("Sub", z, net.add("Log", total))


def _sigmoid_written_out(net: NetworkBuilder, z: str) -> str:
    return net.add("Div", _constant(net, 1), net.add("Add", net.add("Exp", net.add("Neg", z)), _constant(net, 1)))


def _selected(net: NetworkBuilder, value: str, *indices: int) -> str:
    return net.add("Gather", value, net.constant(np.array(indices)), axis=1)


def _sliced(net: NetworkBuilder, value: str, start: int, end: int) -> str:
    return net.add("Slice", value, *(net.constant(np.array([number])) for number in (start, end, 1)))


# Endings that are one function of the scores per class, or a softmax; what the file should call it; what the network's
# output is times the shown probability.
_ENDINGS: dict[str, tuple[Ending, str, float]] = {
    "softmax": (_softmax, "softmax", 1),
    "written out": (_written_out, "softmax", 1),
    "written out without shift": (lambda net, z: _written_out(net, z, shifted=False), "softmax", 1),
    "written out by a reciprocal": (lambda net, z: _written_out(net, z, reciprocal=True), "softmax", 1),
    "clipped": (lambda net, z: net.add("Clip", _softmax(net, z), _constant(net, 1e-7)), "softmax", 1),
    "bounded": (lambda net, z: net.add("Max", _softmax(net, z), _constant(net, 1e-7)), "softmax", 1),
    "times 100": (lambda net, z: net.add("Mul", _softmax(net, z), _constant(net, 100)), "softmax", 100),
    "over 0.01": (lambda net, z: net.add("Div", _softmax(net, z), _constant(net, 0.01)), "softmax", 100),
    "written out, times 100": (
        lambda net, z: net.add("Mul", _constant(net, 100), _written_out(net, z)),
        "softmax",
        100,
    ),
    "exp of LogSoftmax": (lambda net, z: net.add("Exp", net.add("LogSoftmax", z, axis=1)), "softmax", 1),
    "exp of a written-out log": (lambda net, z: net.add("Exp", _log_written_out(net, z)), "softmax", 1),
    "reordered": (lambda net, z: _selected(net, _softmax(net, z), 2, 0, 3, 1), "softmax", 1),
    "sigmoid": (_sigmoid, "sigmoid", 1),
    "sigmoid written out": (_sigmoid_written_out, "sigmoid", 1),
    "clipped sigmoid": (lambda net, z: net.add("Clip", _sigmoid(net, z), _constant(net, 0.01)), "sigmoid", 1),
    "some sigmoids": (lambda net, z: _selected(net, _sigmoid(net, z), 3, 1), "sigmoid", 1),
    "a slice of sigmoids": (lambda net, z: _sliced(net, _sigmoid(net, z), 1, 3), "sigmoid", 1),
    "sigmoids concatenated": (
        lambda net, z: net.add(
            "Concat", _sigmoid(net, _sliced(net, z, 2, 4)), _sigmoid(net, _sliced(net, z, 0, 2)), axis=1
        ),
        "sigmoid",
        1,
    ),
    "one minus sigmoids": (lambda net, z: net.add("Sub", _constant(net, 1), _sigmoid(net, z)), "sigmoid", 1),
}


def _images(count: int = 3) -> Array:
    return np.random.default_rng(5).normal(size=(count, 3, 6, 6)).astype(np.float32)


def _source(model: onnx.ModelProto, images: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def _slopes(model: onnx.ModelProto, image: Array, of: Callable[[Array], Array]) -> Array:
    """Return the mean over the map of d of(outputs) / d layer of the source, by float64 differences: (classes, C)."""
    graph = from_model(model)
    graph.constants = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in graph.constants.items()
    }
    graph.inputs = {name: TensorType(np.dtype(np.float64), type_.shape) for name, type_ in graph.inputs.items()}
    graph.types = {}
    graph.replace_uses("layer", "moved")
    graph.inputs["delta"] = TensorType(np.dtype(np.float64), (1, 6, 1, 1))
    layer = graph.producer("layer")
    assert layer is not None
    graph.insert_after(layer, onnx.helper.make_node("Add", ["layer", "delta"], ["moved"]))
    evaluator = ReferenceEvaluator(graph.to_model())
    columns = []
    for channel in range(6):
        delta = np.zeros((1, 6, 1, 1))
        delta[0, channel] = 1e-5
        (up,), (down,) = (
            evaluator.run(None, {"image": image.astype(np.float64), "delta": sign * delta}) for sign in (1, -1)
        )
        columns.append((of(np.asarray(up)) - of(np.asarray(down)))[0] / 2e-5 / 16)
    return np.stack(columns, axis=-1)


def _weights(path: Path, image: Array, count: int) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    targets = np.arange(count, dtype=np.int64)[None]
    return np.asarray(session.run(["weights"], {"image": image, "target": targets})[0][0])


@pytest.mark.parametrize("name", _ENDINGS)
def test_the_scores_behind_the_probabilities(name: str, tmp_path: Path) -> None:
    """Probabilities and the gradients of the scores, both taken from the source network's outputs.

    The logit of a sigmoid is log(p / (1 - p)). That of a softmax is log p except for a number that all classes share:
    the differences of the classes' gradients are compared.
    """
    end, activation, scale = _ENDINGS[name]
    model = _network(end)
    result = fastcam.export(model, tmp_path / "net.onnx")
    explainer = fastcam.Explainer(result.path)
    found = explainer(_images())
    assert found.score_activation == activation
    assert not result.notes
    assert found.probabilities is not None
    # The bounds of the clipped endings are met by none of the images but those of the sigmoid at 0.01.
    expected = _source(model, _images()) / scale
    np.testing.assert_allclose(
        found.probabilities.clip(0.01 if "clipped sigmoid" in name else 0), expected, rtol=2e-5, atol=1e-7
    )
    image = _images(1)
    found_weights = _weights(result.path, image, expected.shape[1])
    if activation == "sigmoid":
        slopes = _slopes(model, image, lambda p: np.log(p / scale / (1 - p / scale)))
    else:
        slopes = _slopes(model, image, lambda p: np.log(p / scale))
        slopes, found_weights = slopes - slopes[:1], found_weights - found_weights[:1]
    # Differences of logarithms of probabilities near 1e-3 lose about as many digits.
    assert relative_error(found_weights, slopes) < 1e-4


def test_a_gradient_is_that_of_the_score_and_not_of_the_probability(tmp_path: Path) -> None:
    """The scores are z - max z before an expanded softmax: their gradient would be 0 for the top class."""
    plain, written = tmp_path / "plain.onnx", tmp_path / "written.onnx"
    fastcam.export(_network(_softmax), plain)
    fastcam.export(_network(_written_out), written)
    np.testing.assert_array_equal(_weights(plain, _images(1), 4), _weights(written, _images(1), 4))


def _mean_of_two(net: NetworkBuilder, z: str) -> str:
    other = net.add("Mul", z, _constant(net, [[-0.5, 0.3, 1, 2]]))
    return net.add("Mul", net.add("Add", _softmax(net, z), _softmax(net, other)), _constant(net, 0.5))


def _two_groups(net: NetworkBuilder, z: str) -> str:
    return net.add("Concat", _softmax(net, _sliced(net, z, 0, 2)), _softmax(net, _sliced(net, z, 2, 4)), axis=1)


def _squares(net: NetworkBuilder, z: str) -> str:
    squares = net.add("Mul", z, z)
    return net.add("Div", squares, net.add("ReduceSum", squares, net.constant(_AXIS), keepdims=1))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (_mean_of_two, "probabilities of several branches"),
        (_two_groups, "probabilities of several branches"),
        (_squares, "look like probabilities"),
    ],
)
def test_other_probabilities_are_shown_as_they_are(end: Ending, words: str, tmp_path: Path) -> None:
    model = _network(end)
    result = fastcam.export(model, tmp_path / "net.onnx")
    found = fastcam.Explainer(result.path)(_images())
    assert found.score_activation == "probabilities"
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, _source(model, _images()), rtol=1e-5, atol=1e-7)
    (note,) = result.notes
    assert note.kind == "scores"
    assert words in note
    slopes = _slopes(model, _images(1), lambda p: p)
    assert relative_error(_weights(result.path, _images(1), 4), slopes) < 1e-4


def test_without_a_runtime_the_reference_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    result = fastcam.export(_network(_squares), tmp_path / "net.onnx")
    assert "look like probabilities" in result.notes[0]


def test_some_classes_of_a_softmax_have_no_probability(tmp_path: Path) -> None:
    model = _network(lambda net, z: _selected(net, _softmax(net, z), 3, 1))
    result = fastcam.export(model, tmp_path / "net.onnx")
    found = fastcam.Explainer(result.path)(_images())
    assert (found.score_activation, found.probabilities) == ("none", None)
    assert "some of the classes of a softmax" in result.notes[0]
    difference = np.subtract(*_weights(result.path, _images(1), 2))
    slopes = _slopes(model, _images(1), np.log)
    assert relative_error(difference, slopes[0] - slopes[1]) < 1e-4


def test_raw_scores_have_no_probability_until_somebody_says_which(tmp_path: Path) -> None:
    model = _network(lambda net, z: net.dense(z, (4, 3)))
    scores = _source(model, _images())
    result = fastcam.export(model, tmp_path / "raw.onnx")
    found = fastcam.Explainer(result.path)(_images())
    assert (found.score_activation, found.probabilities, found[0].probabilities) == ("none", None, None)
    assert found[0].describe() == f"{found.labels[0][0]} {scores[0].max():.3g}"
    np.testing.assert_allclose(found.logits, scores, rtol=1e-5)
    (note,) = result.notes
    assert note.kind == "scores"
    assert 'score_activation="softmax"' in note
    exponentials = np.exp(scores)
    wanted = {
        "softmax": exponentials / exponentials.sum(axis=1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-scores)),
        "probabilities": scores,
    }
    for activation, expected in wanted.items():
        said = fastcam.export(model, tmp_path / "said.onnx", score_activation=activation)
        assert said.notes == ()
        probabilities = fastcam.Explainer(said.path)(_images()).probabilities
        assert probabilities is not None
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    assert fastcam.export(model, tmp_path / "said.onnx", score_activation="none").notes == ()


_BINARY: dict[str, Ending] = {
    "one sigmoid": _sigmoid,
    "one sigmoid, clipped": lambda net, z: net.add("Clip", _sigmoid(net, z), _constant(net, 1e-6)),
    "squeezed": lambda net, z: net.add("Squeeze", _sigmoid(net, z), net.constant(_AXIS)),
    "1 - p and p": lambda net, z: net.add(
        "Concat", net.add("Sub", _constant(net, 1), _sigmoid(net, z)), _sigmoid(net, z), axis=1
    ),
    "said": lambda net, z: net.add("Identity", z),
}


@pytest.mark.parametrize("name", _BINARY)
def test_a_binary_score_explains_both_classes(name: str, tmp_path: Path) -> None:
    """P(class 1) = p and P(class 0) = 1 - p; the gradients are those of the log odds, and their negatives."""
    raw = _network(lambda net, z: net.add("Identity", z), classes=1)
    shift = float(np.median(_source(raw, _images())))
    raw = _network(lambda net, z: net.add("Identity", z), 1, shift + 0.01)
    model = _network(_BINARY[name], 1, shift + 0.01)
    options: dict[str, Any] = {"score_activation": "sigmoid"} if name == "said" else {}
    result = fastcam.export(model, tmp_path / "net.onnx", classes=["cat", "dog"], **options)
    assert (result.class_count, result.classes, result.notes) == (2, ("cat", "dog"), ())
    found = fastcam.Explainer(result.path)(_images(), size="layer", normalize=None)
    z = _source(raw, _images())[:, 0]
    assert {*np.sign(z)} == {-1, 1}
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, np.column_stack([1 - p, p]), rtol=1e-5)
    assert found.targets[:, 0].tolist() == (z > 0).astype(int).tolist()
    assert [row[0] for row in found.labels] == ["dog" if score > 0 else "cat" for score in z]
    slope = _slopes(raw, _images(1), lambda z: z)[0]
    assert relative_error(_weights(result.path, _images(1), 2), np.stack([-slope, slope])) < 1e-5


def _softmax_of_one(chosen: int, net: NetworkBuilder, logits: str) -> str:
    return _sliced(net, _softmax(net, logits), chosen, chosen + 1)


def test_one_of_two_classes_of_a_softmax_is_binary(tmp_path: Path) -> None:
    """p = sigmoid(z1 - z0)."""
    for chosen in (0, 1):
        model = _network(functools.partial(_softmax_of_one, chosen), classes=2)
        result = fastcam.export(model, tmp_path / "net.onnx")
        found = fastcam.Explainer(result.path)(_images()).probabilities
        p = _source(model, _images())[:, 0]
        assert found is not None
        np.testing.assert_allclose(found, np.column_stack([1 - p, p]), rtol=1e-5)
        slope = _slopes(model, _images(1), lambda p: np.log(p / (1 - p)))[0]
        assert relative_error(_weights(result.path, _images(1), 2), np.stack([-slope, slope])) < 1e-4


def test_the_mean_of_two_binary_networks_explains_both_classes(tmp_path: Path) -> None:
    def mean(net: NetworkBuilder, z: str) -> str:
        return net.add("Mean", _sigmoid(net, z), _sigmoid(net, net.add("Mul", z, _constant(net, -0.2))))

    model = _network(mean, classes=1)
    result = fastcam.export(model, tmp_path / "net.onnx")
    p = _source(model, _images())[:, 0]
    found = fastcam.Explainer(result.path)(_images()).probabilities
    assert found is not None
    np.testing.assert_allclose(found, np.column_stack([1 - p, p]), rtol=1e-5)
    slope = _slopes(model, _images(1), lambda p: p)[0]
    assert relative_error(_weights(result.path, _images(1), 2), np.stack([-slope, slope])) < 1e-4


def test_one_raw_score_has_no_percentage(tmp_path: Path) -> None:
    model = _network(lambda net, z: net.dense(z, (1, 1)), classes=1)
    result = fastcam.export(model, tmp_path / "net.onnx")
    assert result.class_count == 1
    (note,) = result.notes
    assert 'score_activation="sigmoid"' in note
    assert fastcam.Explainer(result.path)(_images()).probabilities is None
    guessed = fastcam.export(model, tmp_path / "net.onnx", classes=["cat", "dog"])
    assert (guessed.class_count, guessed.classes) == (2, ("cat", "dog"))
    assert "This is a guess" in guessed.notes[0]


def test_the_softmax_of_one_score_says_nothing(tmp_path: Path) -> None:
    result = fastcam.export(_network(_softmax, classes=1), tmp_path / "net.onnx")
    assert "always 1" in result.notes[0]
    assert fastcam.Explainer(result.path)(_images()).probabilities is None


def test_one_name_names_class_1(tmp_path: Path) -> None:
    result = fastcam.export(_network(_sigmoid, classes=1), tmp_path / "net.onnx", classes=["dog"])
    assert result.classes == ("not dog", "dog")
    with pytest.raises(ArgumentError, match="3 class names for a model of 1 classes; a binary classifier"):
        fastcam.export(_network(_sigmoid, classes=1), tmp_path / "net.onnx", classes=["a", "b", "c"])


@pytest.mark.parametrize(
    ("end", "wanted", "message"),
    [
        (_softmax, "sigmoid", "the model ends in a softmax, which was found"),
        (_sigmoid, "softmax", "the model ends in a sigmoid, which was found"),
        (_softmax, "tanh", "choose one of 'softmax', 'sigmoid', 'none', 'probabilities'"),
        (lambda net, z: _selected(net, _softmax(net, z), 1, 2), "softmax", "some of the classes"),
        (lambda net, z: net.dense(z, (4, 1)), "softmax", "one score, whose softmax is always 1"),
    ],
)
def test_an_activation_that_contradicts_the_network_is_refused(
    end: Ending, wanted: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        fastcam.export(_network(end), tmp_path / "net.onnx", score_activation=wanted)
    assert not list(tmp_path.iterdir())


def test_no_percentages_on_request(tmp_path: Path) -> None:
    result = fastcam.export(_network(_softmax), tmp_path / "net.onnx", score_activation="none")
    assert fastcam.Explainer(result.path)(_images()).probabilities is None


def test_a_scale_per_class_is_part_of_the_scores(tmp_path: Path) -> None:
    """It changes the order of the classes, so the softmax before it does not decide."""
    model = _network(lambda net, z: net.add("Mul", _softmax(net, z), _constant(net, [[1, 2, 3, 4]])))
    result = fastcam.export(model, tmp_path / "net.onnx")
    found = fastcam.Explainer(result.path)(_images())
    np.testing.assert_allclose(found.logits, _source(model, _images()), rtol=1e-5)
    assert found.probabilities is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([0, 4, 3, 3], 'For a segmentation network.* score="segmentation"'),
        ([0, 6, 6], 'For a detector.* score="boxes"'),
    ],
)
def test_what_is_not_a_classifier_is_told_so(shape: list[int], message: str, tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    layer = net.add("Relu", net.conv(net.input, (4, 3, 4, 4)))
    model = net.build(net.add("Reshape", layer, net.constant(np.array(shape)))).to_model()
    with pytest.raises(ModelError, match=message):
        fastcam.export(model, tmp_path / "net.onnx")


def test_class_names_are_counted_before_a_long_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the conversion was started")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(ArgumentError, match="2 class names for a model of 4 classes"):
        fastcam.export(module, tmp_path / "net.onnx", example_input=torch.zeros(1, 3, 6, 6), classes=["a", "b"])
