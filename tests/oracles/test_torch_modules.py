"""torch modules in the style of the usual families, against torch's own autograd and captum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, relative_error

import fastcam
from fastcam.errors import ArgumentError, LayerError, MissingExtraError, ModelError

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastcam[torch]")
nn, functional = torch.nn, torch.nn.functional

_SIDE, _CLASSES, _TARGETS = 32, 5, [0, 3]
_BOUND = 1e-4


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> Any:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class _Residual(nn.Module):  # type: ignore[misc,name-defined]  # torch's classes are unknown here
    """ResNet's basic block: one ReLU module, called twice, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + x)


class _Dense(nn.Module):  # type: ignore[misc,name-defined]
    """DenseNet's layer: what it makes is joined to what it read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, x: Any) -> Any:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], 1)


class _Gate(nn.Module):  # type: ignore[misc,name-defined]
    """Squeeze and excitation."""

    def __init__(self, channels: int, act: Any) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), act()

    def forward(self, x: Any) -> Any:
        gate = functional.adaptive_avg_pool2d(x, 1)
        return x * self.act(self.up(functional.relu(self.down(gate))))


class _ConvNext(nn.Module):  # type: ignore[misc,name-defined]
    """Depthwise convolution, then a dense block with the channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 16), nn.GELU(), nn.Linear(16, channels))
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Any) -> Any:
        y = self.gamma * self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class _Branches(nn.Module):  # type: ignore[misc,name-defined]
    """Inception's module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.three = _conv(channels, 4, 1), _conv(channels, 4, 3)
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(channels, 4, 1))

    def forward(self, x: Any) -> Any:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class _Shuffled(nn.Module):  # type: ignore[misc,name-defined]
    """ShuffleNet's unit: half of the channels goes through, then both are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _conv(channels // 2, channels // 2)

    def forward(self, x: Any) -> Any:
        left, right = x.chunk(2, dim=1)
        joined = torch.stack([left, self.branch(right)], dim=2)
        return joined.view(x.size(0), -1, *x.shape[2:])


class _Classifier(nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self, features: Any, channels: int) -> None:
        super().__init__()
        self.features = features
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5), nn.Linear(channels, _CLASSES)

    def forward(self, x: Any) -> Any:
        return self.fc(self.drop(torch.flatten(self.pool(self.features(x)), 1)))


class _Vgg(nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, _CLASSES))

    def forward(self, x: Any) -> Any:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _stacked(*blocks: Any, channels: int = 8) -> Any:
    return _Classifier(nn.Sequential(_conv(3, 8, stride=2), *blocks), channels)


# What makes the network, its last layer with a map, and one in the middle.
_NETWORKS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "ResNet": (lambda: _stacked(_Residual(8), _Residual(8)), "features.2", "features.1.bn1"),
    "DenseNet": (lambda: _stacked(_Dense(8), _Dense(12), channels=16), "features.2", "features.1"),
    "MobileNetV3": (
        lambda: _stacked(_conv(8, 8, groups=8, act=nn.Hardswish), _Gate(8, nn.Hardsigmoid), _conv(8, 8, 1)),
        "features.3.2",
        "features.2",
    ),
    "EfficientNet": (
        lambda: _stacked(_conv(8, 8, groups=8, act=nn.SiLU), _Gate(8, nn.Sigmoid), _conv(8, 8, 1, act=nn.SiLU)),
        "features.3.2",
        "features.1.2",
    ),
    "ConvNeXt": (lambda: _stacked(_ConvNext(8), _ConvNext(8)), "features.2", "features.1"),
    "Inception": (lambda: _stacked(_Branches(8), _Branches(12), channels=12), "features.2", "features.1.three.2"),
    "RegNet": (
        lambda: _stacked(_conv(8, 8, stride=2, groups=2), _conv(8, 8, groups=4)),
        "features.2.2",
        "features.1.2",
    ),
    "ShuffleNet": (lambda: _stacked(_Shuffled(8), _Shuffled(8)), "features.2.branch.2", "features.1"),
    "VGG": (_Vgg, "features.4", "features.1"),
}


def _module(name: str) -> Any:
    torch.manual_seed(3)
    model = _NETWORKS[name][0]()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            # As after training.
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.8, 1.2)
            nn.init.uniform_(part.bias, -0.1, 0.1)
    return model.eval()


