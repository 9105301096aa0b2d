"""torch modules in the style of the usual families, against torch's own autograd and captum."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, relative_error
from torch_families import CLASSES, FAMILIES, SIDE, Vgg, family, images_for, scores_and_activations, stacked

import fastcam
from fastcam.errors import ArgumentError, LayerError, MissingExtraError, ModelError
from fastcam.exporting.importers import torch_exporters

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastcam[torch]")
nn, functional = torch.nn, torch.nn.functional
Module: Any = nn.Module

_TARGETS = [0, 3]
_BOUND = 1e-4


def _autograd(model: Any, layer: str, images: Array) -> tuple[Array, Array]:
    """Grad-CAM before normalisation (N,K,h,w), and the scores."""
    scores, activations = scores_and_activations(model, layer, images)
    maps = []
    for target in _TARGETS:
        (gradient,) = torch.autograd.grad(scores[:, target].sum(), activations, retain_graph=True)
        maps.append(functional.relu((gradient.mean((2, 3), keepdim=True) * activations).sum(1)).detach().numpy())
    return np.stack(maps, axis=1), scores.detach().numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_those_of_autograd(name: str, tmp_path: Path) -> None:
    model, images = family(name), images_for()
    _, last, middle = FAMILIES[name]
    example = torch.zeros(1, 3, SIDE, SIDE)
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
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_files_of_the_older_exporter_explain_the_same(name: str, opset: int, tmp_path: Path) -> None:
    """The common case: traced with one image, which fixes the batch in every shape."""
    model, images = family(name), images_for()
    example = (torch.zeros(1, 3, SIDE, SIDE),)
    torch.onnx.export(model, example, tmp_path / "file.onnx", dynamo=False, opset_version=opset)
    result = fastcam.export(tmp_path / "file.onnx", tmp_path / "explained.onnx")
    assert result.input_shape == ("batch", 3, SIDE, SIDE)
    found = fastcam.Explainer(tmp_path / "explained.onnx")(images, _TARGETS, size="layer", normalize=None)
    expected, scores = _autograd(model, FAMILIES[name][1], images)
    assert relative_error(found.logits, scores) < _BOUND
    assert relative_error(found.maps, expected) < _BOUND


def test_maps_are_those_of_captum(tmp_path: Path) -> None:
    captum = pytest.importorskip("captum.attr", reason="needs captum: pip install captum")
    model, images = family("ResNet"), images_for()
    fastcam.export(model, tmp_path / "model.onnx", example_input=torch.zeros(2, 3, SIDE, SIDE))
    found = fastcam.Explainer(tmp_path / "model.onnx")(images, 3, size="layer", normalize=None)
    explained = captum.LayerGradCam(model, model.features[2])
    expected = explained.attribute(torch.tensor(images), target=3, relu_attributions=True)
    assert relative_error(found.maps, expected.detach().numpy()) < _BOUND


def test_a_module_is_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = family("ResNet").train()
    model.features[1].eval()
    model.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [part.training for part in model.modules()]
    fastcam.export(model, tmp_path / "model.onnx", example_input=torch.ones(1, 3, SIDE, SIDE))
    assert [part.training for part in model.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.fc.weight.requires_grad
    assert model.features[0][0].weight.requires_grad
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    # Exported in inference mode, whatever the module's mode.
    found = fastcam.Explainer(tmp_path / "model.onnx")(images_for())
    assert relative_error(found.logits, _autograd(model.eval(), "features.1", images_for())[1]) < _BOUND


def test_calls_of_one_module_are_told_apart(tmp_path: Path) -> None:
    model, example = family("ResNet"), torch.zeros(1, 3, SIDE, SIDE)
    with pytest.raises(LayerError, match=r"'features\.1\.relu@1'"):
        fastcam.export(model, tmp_path / "model.onnx", layer="features.1.relu", example_input=example)
    fastcam.export(model, tmp_path / "first.onnx", layer="features.2.relu@1", example_input=example)
    (maps,) = (fastcam.Explainer(tmp_path / "first.onnx")(images_for(), 0, size="layer", normalize=None).maps,)
    assert np.abs(maps).max() > 0
    for layer in ("features.2.relu@2", "features.2", "features"):
        fastcam.export(model, tmp_path / "last.onnx", layer=layer, example_input=example)
        found = fastcam.Explainer(tmp_path / "last.onnx")(images_for(), _TARGETS, size="layer", normalize=None)
        assert relative_error(found.maps, _autograd(model, "features.2", images_for())[0]) < _BOUND


class _TwoHeads(Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.breed, self.colour = stacked(), nn.Linear(CLASSES, 4), nn.Linear(CLASSES, 3)

    def forward(self, x: Any) -> Any:
        y = functional.relu(self.base(x))
        return {"breed": self.breed(y), "colour": self.colour(y)}


def test_one_of_several_outputs_is_explained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = _TwoHeads().eval(), torch.zeros(1, 3, SIDE, SIDE)
    with pytest.raises(ModelError, match="2 outputs, 'breed', 'colour'"):
        fastcam.export(model, tmp_path / "model.onnx", example_input=example)
    for output, classes in (("breed", 4), ("colour", 3)):
        assert fastcam.export(model, tmp_path / "m.onnx", output=output, example_input=example).class_count == classes
        found = fastcam.Explainer(tmp_path / "m.onnx")(images_for())
        assert relative_error(found.logits, model(torch.tensor(images_for()))[output].detach().numpy()) < _BOUND


def test_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    model = family("VGG").half()
    result = fastcam.export(model, tmp_path / "half.onnx", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert any("float32" in note for note in result.notes)
    found = fastcam.Explainer(tmp_path / "half.onnx")(images_for())
    assert relative_error(found.logits, model.float()(torch.tensor(images_for())).detach().numpy()) < _BOUND


class _Undecided(Module):
    def forward(self, x: Any) -> Any:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class _Counting(Module):
    """As in inference with one image, whatever it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.conv, self.fc = nn.Parameter(torch.ones(1, 1, 4)), nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        rows = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(torch.cat([self.token.expand(len(rows), -1, -1), rows], 1).relu().mean(1))


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (Vgg, None, ArgumentError, r"example_input=torch\.zeros"),
        (Vgg, "dog.jpg", ArgumentError, "example_input is a str"),
        (Vgg, torch.zeros(3, 32, 32), ArgumentError, r"of shape \(3, 32, 32\): give a batch"),
        (Vgg, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ArgumentError, "uint8"),
        (Vgg, torch.zeros(0, 3, 32, 32), ArgumentError, "give a batch"),
        (
            Vgg,
            torch.zeros(1, 1, 32, 32),
            ModelError,
            r"Vgg cannot run on images of shape .*expected input.* 3 channels",
        ),
        (_Undecided, torch.zeros(1, 3, 32, 32), ModelError, "cannot export _Undecided.*depends on the values"),
        (_Counting, torch.zeros(1, 3, 32, 32), ModelError, r"not from len\(x\)"),
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
        fastcam.export(Vgg(), tmp_path / "m.onnx", input_size=(16, 16), example_input=torch.zeros(1, 3, 32, 32))


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[torch\]"):
        fastcam.export(family("ShuffleNet"), tmp_path / "model.onnx", example_input=torch.zeros(1, 3, 32, 32))


