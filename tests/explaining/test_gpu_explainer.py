"""Explainer on a real CUDA device against the CPU: run by ``bench/gpu.sh`` or ``pytest -m gpu``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import Array, export_two_layers, relative_error

import fastcam
from fastcam.explaining.providers import find_problem

_PROBLEM = find_problem(0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_PROBLEM is not None, reason=_PROBLEM.reason if _PROBLEM is not None else ""),
]

# The bound for whole networks, with another backend's convolutions.
_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_two_layers(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def on_cpu(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, device="cpu")


@pytest.fixture(scope="module")
def on_gpu(path: Path) -> fastcam.Explainer:
    explainer = fastcam.Explainer(path, device="cuda")
    assert explainer.providers[0] == "CUDAExecutionProvider"
    return explainer


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(37, 3, 12, 12)).astype(np.float32)


def _assert_same(found: fastcam.Explanation, expected: fastcam.Explanation) -> None:
    np.testing.assert_array_equal(found.targets, expected.targets)
    for name in ("heatmaps", "maps", "logits"):
        for actual, wanted in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert relative_error(actual, wanted) < _TOLERANCE, name


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"target": "top3", "batch": 5},
        {"size": "layer", "normalize": None},
        {"size": (33, 47), "normalize": "minmax"},
        {"layer": ["block2", "block1"]},
        {"method": "hirescam"},
        {"method": "gradcam++", "batch": 8},
        {"method": "layercam"},
    ],
    ids=str,
)
def test_it_gives_what_the_cpu_gives(
    on_gpu: fastcam.Explainer, on_cpu: fastcam.Explainer, batch: Array, arguments: dict[str, Any]
) -> None:
    _assert_same(on_gpu(batch, **arguments), on_cpu(batch, **arguments))


def test_pictures_are_prepared_on_the_device(
    on_gpu: fastcam.Explainer, on_cpu: fastcam.Explainer, rng: np.random.Generator
) -> None:
    photos = [rng.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8) for n in range(21)]
    _assert_same(on_gpu(photos, "top2", batch_size=4), on_cpu(photos, "top2", batch_size=4))


def test_many_threads_at_once(on_gpu: fastcam.Explainer, on_cpu: fastcam.Explainer, rng: np.random.Generator) -> None:
    batches = [rng.normal(size=(n % 7 + 1, 3, 12, 12)).astype(np.float32) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: on_gpu(item, "top2", batch_size=3), batches))
    for item, explanation in zip(batches, found, strict=True):
        _assert_same(explanation, on_cpu(item, "top2"))


def test_graphs_are_replayed(path: Path, on_cpu: fastcam.Explainer, batch: Array) -> None:
    captured = fastcam.Explainer(path, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    for _ in range(5):
        for count in (1, 37, 3):
            _assert_same(captured(batch[:count]), on_cpu(batch[:count]))


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_arrays_of_other_libraries(
    on_gpu: fastcam.Explainer, on_cpu: fastcam.Explainer, batch: Array, library: str
) -> None:
    """Filled on that library's stream, taken at once, and the results taken back without a copy."""
    module = pytest.importorskip(library, reason=f"needs {library}")
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("this torch was built without CUDA")
    source = module.asarray(batch / 2) if library == "cupy" else module.tensor(batch / 2, device="cuda")
    found = on_gpu(source * 2, "top2", batch_size=8, on_device=True)
    _assert_same(found.to_host(), on_cpu(batch, "top2"))
    heatmaps = module.from_dlpack(found.heatmaps)
    host = heatmaps.get() if library == "cupy" else heatmaps.cpu().numpy()
    np.testing.assert_array_equal(host, found.heatmaps.numpy())


def test_a_batch_beyond_the_memory_is_split(path: Path, rng: np.random.Generator) -> None:
    """64 MB for ONNX Runtime's arena: a batch of 4096 needs more than that for its first layer alone."""
    options = {"gpu_mem_limit": str(64 * 2**20)}
    explainer = fastcam.Explainer(path, providers=[("CUDAExecutionProvider", options)])
    batch = rng.normal(size=(8192, 3, 12, 12)).astype(np.float32)
    found = explainer(batch, batch_size=8192, size="layer")
    expected = fastcam.Explainer(path, device="cpu")(batch[-5:], size="layer")
    assert relative_error(found.maps[-5:], expected.maps) < _TOLERANCE
