"""Whole gradient graphs of the usual families, cut at the last map and in the middle.

Against onnx-ad, which derives the same head by itself, and against torch's autograd, which never saw an ONNX file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, relative_error
from torch_families import FAMILIES, SIDE, family, images_for

import fastcam

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastcam[torch]")

_TARGETS = [0, 3]
# A head of a few float32 ops, as the rules one by one (DESIGN section 6).
_BOUND = 1e-5
_CUTS = [(name, cut) for name in FAMILIES for cut in ("last", "middle")]
_families = pytest.mark.parametrize(("name", "cut"), _CUTS, ids=["-".join(each) for each in _CUTS])


def _layer(name: str, cut: str) -> str:
    return FAMILIES[name][("last", "middle").index(cut) + 1]


def _run(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _ours(model: Any, layer: str, image: Array, folder: Path) -> Array:
    """Return the full gradients (K,C,h,w) of one image."""
    path = folder / "full.onnx"
    fastcam.export(model, path, layer=layer, gradients="full", example_input=torch.zeros(1, 3, SIDE, SIDE))
    found = _run(onnx.load(path), {_image_name(path): image, "target": np.array([_TARGETS], np.int64)})
    return found["gradients"][0]


def _image_name(path: Path) -> str:
    return next(value.name for value in onnx.load(path).graph.input if value.name != "target")


@_families
def test_gradients_are_those_of_onnx_ad(name: str, cut: str, tmp_path: Path) -> None:
    onnx_ad = pytest.importorskip("onnx_ad", reason="needs onnx-ad: pip install fastcam[peers]")
    model, layer, image = family(name), _layer(name, cut), images_for(1)
    features, head = fastcam.split(model, layer, example_input=torch.zeros(1, 3, SIDE, SIDE))
    for half in (features, head):
        for value in [*half.graph.input, *half.graph.output]:
            # It takes no open batch.
            value.type.tensor_type.shape.dim[0].dim_value = 1
    values = _run(features, {features.graph.input[0].name: image})
    (logits,) = (value.name for value in head.graph.output)
    seeds = np.zeros((1, 5, len(_TARGETS)), np.float32)
    seeds[0, _TARGETS, range(len(_TARGETS))] = 1
    derived = _run(onnx_ad.reverse(head, layout="onnx"), {**values, f"adj_{logits}": seeds})
    # Its targets are the last axis.
    theirs = np.moveaxis(derived[f"adj_{features.graph.output[0].name}"], -1, 0)[:, 0]
    assert np.abs(theirs).max() > 0
    assert relative_error(_ours(model, layer, image, tmp_path), theirs) < _BOUND


@_families
def test_gradients_are_those_of_autograd(name: str, cut: str, tmp_path: Path) -> None:
    model, layer, image = family(name), _layer(name, cut), images_for(1)
    kept: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> Any:
        kept.append(output)
        # A module behind may overwrite it in place.
        return output.clone()

    hook = model.get_submodule(layer).register_forward_hook(keep)
    scores = model(torch.tensor(image))
    hook.remove()
    # Of one module called several times it is the last call.
    theirs = [torch.autograd.grad(scores[0, target], kept[-1], retain_graph=True)[0][0].numpy() for target in _TARGETS]
    assert relative_error(_ours(model, layer, image, tmp_path), np.stack(theirs)) < _BOUND