def _images(count: int = 2) -> Array:
    return np.random.default_rng(1).normal(size=(count, 3, _SIDE, _SIDE)).astype(np.float32)


def _autograd(model: Any, layer: str, images: Array) -> tuple[Array, Array]:
    """Grad-CAM before normalisation (N,K,h,w), and the scores."""
    kept: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> Any:
        kept.append(output)
        # A module behind may overwrite it in place.
        return output.clone()

    hook = model.get_submodule(layer).register_forward_hook(keep)
    scores = model(torch.tensor(images))
    hook.remove()
    maps = []
    for target in _TARGETS:
        (gradient,) = torch.autograd.grad(scores[:, target].sum(), kept[-1], retain_graph=True)
        maps.append(functional.relu((gradient.mean((2, 3), keepdim=True) * kept[-1]).sum(1)).detach().numpy())
    return np.stack(maps, axis=1), scores.detach().numpy()


@pytest.mark.parametrize("name", _NETWORKS)
def test_maps_are_those_of_autograd(name: str, tmp_path: Path) -> None:
    model, images = _module(name), _images()
    _, last, middle = _NETWORKS[name]
    example = torch.zeros(1, 3, _SIDE, _SIDE)
    assert fastcam.export(model, tmp_path / "last.onnx", example_input=example).layer == last
    fastcam.export(model, tmp_path / "middle.onnx", layer=middle, example_input=example)
    for file, layer in (("last", last), ("middle", middle)):
        found = fastcam.Explainer(tmp_path / f"{file}.onnx")(images, _TARGETS, size="layer", normalize=None)
        expected, scores = _autograd(model, layer, images)
        assert relative_error(found.logits, scores) < _BOUND
        assert np.abs(expected).max() > 0
        assert relative_error(found.maps, expected) < _BOUND
    exported = onnx.load(tmp_path / "last.onnx")
    assert not {"BatchNormalization", "Identity", "Cast", "Dropout"} & {
        node.op_type for node in exported.graph.node
    } or (name == "DenseNet")
    # The exporter notes paths of the source code.
    assert not any(node.metadata_props or node.doc_string for node in exported.graph.node)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("name", _NETWORKS)
@pytest.mark.filterwarnings("ignore")
def test_files_of_the_older_exporter_explain_the_same(name: str, opset: int, tmp_path: Path) -> None:
    """As most users have them: traced with one image, which fixes the batch in every shape."""
    model, images = _module(name), _images()
    example = (torch.zeros(1, 3, _SIDE, _SIDE),)
    torch.onnx.export(model, example, tmp_path / "file.onnx", dynamo=False, opset_version=opset)
    result = fastcam.export(tmp_path / "file.onnx", tmp_path / "explained.onnx")
    assert result.input_shape == ("batch", 3, _SIDE, _SIDE)
    found = fastcam.Explainer(tmp_path / "explained.onnx")(images, _TARGETS, size="layer", normalize=None)
    expected, scores = _autograd(model, _NETWORKS[name][1], images)
    assert relative_error(found.logits, scores) < _BOUND
    assert relative_error(found.maps, expected) < _BOUND


def test_maps_are_those_of_captum(tmp_path: Path) -> None:
    captum = pytest.importorskip("captum.attr", reason="needs captum: pip install captum")
    model, images = _module("ResNet"), _images()
    fastcam.export(model, tmp_path / "model.onnx", example_input=torch.zeros(2, 3, _SIDE, _SIDE))
    found = fastcam.Explainer(tmp_path / "model.onnx")(images, 3, size="layer", normalize=None)
    explained = captum.LayerGradCam(model, model.features[2])
    expected = explained.attribute(torch.tensor(images), target=3, relu_attributions=True)
    assert relative_error(found.maps, expected.detach().numpy()) < _BOUND


