"""The networks that the onnx package ships for its tests: other frameworks' graphs, opset 9, weights made by nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, relative_error
from onnx import numpy_helper

import fastcam

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

# The last map before the pooling and the dense layers, by what makes it, and its size.
_LAYERS: dict[str, tuple[str, tuple[int, int]]] = {
    "light_bvlc_alexnet": ("r13", (12, 12)),  # ReLU
    "light_densenet121": ("r907", (7, 7)),  # ReLU
    "light_inception_v1": ("r137", (6, 6)),  # Concat of the branches
    "light_inception_v2": ("r504", (7, 7)),  # Concat of the branches
    "light_resnet50": ("r171", (7, 7)),  # ReLU
    "light_shufflenet": ("r198", (7, 7)),  # ReLU
    "light_squeezenet": ("r64", (13, 13)),  # ReLU of the convolution that has one channel a class
    "light_vgg19": ("r35", (14, 14)),  # ReLU
    "light_zfnet512": ("r13", (12, 12)),  # ReLU
}

_EVERY_TIME = {"light_bvlc_alexnet", "light_resnet50", "light_shufflenet", "light_squeezenet"}


def _arange_image(shape: tuple[int, ...]) -> Array:
    """Return the image that the package's own test runner feeds."""
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) / count).astype(np.float32)


@pytest.mark.slow
@pytest.mark.skipif(not _FOLDER.is_dir(), reason="this onnx package comes without its test models")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _EVERY_TIME else pytest.mark.nightly) for name in _LAYERS]
)
def test_a_foreign_network_keeps_its_scores_and_explains_its_last_map(name: str, tmp_path: Path) -> None:
    result = fastcam.export(_FOLDER / f"{name}.onnx", tmp_path / "explained.onnx")
    layer, size = _LAYERS[name]
    assert result.layer == layer
    sizes = [size for size in result.input_shape[1:] if isinstance(size, int)]
    image = _arange_image((1, *sizes))
    source = onnxruntime.InferenceSession(_FOLDER / f"{name}.onnx", providers=["CPUExecutionProvider"])
    (scores,) = source.run(None, {source.get_inputs()[0].name: image})
    found = fastcam.Explainer(tmp_path / "explained.onnx")(image, "top3", size="layer")
    # densenet121 alone ends in its scores.
    given = found.logits if name == "light_densenet121" else found.probabilities
    assert relative_error(given, scores.reshape(1, -1)) < 1e-5
    stored = numpy_helper.to_array(onnx.load_tensor(_FOLDER / f"{name}_output_0.pb"))
    # The tolerances of the package's runner.
    np.testing.assert_allclose(given, stored.reshape(1, -1), rtol=1e-3, atol=1e-7)
    assert found.heatmaps.shape[2:] == size
    assert np.isfinite(found.heatmaps).all()