def test_a_module_splits_in_two() -> None:
    model = family("VGG")
    example = np.zeros((1, 3, SIDE, SIDE), np.float32)
    features, head = fastcam.split(model, "features.4", example_input=example)
    sizes = [dim.dim_value for dim in features.graph.output[0].type.tensor_type.shape.dim[1:]]
    assert sizes == [8, 16, 16]
    assert {node.op_type for node in head.graph.node} >= {"MaxPool", "Gemm"}


class _Pooled(Module):
    """A classifier with the given pooling and head."""

    def __init__(self, pool: Callable[[Any], Any], features: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Linear(features, CLASSES)
        self.pool = pool

    def forward(self, x: Any) -> Any:
        return self.fc(self.pool(self.act(self.conv(x))))


_POOLINGS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "squeeze": (lambda x: functional.adaptive_avg_pool2d(x, 1).squeeze(), 8),
    "squeeze of two axes": (lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(2), 8),
    "a size that does not divide": (lambda x: functional.adaptive_avg_pool2d(x, (3, 5)).flatten(1), 8 * 15),
    "the same size along one axis": (lambda x: functional.adaptive_avg_pool2d(x, (None, 1)).flatten(1), 8 * 8),
    "channels-last in memory": (
        lambda x: nn.AdaptiveAvgPool2d(1)(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)).flatten(1),
        8,
    ),
    "the standard deviation of dead maps": (lambda x: (x * (x > 9.5)).std((2, 3)) + x.mean((2, 3)), 8),
    "a soft maximum": (lambda x: torch.logsumexp(x, (2, 3)), 8),
    "a minimum": (lambda x: x.amin((2, 3)) + x.norm(1, (2, 3)), 8),
    "the number of images": (lambda x: x.view(x.shape[0], 8, -1).mean(2), 8),
}


