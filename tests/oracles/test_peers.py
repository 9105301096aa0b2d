"""Heatmaps against every peer that is installed, with the formula by which each differs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastcam
from bench import shims
from bench.contestants import FASTCAM, PEERS, Models, agreement
from bench.networks import drawn_images, tiny

# What a peer imports at import time or warns about while it runs is not our concern.
pytestmark = pytest.mark.filterwarnings("ignore")

_CLASSES = [0, 3, 7]
_SLOW = {"torch.compile, by hand"}


class _UntimedModels(Models):
    """TensorFlow keeps its number of threads: other tests have started it."""

    @cached_property
    def keras(self) -> Any:
        return self.network.to_keras()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return _UntimedModels(tiny(), tmp_path_factory.mktemp("peers"), 1)


def _explaining(name: str, models: Models, images: Any) -> Any:
    try:
        return PEERS[name].make(models, images)
    except ImportError as error:
        pytest.skip(f"needs {PEERS[name].package}: {error}")


@pytest.mark.parametrize("name", [name for name in PEERS if name not in {FASTCAM, *_SLOW}])
def test_heatmaps_are_those_of(name: str, models: Models) -> None:
    images = drawn_images(3, (3, 16, 16))
    explain = _explaining(name, models, images)
    raw = models.explainer(images, _CLASSES, size="layer", normalize=None).maps
    assert raw.max((2, 3)).all()
    found = agreement(name, explain, raw, _CLASSES, (16, 16))
    # Two float32 networks: 1e-4 for every map, because none of these images is at a kink.
    assert found.worst <= 1e-4
    # It can fail: no other class's maps are this close.
    shifted = agreement(name, explain, np.roll(raw, 1, axis=1), _CLASSES, (16, 16))
    assert shifted.median > 0.01


def test_every_class_of_a_batch_in_one_call(models: Models) -> None:
    """All classes at once equal a peer's one after the other, at batch sizes 1 and 4."""
    pytest.importorskip("captum", reason="needs captum: pip install fastcam[peers]")
    for count in (1, 4):
        images = drawn_images(count, (3, 16, 16))
        raw = models.explainer(images, list(range(15)), size="layer", normalize=None).maps
        found = agreement("captum", _explaining("captum", models, images), raw, list(range(15)), (16, 16))
        assert found.worst <= 1e-4


@pytest.mark.parametrize(("method", "peer"), [("eigencam", "EigenCAM"), ("eigengradcam", "EigenGradCAM")])
def test_principal_components_are_those_of_pytorch_grad_cam(method: str, peer: str, tmp_path: Path) -> None:
    """Up to their sign, which the decomposition leaves open, and before the peer's resizing."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[peers]")
    shims.install()
    cams = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam: pip install --no-deps grad-cam ttach")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason="needs grad-cam, see bench/shims.py")
    nn = torch.nn
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(600, 4),
    ).eval()
    images = torch.rand(3, 3, 10, 10)
    fastcam.export(network, tmp_path / "small.onnx", example_input=images[:1], gradients="full", layer="3")
    found = fastcam.Explainer(tmp_path / "small.onnx", device="cpu")(
        images.numpy(), 2, method=method, normalize="signed", size="layer"
    )
    with getattr(cams, peer)(model=network, target_layers=[network[3]]) as cam:
        cam.batch_size = 3
        cam(images, [targets.ClassifierOutputTarget(2)] * 3)
        activations = cam.activations_and_grads.activations[0].numpy()
        kept = cam.activations_and_grads.gradients
        gradients = kept[0].numpy() if kept else None
        expected = cam.get_cam_image(images, network[3], None, activations, gradients, eigen_smooth=False)
    for image in range(3):
        theirs = expected[image] / np.abs(expected[image]).max()
        ours = found.maps[image, 0]
        assert min(np.abs(ours - theirs).max(), np.abs(ours + theirs).max()) < 1e-4
