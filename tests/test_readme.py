"""The code and commands of the README and its pages run as printed, in a folder with the files that they name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_graphs import one_map_detector
from networks import NetworkBuilder, small_classifier
from photo_folders import make_class_folders
from PIL import Image
from segmentation_graphs import segmenter
from textbook import make_layers_he

import fastcam
from fastcam.evaluating.baselines import BASELINES
from fastcam.evaluating.metrics import METRICS
from fastcam.evaluating.verification import CHECKS
from fastcam.explaining.methods import METHODS
from fastcam.exporting.gradients.table import VJPS

_README = Path(__file__).parents[1] / "README.md"
_DOCS = [_README.parent / "docs" / f"{name}.md" for name in ("exporting", "rendering", "run-anywhere")]
_TEXT = _README.read_text(encoding="utf-8")
_PAGES = "".join(path.read_text(encoding="utf-8") for path in [_README, *_DOCS])
_ALL_BLOCKS = re.findall(r"<!-- runs -->\n```python\n(.*?)```", _PAGES, re.DOTALL)
_TORCH_BLOCKS = [block for block in _ALL_BLOCKS if "import torch" in block]
_BLOCKS = [block for block in _ALL_BLOCKS if block not in _TORCH_BLOCKS]
_SCORES = (_README.parent / "docs" / "scores.md").read_text(encoding="utf-8")
_SCORE_BLOCKS = dict(re.findall(r"<!-- runs (\w+) -->\n```python\n(.*?)```", _SCORES, re.DOTALL))
_SIGNALS = (_README.parent / "docs" / "signals.md").read_text(encoding="utf-8")
_SIGNAL_BLOCKS = dict(re.findall(r"<!-- runs (\w+) -->\n```python\n(.*?)```", _SIGNALS, re.DOTALL))
_METHODS, _EVALUATION = (
    (_README.parent / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("methods", "evaluation")
)
_COMMANDS = re.findall(r"<!-- runs sh -->\n```sh\n(.*?)```", _TEXT, re.DOTALL)
_TRAINING = re.findall(r"<!-- runs train -->\n```sh\n(.*?)```", _TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The VGG16 that the README calls dogs.keras."""
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    model = keras.applications.VGG16(weights=None, input_shape=(224, 224, 3), classes=15)
    make_layers_he(model, seed=0)
    path = tmp_path_factory.mktemp("network") / "dogs.keras"
    model.save(path)
    return path


