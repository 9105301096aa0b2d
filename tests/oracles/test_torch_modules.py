"""torch modules in the style of the usual families, against torch's own autograd and captum."""

from __future__ import annotations

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
    """As most users have them: traced with one image, which fixes the batch in every shape."""
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
    # Exported as at inference, whatever the module was at.
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


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (Vgg, None, ArgumentError, r"example_input=torch\.zeros"),
        (Vgg, "dog.jpg", ArgumentError, "example_input is a str"),
        (Vgg, torch.zeros(3, 32, 32), ArgumentError, r"of shape \(3, 32, 32\): give a batch"),
        (Vgg, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ArgumentError, "uint8"),
        (Vgg, torch.zeros(0, 3, 32, 32), ArgumentError, "give a batch"),
        (Vgg, torch.zeros(1, 1, 32, 32), ModelError, "cannot trace Vgg"),
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
        fastcam.export(Vgg(), tmp_path / "m.onnx", input_size=(16, 16), example_input=torch.zeros(1, 3, 32, 32))


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[torch\]"):
        fastcam.export(Vgg(), tmp_path / "model.onnx", example_input=torch.zeros(1, 3, 32, 32))


def test_a_module_splits_in_two() -> None:
    model = family("VGG")
    example = np.zeros((1, 3, SIDE, SIDE), np.float32)
    features, head = fastcam.split(model, "features.4", example_input=example)
    sizes = [dim.dim_value for dim in features.graph.output[0].type.tensor_type.shape.dim[1:]]
    assert sizes == [8, 16, 16]
    assert {node.op_type for node in head.graph.node} >= {"MaxPool", "Gemm"}
