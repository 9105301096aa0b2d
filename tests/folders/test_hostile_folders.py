"""Folders that were prepared or damaged by somebody else: nothing outside is written, and nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from networks import small_classifier
from PIL import Image

import fastcam
from fastcam.errors import ArgumentError, WriteError
from fastcam.folders.sources import find_sources

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes as POSIX has them")

_VICTIM = b"the only copy\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    fastcam.export(small_classifier().to_model(), path, classes=list("abcde"), preprocess="scale")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9), (80 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder and a file that must stay unchanged."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_bytes(_VICTIM)
    return folder


def _is_unchanged(outside: Path) -> bool:
    return [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("victim", _VICTIM)]


_FILES = ("results.jsonl", "results.partial.jsonl", "run.json", "report.html", ".fastcam.lock")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "link"),
    [
        *((name, Path.symlink_to) for name in ("overlays", "thumbnails", "heatmaps", *_FILES)),
        *((name, Path.hardlink_to) for name in _FILES),
    ],
)
def test_links_in_the_output_folder_are_refused(
    model: Path,
    photos: Path,
    tmp_path: Path,
    outside: Path,
    name: str,
    resume: bool,
    link: Callable[[Path, Path], None],
) -> None:
    out = tmp_path / "out"
    if resume:
        fastcam.explain_files(model, photos, out)
        Image.new("RGB", (9, 9)).save(photos / "new.png")
    out.mkdir(exist_ok=True)
    if name in _FILES:
        (out / name).unlink(missing_ok=True)
        link(out / name, outside / "victim")
    else:
        for path in out.glob(f"{name}/*"):
            path.unlink()
        if (out / name).exists():
            (out / name).rmdir()
        link(out / name, outside)
    with pytest.raises(WriteError, match=rf"{name}: is a link"):
        fastcam.explain_files(model, photos, out, resume=resume)
    assert _is_unchanged(outside)


def test_a_page_is_not_written_through_a_link(model: Path, photos: Path, tmp_path: Path, outside: Path) -> None:
    page = fastcam.explain_files(model, photos, tmp_path / "out").report
    assert page is not None
    page.unlink()
    page.symlink_to(outside / "victim")
    with pytest.raises(WriteError, match=r"report\.html: is a link"):
        fastcam.write_report(tmp_path / "out")
    assert _is_unchanged(outside)


def test_the_output_folder_itself_may_be_a_link(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert fastcam.explain_files(model, photos, tmp_path / "out").images == 3
    assert (tmp_path / "disk" / "results.jsonl").exists()


def test_a_pattern_visits_folders_that_link_to_themselves_once(photos: Path) -> None:
    """Python's own glob follows 2**40 paths through two links."""
    for name in ("a", "b"):
        (photos / name).symlink_to(".")
    found = [source.path for source in find_sources([str(photos / "**" / "*.png")])]
    assert found == [str(photos / f"{number}.png") for number in range(3)]
    assert [source.path for source in find_sources([photos])] == found


def test_a_pattern_follows_links_to_other_folders(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "here").symlink_to(photos)
    (tmp_path / "links" / "loop").symlink_to("loop")
    found = [source.path for source in find_sources([str(tmp_path / "links" / "**" / "*.png")])]
    assert found == [str(tmp_path / "links" / "here" / f"{number}.png") for number in range(3)]


@pytest.fixture
def nested(photos: Path) -> Iterator[Path]:
    """The photos, and one in a folder 1100 folders below."""
    descriptor = os.open(photos, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    (photos / ("d/" * 1100) / "deep.png").symlink_to(photos / "0.png")
    yield photos
    # Python 3.11 cannot remove such a tree, so pytest would fail.
    subprocess.run(["rm", "-rf", photos / "d"], check=True)


@pytest.mark.parametrize("pattern", ["", "**/*.png"])
def test_folders_may_be_nested_as_deeply_as_the_system_allows(nested: Path, pattern: str) -> None:
    found = [source.path for source in find_sources([nested / pattern])]
    assert {Path(path).name for path in found} == {"0.png", "1.png", "2.png", "deep.png"}


# Results that this package did not write


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    change(lines[0])
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a missing class field": lambda line: line["classes"][0].pop("file"),
    "classes of another type": lambda line: line.update(classes={"a": 1}),
    "a class of another type": lambda line: line.update(classes=[3]),
    "no classes": lambda line: line.update(classes=[]),
    "a label that is a number": lambda line: line["classes"][0].update(label=3),
    "a probability that is NaN": lambda line: line["top"][0].update(probability=float("nan")),
    "a path that is a list": lambda line: line.update(path=[1]),
    "a size of one number": lambda line: line.update(image_size=[3]),
    "a thumbnail that is an object": lambda line: line.update(thumbnail={}),
    "notes that are a number": lambda line: line.update(notes=3),
    "a stamp of text": lambda line: line.update(stamp="x"),
    "an address without a protocol": lambda line: line["classes"][0].update(file="//evil.example/x.png"),
    "an address": lambda line: line["classes"][0].update(file="javascript:alert(1)"),
    "a path that leads outside": lambda line: line.update(thumbnail="thumbnails/../../x.jpg"),
    "an absolute path": lambda line: line.update(thumbnail="/etc/passwd"),
    "an error that is a number": lambda line: line.update(error=3),
}


@pytest.mark.parametrize("name", _DAMAGE)
def test_a_line_that_is_not_ours_is_refused_by_the_report_and_repeated_by_the_job(
    model: Path, photos: Path, tmp_path: Path, name: str
) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    _change(tmp_path / "out", _DAMAGE[name])
    with pytest.raises(ArgumentError, match=r"results\.jsonl, line 1: is not a result of fastcam\.explain_files"):
        fastcam.write_report(tmp_path / "out")
    assert fastcam.explain_files(model, photos, tmp_path / "out", resume=True).resumed < 3
    lines = [
        [{**json.loads(line), "seconds": None} for line in content.splitlines()]
        for content in (before, (tmp_path / "out" / "results.jsonl").read_bytes())
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "change",
    [{"model": 3}, {"layers": "x"}, {"layers": [1]}, {"alpha": "x"}, {"alpha": 7}, {"colormap": []}, {"started": 0}],
)
def test_settings_that_are_not_ours_are_refused(
    model: Path, photos: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    path = tmp_path / "out" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}), encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"run\.json: does not contain the settings"):
        fastcam.write_report(tmp_path / "out")


def test_lines_nested_deeply_are_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    (tmp_path / "out" / "results.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(ArgumentError, match="line 1: is not a result"):
        fastcam.write_report(tmp_path / "out")
