"""The networks that the onnx package ships for its tests: other frameworks' graphs, opset 9, weights made by nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import relative_error

import fastcam

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_MODELS = sorted(path.name for path in _FOLDER.glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.skipif(not _MODELS, reason="this onnx package comes without its test models")
@pytest.mark.parametrize("name", _MODELS)
def test_a_foreign_network_exports_and_keeps_its_scores(name: str, tmp_path: Path) -> None:
    result = fastcam.export(_FOLDER / name, tmp_path / "explained.onnx")
    sizes = [size for size in result.input_shape[1:] if isinstance(size, int)]
    image = np.random.default_rng(0).uniform(0, 1, (1, *sizes)).astype(np.float32)
    source = onnxruntime.InferenceSession(_FOLDER / name, providers=["CPUExecutionProvider"])
    (scores,) = source.run(None, {source.get_inputs()[0].name: image})
    found = fastcam.Explainer(tmp_path / "explained.onnx")(image, "top3", size="layer")
    # densenet121 alone ends in its scores.
    expected = found.logits if name == "light_densenet121.onnx" else found.probabilities
    assert relative_error(expected, scores.reshape(1, -1)) < 1e-5
    assert found.heatmaps.shape[2] > 1
    assert np.isfinite(found.heatmaps).all()