def test_a_module_is_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = _module("ResNet").train()
    model.features[1].eval()
    model.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [part.training for part in model.modules()]
    fastcam.export(model, tmp_path / "model.onnx", example_input=torch.ones(1, 3, _SIDE, _SIDE))
    assert [part.training for part in model.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.fc.weight.requires_grad
    assert model.features[0][0].weight.requires_grad
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    # Exported as at inference, whatever the module was at.
    found = fastcam.Explainer(tmp_path / "model.onnx")(_images())
    assert relative_error(found.logits, _autograd(model.eval(), "features.1", _images())[1]) < _BOUND


def test_calls_of_one_module_are_told_apart(tmp_path: Path) -> None:
    model, example = _module("ResNet"), torch.zeros(1, 3, _SIDE, _SIDE)
    with pytest.raises(LayerError, match=r"'features\.1\.relu@1'"):
        fastcam.export(model, tmp_path / "model.onnx", layer="features.1.relu", example_input=example)
    fastcam.export(model, tmp_path / "first.onnx", layer="features.2.relu@1", example_input=example)
    (maps,) = (fastcam.Explainer(tmp_path / "first.onnx")(_images(), 0, size="layer", normalize=None).maps,)
    assert np.abs(maps).max() > 0
    for layer in ("features.2.relu@2", "features.2", "features"):
        fastcam.export(model, tmp_path / "last.onnx", layer=layer, example_input=example)
        found = fastcam.Explainer(tmp_path / "last.onnx")(_images(), _TARGETS, size="layer", normalize=None)
        assert relative_error(found.maps, _autograd(model, "features.2", _images())[0]) < _BOUND


class _TwoHeads(nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.base, self.breed, self.colour = _stacked(), nn.Linear(_CLASSES, 4), nn.Linear(_CLASSES, 3)

    def forward(self, x: Any) -> Any:
        y = functional.relu(self.base(x))
        return {"breed": self.breed(y), "colour": self.colour(y)}


def test_one_of_several_outputs_is_explained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = _TwoHeads().eval(), torch.zeros(1, 3, _SIDE, _SIDE)
    with pytest.raises(ModelError, match="2 outputs, 'breed', 'colour'"):
        fastcam.export(model, tmp_path / "model.onnx", example_input=example)
    for output, classes in (("breed", 4), ("colour", 3)):
        assert fastcam.export(model, tmp_path / "m.onnx", output=output, example_input=example).class_count == classes
        found = fastcam.Explainer(tmp_path / "m.onnx")(_images())
        assert relative_error(found.logits, model(torch.tensor(_images()))[output].detach().numpy()) < _BOUND


def test_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    model = _module("VGG").half()
    result = fastcam.export(model, tmp_path / "half.onnx", example_input=torch.zeros(1, 3, _SIDE, _SIDE))
    assert any("float32" in note for note in result.notes)
    found = fastcam.Explainer(tmp_path / "half.onnx")(_images())
    assert relative_error(found.logits, model.float()(torch.tensor(_images())).detach().numpy()) < _BOUND


class _Undecided(nn.Module):  # type: ignore[misc,name-defined]
    def forward(self, x: Any) -> Any:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (_Vgg, None, ArgumentError, r"example_input=torch\.zeros"),
        (_Vgg, "dog.jpg", ArgumentError, "example_input is a str"),
        (_Vgg, torch.zeros(3, 32, 32), ArgumentError, r"of shape \(3, 32, 32\): give a batch"),
        (_Vgg, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ArgumentError, "uint8"),
        (_Vgg, torch.zeros(0, 3, 32, 32), ArgumentError, "give a batch"),
        (_Vgg, torch.zeros(1, 1, 32, 32), ModelError, "cannot trace _Vgg"),
        (_Undecided, torch.zeros(1, 3, 32, 32), ModelError, "cannot trace _Undecided.*depends on the values"),
    ],
)
def test_what_cannot_be_traced_says_why(
    model: Callable[[], Any], example: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        fastcam.export(model(), tmp_path / "model.onnx", example_input=example)
    assert not list(tmp_path.iterdir())


def test_two_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"input_size=\(16, 16\) is not the size of example_input, \(32, 32\)"):
        fastcam.export(_Vgg(), tmp_path / "m.onnx", input_size=(16, 16), example_input=torch.zeros(1, 3, 32, 32))


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[torch\]"):
        fastcam.export(_Vgg(), tmp_path / "model.onnx", example_input=torch.zeros(1, 3, 32, 32))


def test_a_module_splits_in_two() -> None:
    model = _module("VGG")
    example = np.zeros((1, 3, _SIDE, _SIDE), np.float32)
    features, head = fastcam.split(model, "features.4", example_input=example)
    sizes = [dim.dim_value for dim in features.graph.output[0].type.tensor_type.shape.dim[1:]]
    assert sizes == [8, 16, 16]
    assert {node.op_type for node in head.graph.node} >= {"MaxPool", "Gemm"}
