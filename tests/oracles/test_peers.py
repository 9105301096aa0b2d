"""Heatmaps against every peer that is installed, with the formula by which each differs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pytest

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
