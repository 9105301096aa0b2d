"""Raw maps against captum's LayerGradCam: the same small network with the same weights, in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import relative_error, small_classifier

import fastcam

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[peers]")
captum_attr = pytest.importorskip("captum.attr", reason="needs captum: pip install fastcam[peers]")


def _in_torch() -> Any:
    """Return the small classifier up to its logits as a torch module."""
    graph = small_classifier()
    modules = {
        "Conv": lambda weight, bias: torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1),
        "Gemm": lambda weight, bias: torch.nn.Linear(*weight.shape),
    }
    layers: list[Any] = []
    for node in graph.nodes[:-1]:
        if node.op_type in modules:
            weight, bias = (graph.constants[name] for name in node.input[1:])
            module = modules[node.op_type](weight, bias)
            module.weight.data = torch.tensor(weight.T if node.op_type == "Gemm" else weight).contiguous()
            module.bias.data = torch.tensor(bias)
            layers.append(module)
        elif node.op_type == "Relu":
            layers.append(torch.nn.ReLU())
        elif node.op_type == "MaxPool":
            layers.append(torch.nn.MaxPool2d(2))
        else:
            assert node.op_type == "Flatten"
            layers.append(torch.nn.Flatten())
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize(("layer", "position"), [("block2", 4), ("block1", 1)])
def test_maps_are_captums(layer: str, position: int, tmp_path: Path, rng: np.random.Generator) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx", layer=layer)
    network = _in_torch()
    assert isinstance(network[position], torch.nn.ReLU)
    images = rng.normal(size=(3, 3, 12, 12)).astype(np.float32)
    found = fastcam.Explainer(tmp_path / "small.onnx")(images, list(range(5)), size="layer", normalize=None)
    assert relative_error(found.logits, network(torch.tensor(images)).detach().numpy()) < 1e-5
    method = captum_attr.LayerGradCam(network, network[position])
    for target in range(5):
        expected = method.attribute(torch.tensor(images), target=target, relu_attributions=True)
        assert relative_error(found.maps[:, target], expected.detach().numpy()[:, 0]) < 1e-5
