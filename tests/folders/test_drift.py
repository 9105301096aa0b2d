"""Two folders of results, compared class by class."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from networks import small_classifier
from PIL import Image

import fastcam
from fastcam.cli import commands
from fastcam.errors import ArgumentError
from fastcam.folders.drift import write_drift_page


def _results(folder: Path, maps: dict[str, list[Any]]) -> Path:
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for label, singles in maps.items():
        for single in singles:
            values = np.asarray(single, np.uint8)
            row = {"index": 0, "label": label, "probability": 0.5, "score": 1.0, "evidence": 1.0,
                   "file": f"overlays/{len(lines)}.jpg", "map": b64encode(values.tobytes()).decode()}  # fmt: skip
            lines.append(
                {
                    "path": f"{len(lines)}.png",
                    "id": f"{len(lines)}",
                    "image_size": [10, 10],
                    "classes": [row],
                    "top": [{name: row[name] for name in ("index", "label", "probability", "score")}],
                    "map_size": list(values.shape),
                    "thumbnail": f"thumbnails/{len(lines)}.jpg",
                    "seconds": {"read": 0.1, "model": 0.1, "write": 0.1},
                }
            )
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def _blob(row: int, column: int, size: int = 6) -> Any:
    single = np.zeros((size, size))
    single[row, column] = 200
    return single


def test_a_class_that_moved_is_found_and_the_others_are_not(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = [random.integers(0, 200, (6, 6)) for _ in range(20)]
    before = _results(tmp_path / "before", {"pug": [_blob(1, 1)] * 10, "boxer": noise[:10], "husky": [_blob(0, 0)]})
    after = _results(tmp_path / "after", {"pug": [_blob(4, 1)] * 8, "boxer": noise[10:], "corgi": [_blob(5, 5)]})
    found = fastcam.compare_results(before, after, region=(0, 0, 0.5, 0.5))
    assert found.moved == ("pug",)
    rows = {row.label: row for row in found.classes}
    pug = rows["pug"]
    assert pug.distance == pytest.approx(1)
    assert pug.before is not None
    assert pug.after is not None
    assert pug.before.centre == pytest.approx((1.5 / 6, 1.5 / 6))
    assert pug.after.centre == pytest.approx((4.5 / 6, 1.5 / 6))
    assert (pug.before.pictures, pug.after.pictures) == (10, 8)
    assert (pug.before.spread, pug.before.entropy) == pytest.approx((0, 0), abs=1e-9)
    assert (pug.before.outside, pug.after.outside) == pytest.approx((0, 1))
    boxer = rows["boxer"]
    assert boxer.before is not None
    mean = np.mean([single / single.sum() for single in noise[:10]], axis=0)
    np.testing.assert_allclose(boxer.before.mean, mean, atol=1e-12)
    assert boxer.before.entropy == pytest.approx(-(mean * np.log(mean)).sum() / np.log(36))
    assert 0 < boxer.distance < boxer.chance
    assert rows["husky"].after is None
    assert rows["corgi"].before is None


def test_maps_of_other_sizes_are_compared(tmp_path: Path) -> None:
    even = [np.full((4, 4), 100)] * 5
    before = _results(tmp_path / "before", {"pug": even})
    after = _results(tmp_path / "after", {"pug": [np.full((8, 8), 50)] * 5})
    (row,) = fastcam.compare_results(before, after).classes
    assert row.distance == pytest.approx(0, abs=1e-6)


def test_the_page_shows_the_classes_and_is_safe(tmp_path: Path) -> None:
    label = "<script>alert(1)</script>"
    before = _results(tmp_path / "before", {label: [_blob(1, 1)] * 6})
    after = _results(tmp_path / "after", {label: [_blob(4, 4)] * 6})
    page = write_drift_page(fastcam.compare_results(before, after), tmp_path / "drift.html").read_text()
    assert "1 of 1 classes moved" in page
    assert "<script>" not in page
    # The brightest colour of viridis at the maximum.
    assert page.count("#fde725") == 2


def test_real_jobs_from_the_command_line(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "dogs.onnx", preprocess="imagenet")
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    for folder in ("one", "two"):
        fastcam.explain_files(tmp_path / "dogs.onnx", tmp_path / "photos", tmp_path / folder)
    command = ["drift", str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(tmp_path / "moved")]
    done = CliRunner().invoke(commands, [*command, "--region", "0.1,0.1,0.9,0.9"], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "no class more than chance explains" in done.output
    assert CliRunner().invoke(commands, [*command, "--region", "everywhere"]).exit_code == 2
    written = json.loads((tmp_path / "moved" / "drift.json").read_text())
    assert written["moved"] == []
    assert all(row["distance"] == 0 for row in written["classes"])
    lines = [json.loads(line) for line in (tmp_path / "one" / "results.jsonl").read_text().splitlines()]
    counted = {row["label"]: row["before"]["pictures"] for row in written["classes"]}
    for label, count in counted.items():
        assert count == sum(line["classes"][0]["label"] == label for line in lines)
    assert (tmp_path / "moved" / "drift.html").is_file()


def test_what_is_refused(tmp_path: Path) -> None:
    good = _results(tmp_path / "good", {"pug": [_blob(1, 1)]})
    blank = _results(tmp_path / "blank", {"pug": [np.zeros((3, 3))]})
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "results.jsonl").write_text("{}\n")
    for folder, message in (
        (tmp_path / "no", "has no results"),
        (blank, "no results with maps"),
        (damaged, "line 1 is"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fastcam.compare_results(good, folder)
    for region in ((0, 0, 1), (0, 0, 2, 1), (0.5, 0, 0.5, 1), "all"):
        with pytest.raises(ArgumentError, match="region"):
            fastcam.compare_results(good, good, region=region)  # type: ignore[arg-type]  # wrong on purpose


def test_a_class_that_moved_gives_status_1(tmp_path: Path) -> None:
    before = _results(tmp_path / "before", {"pug": [_blob(1, 1)] * 6})
    after = _results(tmp_path / "after", {"pug": [_blob(4, 4)] * 6})
    arguments = ["drift", str(before), str(after), "-o", str(tmp_path / "moved")]
    done = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert done.return_value == 1
    assert "moved: pug" in done.output
