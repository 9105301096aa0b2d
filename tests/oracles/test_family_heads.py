"""Whole gradient graphs of the usual families, cut at the last map and in the middle.

Against onnx-ad, which derives the same head by itself, and against torch's autograd, which never saw an ONNX file.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, relative_error
from torch_families import CLASSES, FAMILIES, SIDE, family, images_for, scores_and_activations

import fastcam
from fastcam.exporting.classifier import open_classifier
from fastcam.exporting.importers import ImportOptions

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastcam[torch]")

_TARGETS = [0, 3]
# A head of a few float32 ops: the same bound as for individual rules.
_BOUND = 1e-5
_CUTS = [(name, cut) for name in FAMILIES for cut in (0, 1)]


@functools.cache
def _traced(name: str) -> tuple[Any, onnx.ModelProto, list[str]]:
    """Return the module, its graph, and the values of the last layer and of the one in the middle."""
    model = family(name)
    options = ImportOptions(None, None, torch.zeros(1, 3, SIDE, SIDE))
    classifier = open_classifier(model, list(FAMILIES[name][1:]), options, None)
    return model, classifier.graph.to_model(name="traced"), list(classifier.layers)


def _run(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _ours(model: onnx.ModelProto, value: str, image: Array, folder: Path) -> Array:
    """Return the full gradients (K,C,h,w) of one image."""
    fastcam.export(model, folder / "full.onnx", layer=value, gradients="full")
    inputs = {model.graph.input[0].name: image, "target": np.array([_TARGETS], np.int64)}
    gradients: Array = _run(onnx.load(folder / "full.onnx"), inputs)["gradients"][0]
    return gradients


def _autograd(model: Any, layer: str, image: Array) -> Array:
    scores, activations = scores_and_activations(model, layer, image)
    return np.stack(
        [torch.autograd.grad(scores[0, target], activations, retain_graph=True)[0][0].numpy() for target in _TARGETS]
    )


def _onnx_ad(model: onnx.ModelProto, value: str, image: Array) -> Array:
    onnx_ad = pytest.importorskip("onnx_ad", reason="needs onnx-ad: pip install fastcam[peers]")
    features, head = fastcam.split(model, value)
    for half in (features, head):
        for end in [*half.graph.input, *half.graph.output]:
            # It does not support a dynamic batch.
            end.type.tensor_type.shape.dim[0].dim_value = 1
    values = _run(features, {features.graph.input[0].name: image})
    seeds = np.zeros((1, CLASSES, len(_TARGETS)), np.float32)
    seeds[0, _TARGETS, range(len(_TARGETS))] = 1
    derived = _run(onnx_ad.reverse(head, layout="onnx"), {**values, f"adj_{head.graph.output[0].name}": seeds})
    # Its targets are the last axis.
    return np.moveaxis(derived[f"adj_{features.graph.output[0].name}"], -1, 0)[:, 0]


@pytest.mark.parametrize(("name", "cut"), _CUTS, ids=[f"{name}-{('last', 'middle')[cut]}" for name, cut in _CUTS])
def test_gradients_are_those_of_autograd_and_onnx_ad(name: str, cut: int, tmp_path: Path) -> None:
    module, model, values = _traced(name)
    image = images_for(1)
    ours = _ours(model, values[cut], image, tmp_path)
    theirs = _autograd(module, FAMILIES[name][1:][cut], image)
    assert np.abs(theirs).max() > 0
    assert relative_error(ours, theirs) < _BOUND
    assert relative_error(ours, _onnx_ad(model, values[cut], image)) < _BOUND
    # It can fail: another class has different gradients.
    assert relative_error(ours[::-1], theirs) > 0.1
