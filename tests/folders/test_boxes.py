"""Folder jobs of detectors: boxes in results, overlays and the report."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_browser
from click.testing import CliRunner
from detector_graphs import one_map_detector
from PIL import Image

import fastcam
from fastcam.cli import commands
from fastcam.errors import ArgumentError

# Of the pictures, which are larger and wider than the detector's input.
_HEIGHT, _WIDTH = 128, 256
_CELL = 64


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "cells.onnx"
    fastcam.export(one_map_detector(), path, score="boxes", classes=["red", "green"], preprocess="scale")
    return path


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, two rows of cells: one red and one green, one red, none."""
    folder = tmp_path_factory.mktemp("street")
    for name, cells in {"a": [(0, 1, 0), (1, 3, 1)], "b": [(1, 0, 0)], "c": []}.items():
        pixels = np.zeros((_HEIGHT, _WIDTH, 3), np.uint8)
        for row, column, channel in cells:
            pixels[row * _CELL : (row + 1) * _CELL, column * _CELL : (column + 1) * _CELL, channel] = 255
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def job(detector: Path, street: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "out"
    # The grey around the pictures scores 0.4.
    fastcam.explain_files(detector, street, folder, format="png", threshold=0.5, threads=1)
    return folder


def test_the_lines_hold_the_boxes(job: Path, detector: Path, street: Path) -> None:
    first, second, third = _lines(job)
    boxes = {item["label"]: item for item in first["classes"]}
    np.testing.assert_allclose(boxes["red"]["box"], [_CELL, 0, 2 * _CELL, _CELL], atol=0.5)
    np.testing.assert_allclose(boxes["green"]["box"], [3 * _CELL, _CELL, 4 * _CELL, 2 * _CELL], atol=0.5)
    alone = fastcam.Explainer(detector, device="cpu")(street / "a.png", threshold=0.5)[0]
    assert alone.box_scores is not None
    for item, label, score in zip(first["classes"], alone.labels, alone.box_scores, strict=True):
        assert item["label"] == label
        assert item["probability"] == pytest.approx(float(score), abs=1e-6)
        assert item["score"] == pytest.approx(float(np.log(score / (1 - score))), abs=1e-3)
    assert [item["label"] for item in second["classes"]] == ["red"]
    assert third["classes"] == third["top"] == []


def test_the_maps_of_the_lines_cover_the_picture(job: Path) -> None:
    """The frame is cut off: the brightest place of each map lies inside of its box."""
    first, *_ = _lines(job)
    rows, columns = first["map_size"]
    assert rows * 2 == columns
    for item in first["classes"]:
        values = np.frombuffer(base64.b64decode(item["map"]), np.uint8).reshape(rows, columns)
        row, column = np.unravel_index(int(values.argmax()), values.shape)
        x, y = (column + 0.5) * _WIDTH / columns, (row + 0.5) * _HEIGHT / rows
        left, top, right, bottom = item["box"]
        assert left < x < right
        assert top < y < bottom


def test_one_overlay_shows_all_boxes_of_a_picture(job: Path) -> None:
    assert sorted(path.name for path in (job / "overlays").iterdir()) == sorted(
        Path(line["overlay"]).name for line in _lines(job)
    )
    drawn = np.asarray(Image.open(job / _lines(job)[0]["overlay"])).astype(int)
    white = np.argwhere((drawn == 255).all(axis=2))
    for left, top in ((_CELL, 0), (3 * _CELL, _CELL)):
        # The lower edge, where no label is.
        edge = (white[:, 0] >= top + _CELL - 4) & (white[:, 0] < top + _CELL)
        assert (edge & (white[:, 1] >= left) & (white[:, 1] < left + _CELL)).sum() > _CELL / 2
    unchanged = np.asarray(Image.open(job / _lines(job)[2]["overlay"]))
    assert not unchanged.any()


def test_a_resumed_job_is_complete(detector: Path, street: Path, job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    settings: dict[str, Any] = {"format": "png", "threshold": 0.5, "threads": 1}
    fastcam.explain_files(detector, [street / "a.png", street / "c.png"], folder, **settings)
    result = fastcam.explain_files(detector, street, folder, **settings, resume=True)
    assert (result.images, result.resumed) == (3, 2)
    for found, expected in zip(_lines(folder), _lines(job), strict=True):
        assert found["classes"] == expected["classes"]
    with pytest.raises(ArgumentError, match=r"threshold was 0\.5, is 0\.3"):
        fastcam.explain_files(detector, street, folder, **{**settings, "threshold": 0.3}, resume=True)


def test_heatmaps_are_one_array_per_box(detector: Path, street: Path, tmp_path: Path) -> None:
    fastcam.explain_files(detector, street, tmp_path / "out", format="npy", threshold=0.5, threads=1)
    first, _, third = _lines(tmp_path / "out")
    for item in first["classes"]:
        heat = np.load(tmp_path / "out" / item["file"])
        assert heat.shape == (_HEIGHT, _WIDTH)
        left, top, right, bottom = (round(side) for side in item["box"])
        assert heat[top:bottom, left:right].sum() > 0.4 * heat.sum()
    assert third["classes"] == []


def test_a_threshold_is_for_detectors(tmp_path: Path, street: Path) -> None:
    from networks import small_classifier

    fastcam.export(small_classifier().to_model(), tmp_path / "dogs.onnx", preprocess="scale")
    with pytest.raises(ArgumentError, match="applies to detectors"):
        fastcam.explain_files(tmp_path / "dogs.onnx", street, tmp_path / "out", threshold=0.5)


def test_the_command_line_explains_boxes(street: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "cells.onnx", tmp_path / "cells.explained.onnx"
    model.write_bytes(one_map_detector().SerializeToString())
    run = CliRunner().invoke
    assert run(commands, ["export", str(model), str(out), "--score", "boxes", "--preprocess", "scale"]).exit_code == 0
    info = run(commands, ["info", str(out)]).output
    assert "a target is a box" in info
    assert "letterbox" in info
    job = ["explain", str(out), str(street), "-o", str(tmp_path / "out"), "--threshold", "0.5", "--threads", "1"]
    result = run(commands, job)
    assert result.exit_code == 0, result.output
    assert "c.png: nothing found" in result.output
    (line,) = (line for line in result.output.splitlines() if "a.png" in line)
    assert re.search(r"a\.png: [01] 9\d\.\d%, [01] 9\d\.\d%$", line)


def test_the_page_shows_each_box(job: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as browser:
        browser.set_window_size(1100, 800)
        browser.get((job / "report.html").as_uri())
        assert browser.execute_script("return images.map((image) => image.best.label)")[2] == "nothing found"
        # Around each box's edge, the canvas is white.
        script = """
            const image = images[0];
            return image.classes.map((item, rank) => {
              chooseClass(image, rank);
              drawHeatmap(image.canvas, image);
              const scale = image.canvas.width / image.image_size[1];
              const [left, top, right, bottom] = item.box.map((side) => side * scale);
              const at = image.canvas.getContext("2d").getImageData((left + right) / 2, bottom - 1, 1, 2).data;
              return [item.label, ...at];
            });
        """
        drawn = browser.execute_script(script)
        assert {row[0] for row in drawn} == {"red", "green"}
        assert all(max(row[1:4]) == 255 or max(row[5:8]) == 255 for row in drawn)
        browser.execute_script("showLarge(images[2])")
        assert browser.find_element("css selector", "#large canvas").is_displayed() is False
        browser.execute_script("showLarge(images[0])")
        assert browser.find_element("css selector", "#large canvas").is_displayed()
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert severe == []
