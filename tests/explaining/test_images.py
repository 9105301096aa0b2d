"""What callers hand over as images: each kind gives what the plain NumPy array or path of it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import Array, small_classifier
from PIL import Image

import fastcam
from fastcam.errors import ImageError


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("images") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="symmetric")
    return fastcam.Explainer(path, threads=1, device="cpu")


@pytest.fixture
def photos(rng: np.random.Generator) -> Array:
    return rng.integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(2, 3, 12, 12)).astype(np.float32)


def _assert_equal(explainer: fastcam.Explainer, given: Any, plain: Any) -> None:
    found, expected = explainer(given, "top2"), explainer(plain, "top2")
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.heatmaps, expected.heatmaps)
    for one, other in zip(found, expected, strict=True):
        assert (one.image is None) == (other.image is None)
        if one.image is not None:
            np.testing.assert_array_equal(one.image, other.image)


def test_the_bytes_of_a_file(explainer: fastcam.Explainer, photos: Array, tmp_path: Path) -> None:
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    encoded = (tmp_path / "photo.png").read_bytes()
    _assert_equal(explainer, encoded, photos[0])
    _assert_equal(explainer, [encoded, photos[1]], photos)


def test_floats_of_0_to_1_are_pictures(explainer: fastcam.Explainer, photos: Array) -> None:
    _assert_equal(explainer, photos[0] / 255, photos[0])
    _assert_equal(explainer, list((photos / 255).astype(np.float32)), photos)
    with pytest.raises(ImageError, match=r"holds floats -1..1, which are not 0\.\.1"):
        explainer(np.linspace(-1, 1, 12 * 12 * 3).reshape(12, 12, 3))


def test_one_preprocessed_image_needs_no_batch_axis(explainer: fastcam.Explainer, batch: Array) -> None:
    _assert_equal(explainer, batch[0], batch[:1])


def test_an_item_of_a_dataset_is_its_image(explainer: fastcam.Explainer, photos: Array) -> None:
    _assert_equal(explainer, (photos[0], 3), photos[0])
    _assert_equal(explainer, (Image.fromarray(photos[0]), np.int64(3)), photos[0])
    _assert_equal(explainer, [(photos[0], 3), (photos[1], 0)], photos)
    _assert_equal(explainer, (photos[0], photos[1]), photos)


def test_torch_tensors(explainer: fastcam.Explainer, photos: Array, batch: Array) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    floats = torch.from_numpy(batch).requires_grad_()
    _assert_equal(explainer, floats, batch)
    _assert_equal(explainer, floats[0], batch[:1])
    _assert_equal(explainer, (floats[0], torch.tensor(3)), batch[:1])
    _assert_equal(explainer, floats.double(), batch)
    planar = torch.from_numpy(photos).permute(0, 3, 1, 2)
    _assert_equal(explainer, planar, photos)
    _assert_equal(explainer, planar[0], photos[0])
    _assert_equal(explainer, [(planar[0], 1), planar[1]], photos)
    with pytest.raises(ImageError, match=r"cannot be read as an array: Tensor .*Convert it to float32"):
        explainer(floats.bfloat16())
    with pytest.raises(ImageError, match=r"the batch has shape \(1, 3, 10, 12\)"):
        explainer(floats[0, :, :10])


def test_tensorflow_tensors(explainer: fastcam.Explainer, photos: Array, batch: Array) -> None:
    tensorflow = pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")
    _assert_equal(explainer, tensorflow.constant(photos), photos)
    _assert_equal(explainer, tensorflow.constant(photos[0] / 255), photos[0])
    _assert_equal(explainer, tensorflow.constant(batch), batch)