def _save_photos(folder: Path, names: Sequence[str]) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(generator.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(folder / name)


@pytest.mark.slow
def test_the_readmes_blocks_run(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A block registers a rule: this removes it afterwards.
    monkeypatch.setitem(VJPS, "Sin", VJPS["Relu"])
    shutil.copy(network, tmp_path / "dogs.keras")
    _save_photos(tmp_path, ["dog.jpg", "two_dogs.jpg"])

    assert len(_BLOCKS) == 5
    names: dict[str, object] = {}
    for block in _BLOCKS:
        exec(block, names)

    assert list(tmp_path.glob("why_*.png"))
    heatmap = names["heatmap"]
    assert isinstance(heatmap, np.ndarray)
    assert heatmap.shape == (1, 1, 224, 224)


def test_the_block_of_the_page_on_rendering_runs() -> None:
    pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    (block,) = _TORCH_BLOCKS
    names: dict[str, Any] = {}
    exec(block, names)
    found = names["found"]
    assert found.heatmaps.shape == (4, 1, 224, 224)
    assert found.overlays.shape == (4, 1, 224, 224, 3)
    assert found.maps.max() == 1


@pytest.mark.parametrize("name", _SCORE_BLOCKS)
def test_the_blocks_of_the_page_on_scores_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save_photos(tmp_path, ["dog.jpg"])
    Image.fromarray(np.full((64, 64, 3), (255, 0, 0), np.uint8)).save("street.jpg")
    Path("detector.onnx").write_bytes(one_map_detector().SerializeToString())
    net = NetworkBuilder(("batch", 3, 12, 12))
    features = net.add("Relu", net.conv(net.input, (6, 3, 3, 3)))
    faces = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", features)), (6, 4)))
    Path("faces.onnx").write_bytes(faces.to_model().SerializeToString())
    Path("unet.onnx").write_bytes(segmenter().SerializeToString())
    names = ["pug", "beagle", "boxer", "chow", "corgi"]
    fastcam.export(small_classifier().to_model(), "dogs.onnx", classes=names, preprocess="scale")
    found: dict[str, Any] = {}
    exec(_SCORE_BLOCKS[name], found)
    if name == "detector":
        assert set(found["image"].labels) == {"red"}
        assert Path("box_0.png").is_file()
    assert len(_SCORE_BLOCKS) == 4


@pytest.mark.parametrize("name", ["series", "volumes"])
def test_the_blocks_of_the_page_on_signals_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    nibabel = pytest.importorskip("nibabel", reason="needs nibabel: pip install fastcam[volumes]")
    monkeypatch.chdir(tmp_path)
    affine = np.diag([0.5, 0.5, 3, 1])
    scan = np.random.default_rng(0).random((32, 40, 24)).astype(np.float32)
    nibabel.Nifti1Image(scan, affine).to_filename("scan.nii.gz")
    found: dict[str, Any] = {}
    exec(_SIGNAL_BLOCKS[name], found)
    if name == "series":
        assert found["found"].heatmaps.shape == (8, 1, 500)
        assert found["found"].labels == [["late"]] * 8
    else:
        heat = nibabel.load("heat.nii.gz")
        assert np.array_equal(heat.affine, affine)
        assert np.array_equal(heat.get_fdata(dtype=np.float32), found["explanation"].heatmaps[0])
    assert list(tmp_path.glob("*.png"))


def test_the_block_of_the_page_on_evaluation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save_photos(tmp_path, ["dog.jpg", "two_dogs.jpg"])
    fastcam.export(small_classifier().to_model(), "dogs.onnx", preprocess="scale")
    (block,) = re.findall(r"<!-- runs evaluation -->\n```python\n(.*?)```", _EVALUATION, re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert set(found["found"].values) == {"gradcam", "eigencam", *BASELINES}


def test_the_reference_names_everything_public() -> None:
    text = (_README.parent / "docs" / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: fastcam\.(\w+)$", text, re.MULTILINE)) == sorted(fastcam.__all__)


def test_the_pages_name_every_row_of_the_tables() -> None:
    settings = {(name, key): row for name, method in METHODS.items() for key, row in method.settings.items()}
    for (name, key), row in settings.items():
        lines = [line for line in _METHODS.splitlines() if f"`{key}`" in line]
        assert lines, (name, key)
        assert any(f"{row.default}" in line for line in lines), (name, key)
    for name in METHODS:
        assert f"| `{name}` |" in _METHODS
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.better} |" in _EVALUATION
    for name, check in CHECKS.items():
        assert f"| `{name}` |" in _EVALUATION
        assert f"| {check.side} {check.bound:g}".replace("1e-05", "1e-5") in _EVALUATION, name


@pytest.mark.slow
def test_the_readmes_commands_run(network: Path, tmp_path: Path) -> None:
    shutil.copy(network, tmp_path / "dogs.keras")
    _save_photos(tmp_path / "photos", ["dog.jpg", "two_dogs.jpg"])
    (tmp_path / "breeds.txt").write_text("\n".join(f"breed {number}" for number in range(15)), encoding="utf-8")
    assert len(_COMMANDS) == 1
    said = _run(_COMMANDS[0], tmp_path)
    assert "explained 2 of 2 images" in said
    assert "parameters      134,321,999," in said
    assert (tmp_path / "why" / "report.html").is_file()
    assert len(list((tmp_path / "why" / "overlays").iterdir())) == 6


@pytest.mark.slow
def test_the_readmes_training_runs(tmp_path: Path) -> None:
    """With one more option: tests do not download weights."""
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[train]")
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(224, 224, 3))
    make_layers_he(network, seed=0)
    network.save_weights(tmp_path / "vgg16.weights.h5")
    make_class_folders(tmp_path / "photos", 4)
    assert len(_TRAINING) == 1
    train = "fastcam train photos/ -o dogs.keras --unfreeze 1\n"
    assert train in _TRAINING[0]
    fewer = "--weights vgg16.weights.h5 --epochs 1 --fine-epochs 1 --augmentations 0"
    said = _run(_TRAINING[0].replace(train, f"{train.rstrip()} {fewer}\n"), tmp_path)
    assert "photos: 9 for training, 3 for validation" in said
    assert "classes: 3: grün, red one, 蓝" in said
    assert "explained 12 of 12 images" in said
    assert (tmp_path / "why" / "report.html").is_file()
    assert {path.name for path in (tmp_path / "dogs.training").glob("*.png")} == {"curves.png", "confusion.png"}


def _run(commands: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euc", commands]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_names_its_two_commands() -> None:
    """`.ci/run` reads them from here."""
    for marker in ("demo", "test"):
        assert re.search(rf"^<!-- {marker} command -->\n```sh\n\S.*\n```$", _TEXT, re.MULTILINE), marker