@pytest.mark.parametrize("name", _POOLINGS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_usual_poolings_explain_as_autograd_does(name: str, channels_last: bool, tmp_path: Path) -> None:
    model, images = _Pooled(*_POOLINGS[name]).eval(), images_for()
    wrapped = nn.DataParallel(model) if name == "squeeze" else model
    if channels_last:
        wrapped = wrapped.to(memory_format=torch.channels_last)
    fastcam.export(wrapped, tmp_path / "m.onnx", layer="act", example_input=torch.zeros(1, 3, SIDE, SIDE))
    explainer = fastcam.Explainer(tmp_path / "m.onnx")
    expected, scores = _autograd(model, "act", images)
    for count in (1, len(images)):
        found = explainer(images[:count], _TARGETS, size="layer", normalize=None)
        assert relative_error(found.logits, scores[:count]) < _BOUND
        assert relative_error(found.maps, expected[:count]) < _BOUND


class _Windows(Module):
    """Attention in windows of 2 x 2 pixels, as Swin computes it, with the given number of axes, and a residual."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.qkv, self.act = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.ReLU()
        self.project, self.fc = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.axes = axes

    def forward(self, x: Any) -> Any:
        x = self.act(self.conv(x)).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        windows = x.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(windows).reshape(-1, 4, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        if self.axes == 3:
            q, k, v = (one.flatten(0, 1) for one in (q, k, v))
        if self.axes == 5:
            q, k, v = (one.view(n, -1, *one.shape[1:]) for one in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v).reshape(-1, 2, 4, c // 2)
        mixed = self.project(mixed.transpose(1, 2).reshape(-1, 4, c))
        mixed = mixed.view(-1, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        return self.fc((x + mixed).view(n, -1, c).mean(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("axes", [3, 4, 5])
def test_attention_in_windows(axes: int, tmp_path: Path) -> None:
    model, images = _Windows(axes).eval(), images_for()
    fastcam.export(model, tmp_path / "m.onnx", layer="act", example_input=torch.zeros(1, 3, SIDE, SIDE))
    expected, scores = _autograd(model, "act", images)
    found = fastcam.Explainer(tmp_path / "m.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.logits, scores) < _BOUND
    assert relative_error(found.maps, expected) < _BOUND


@pytest.mark.filterwarnings("ignore")
def test_control_flow_of_the_first_exporter_is_left_to_the_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_weights = torch_exporters._with_weights
    refused: list[bool] = []

    def refuse_once(*arguments: Any) -> Any:
        if refused:
            return with_weights(*arguments)
        refused.append(True)
        raise ModelError("node '/If' (If) contains a subgraph")

    monkeypatch.setattr(torch_exporters, "_with_weights", refuse_once)
    model, images = family("VGG"), images_for()
    result = fastcam.export(model, tmp_path / "m.onnx", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert refused
    expected, _ = _autograd(model, result.layer, images)
    found = fastcam.Explainer(tmp_path / "m.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.maps, expected) < _BOUND


class _Remembering(Module):
    """Stores a size in an attribute and branches on it, as windowed transformers do: the tracer makes it a tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Linear(8, CLASSES)
        self.window = 99

    def forward(self, x: Any) -> Any:
        x = self.act(self.conv(x))
        side = min(x.shape[2:])
        if side <= self.window:
            self.window = torch.tensor(side) if torch.jit.is_tracing() else side
        if self.window >= 4:
            x = nn.AdaptiveAvgPool1d(1)(x.flatten(2)).flatten(1)
        return self.fc(x)


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_stores_sizes_is_restored(tmp_path: Path) -> None:
    model, images = _Remembering().eval(), images_for()
    fastcam.export(model, tmp_path / "m.onnx", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert type(model.window) is int
    expected, scores = _autograd(model, "act", images)
    found = fastcam.Explainer(tmp_path / "m.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.logits, scores) < _BOUND
    assert relative_error(found.maps, expected) < _BOUND


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_files_of_the_newer_exporter_with_an_adaptive_pooling(layout: str, tmp_path: Path) -> None:
    model, images = _Pooled(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).eval(), images_for()
    model = model.to(memory_format=torch.channels_last) if layout == "channels_last" else model
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model, (torch.zeros(2, 3, SIDE, SIDE),), tmp_path / "m.onnx", dynamic_shapes=({0: batch},), verbose=False
    )
    fastcam.export(tmp_path / "m.onnx", tmp_path / "explained.onnx")
    expected, scores = _autograd(model, "act", images)
    found = fastcam.Explainer(tmp_path / "explained.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.logits, scores) < _BOUND
    assert relative_error(found.maps, expected) < _BOUND


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["traced", "scripted", "double"])
def test_other_forms_of_a_module_give_its_maps(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head).eval(), images_for()
    example = torch.zeros(1, 3, SIDE, SIDE)
    expected, scores = _autograd(model, "1", images)
    form = {"traced": lambda: torch.jit.trace(model, example), "scripted": lambda: torch.jit.script(model)}.get(
        kind, model.double
    )()
    result = fastcam.export(form, tmp_path / "m.onnx", example_input=example)
    assert (kind == "double") == any("float64" in note for note in result.notes)
    found = fastcam.Explainer(tmp_path / "m.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.logits, scores) < _BOUND
    assert relative_error(found.maps, expected) < _BOUND


def test_hooks_that_look_on_see_no_tracer(tmp_path: Path) -> None:
    model, images, seen = family("VGG"), images_for(), []
    expected, _ = _autograd(model, "features.4", images)
    handle = model.features[4].register_forward_hook(lambda module, inputs, output: seen.append(output))
    result = fastcam.export(model, tmp_path / "m.onnx", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert [note.kind for note in result.notes] == ["scores"]
    assert all(type(output) is torch.Tensor for output in seen)
    before = len(seen)
    model(torch.tensor(images))
    assert len(seen) == before + 1
    handle.remove()
    found = fastcam.Explainer(tmp_path / "m.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.maps, expected) < _BOUND


def test_hooks_that_change_the_scores_are_exported_and_noted(tmp_path: Path) -> None:
    model, images = family("VGG"), images_for()
    model.features[4].register_forward_hook(lambda module, inputs, output: output * 0.5)
    _, scores = _autograd(model, "features.4", images)
    result = fastcam.export(model, tmp_path / "m.onnx", layer="features.4", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert any("hooks change the scores" in note and "features.4" in note for note in result.notes)
    found = fastcam.Explainer(tmp_path / "m.onnx")(images, _TARGETS, size="layer", normalize=None)
    assert relative_error(found.logits, scores) < _BOUND


class _Statistics(Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class _Dropping(_Statistics):
    def forward(self, x: Any) -> Any:
        return self.fc(functional.dropout(self.conv(x).relu(), 0.5).mean((2, 3)))


@pytest.mark.parametrize(("model", "message"), [(_Statistics, "other images in its batch")])
def test_scores_that_depend_on_the_batch_are_noted(model: Any, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = fastcam.export(model(), tmp_path / "m.onnx", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert [note.kind for note in result.notes if message in note] == ["checks"]


def test_the_skipped_check_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    result = fastcam.export(family("VGG"), tmp_path / "m.onnx", example_input=torch.zeros(1, 3, SIDE, SIDE))
    assert any("not test-run: onnxruntime is not installed" in note for note in result.notes)
