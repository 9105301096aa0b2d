"""The CAM family: each method against its paper's formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cam_formulas import cam
from networks import Array, relative_error, small_classifier

import fastcam
from fastcam.explaining.methods import FORMULAS, METHODS
from fastcam.metadata import EVIDENCE

_READS_OF_POOLED_FILES = {"weights", "activations", "scores"}
_TARGETS = np.array([[0, 1], [2, 3], [4, 0]])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("methods") / "full.onnx"
    fastcam.export(small_classifier().to_model(), path, gradients="full")
    return path


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(3, 3, 12, 12)).astype(np.float32)


def _outputs(path: Path, batch: Array) -> tuple[Array, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    activations, gradients = session.run(["activations", "gradients"], {"image": batch, "target": _TARGETS})
    return activations.astype(np.float64), gradients.astype(np.float64)


def _weights(method: str, activations: Array, gradients: Array) -> Array:
    weigh = METHODS[method].weights
    assert weigh is not None
    return weigh(activations, gradients)


@pytest.mark.parametrize("method", FORMULAS)
def test_maps_are_the_papers_formula(path: Path, batch: Array, method: str) -> None:
    expected = cam(method, *_outputs(path, batch))
    found = fastcam.Explainer(path, threads=2)(batch, _TARGETS, method=method, size="layer", normalize=None)
    assert expected.max() > 0
    assert relative_error(found.maps, expected) < 1e-5


def test_the_methods_differ(path: Path, batch: Array) -> None:
    explainer = fastcam.Explainer(path, threads=2)
    # The product over a single layer is Grad-CAM++.
    methods = [name for name in FORMULAS if METHODS[name].merge == "mean"]
    maps = [explainer(batch, _TARGETS, method=method).maps for method in methods]
    for first in range(len(maps)):
        for second in range(first):
            assert relative_error(maps[first], maps[second]) > 1e-3, (first, second)


def test_gradcam_from_full_gradients_is_gradcam(path: Path, batch: Array) -> None:
    """The table's row is never used: the file's own weights are the same numbers."""
    activations, gradients = _outputs(path, batch)
    mean = _weights("gradcam", activations.astype(np.float32), gradients.astype(np.float32))
    expected = np.einsum("nkc,nchw->nkhw", mean, activations).clip(min=0)
    found = fastcam.Explainer(path)(batch, _TARGETS, method="gradcam", normalize=None)
    assert relative_error(found.maps, expected) < 1e-5


def test_dead_channels_weigh_nothing() -> None:
    """Division by zero: a channel of zeros, and gradients of zero."""
    activations = np.zeros((1, 2, 2, 2), np.float32)
    activations[0, 1] = 1
    gradients = np.zeros((1, 1, 2, 2, 2), np.float32)
    gradients[0, 0, 0] = 3
    for name, method in METHODS.items():
        if method.weights is not None:
            weights = method.weights(activations, gradients)
            assert np.isfinite(weights).all(), name
            assert not weights[:, :, 1].any(), name
    assert not _weights("xgradcam", activations, gradients).any()


def test_several_layers_are_fused_by_any_method(tmp_path: Path, batch: Array) -> None:
    source = small_classifier().to_model()
    fastcam.export(source, tmp_path / "one.onnx", gradients="full")
    one = fastcam.Explainer(tmp_path / "one.onnx")
    layers = [one.layer, next(name for name in one.candidates if name != one.layer)]
    fastcam.export(source, tmp_path / "two.onnx", layer=layers, gradients="full")
    two = fastcam.Explainer(tmp_path / "two.onnx")
    alone = [two(batch, _TARGETS, method="layercam", layer=name).heatmaps for name in layers]
    mean = np.mean(alone, axis=0)
    fused = two(batch, _TARGETS, method="layercam", layer=layers).heatmaps
    assert relative_error(fused, mean / mean.max(axis=(2, 3), keepdims=True)) < 1e-5


def test_pooled_files_refuse_the_methods_that_need_more(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "pooled.onnx")
    explainer = fastcam.Explainer(tmp_path / "pooled.onnx")
    assert set(explainer.methods) == {
        name for name, row in METHODS.items() if _READS_OF_POOLED_FILES.issuperset(row.reads)
    }
    with pytest.raises(fastcam.ArgumentError, match='export the model again with gradients="full"'):
        explainer(batch, method="layercam")


def test_an_unknown_method_is_named(path: Path, batch: Array) -> None:
    explainer = fastcam.Explainer(path)
    assert explainer.methods == tuple(name for name, row in METHODS.items() if EVIDENCE.keys().isdisjoint(row.reads))
    with pytest.raises(fastcam.ArgumentError, match=r"did you mean 'gradcam' or .*choose one of gradcam, gradcam\+\+"):
        explainer(batch, method="gradcan")


@pytest.mark.parametrize("method", ["gradcam++", "xgradcam"])
def test_sums_beyond_float32_do_not_erase_a_channel(method: str) -> None:
    """Activations near float32's maximum sum to more than it: divided by infinity, the weight would be 0."""
    activations = np.full((1, 1, 4, 4), 1e38, np.float32)
    gradients = np.ones((1, 1, 1, 4, 4), np.float32)
    expected = 1.0 if method == "xgradcam" else 1e-38
    assert _weights(method, activations, gradients) == pytest.approx(expected, rel=1e-3)


def test_an_overflowing_weight_names_its_image(path: Path, batch: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(activations: Array, gradients: Array) -> Array:
        weights = _weights("layercam", activations, gradients)
        weights[1] *= np.float32(3e38)
        return weights * np.float32(3e38)

    row = dataclasses.replace(METHODS["hirescam"], weights=overflowing)
    monkeypatch.setitem(METHODS, "hirescam", row)
    batch[[0, 2]] *= 0
    with pytest.raises(fastcam.NonFiniteError, match="image 1"):
        fastcam.Explainer(path)(batch, method="hirescam")
