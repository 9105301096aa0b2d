"""Folder jobs: the files on disk match Explainer's results, and finished work is never lost."""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from networks import Array, NetworkBuilder, small_classifier
from photo_folders import make_photos
from PIL import Image

import fastcam
from fastcam.errors import ArgumentError, FileFormatError, ImageError, LayerError, TargetError, WriteError
from fastcam.files import writing
from fastcam.folders import jobs

_CLASSES = ["beagle", "pug", "shar pei/fawn", "collie", "husky"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, classes=_CLASSES, preprocess="symmetric", gradients="full")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    make_photos(folder, 11)
    return folder


def _entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def _contents(out: Path) -> dict[str, Any]:
    """Return every file by name, without times."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name == ".fastcam.lock":
            continue
        if name == "results.jsonl":
            found[name] = [{key: value for key, value in entry.items() if key != "seconds"} for entry in _entries(out)]
        elif name == "run.json":
            run = json.loads(path.read_bytes())
            found[name] = {key: run[key] for key in run if key not in ("started", "finished", "seconds")}
        elif name == "report.html":
            # The day of the run is not compared.
            found[name] = re.sub(r"\d{4}-\d\d-\d\d", "", path.read_text(encoding="utf-8"))
        else:
            found[name] = path.read_bytes()
    return found


def test_results_are_what_explainer_says(model: Path, photos: Path, tmp_path: Path) -> None:
    result = fastcam.explain_files(
        model, photos, tmp_path / "out", top_k=2, format="png", colormap="viridis", alpha=0.3
    )
    explainer = fastcam.Explainer(model)
    entries = _entries(tmp_path / "out")
    assert [entry["path"] for entry in entries] == sorted(map(str, photos.rglob("*.png")))
    assert result.images == len(entries) == 11
    assert result.failures == ()
    for entry in entries:
        image = explainer(entry["path"], "top2")[0]
        order = np.argsort(-image.logits)
        assert [described["index"] for described in entry["classes"]] == image.targets.tolist()
        assert [described["label"] for described in entry["classes"]] == image.labels
        assert [described["index"] for described in entry["top"]] == order.tolist()
        assert image.image is not None
        assert entry["image_size"] == list(image.image.shape[:2])
        assert set(entry["seconds"]) == {"read", "model", "write"}
        for k, described in enumerate(entry["classes"]):
            assert described["probability"] == pytest.approx(image.probabilities[described["index"]], abs=1e-6)
            overlay = np.asarray(Image.open(tmp_path / "out" / described["file"]))
            expected = image.overlay(k, colormap="viridis", alpha=0.3)
            # Batches of another size may differ in the last bits, and so may the colour of a value on the border of
            # two.
            assert np.abs(overlay.astype(int) - expected).max() <= 2
            stored = np.frombuffer(base64.b64decode(described["map"]), np.uint8).reshape(entry["map_size"])
            assert np.abs(stored - image.maps[k] * 255).max() < 0.6


def test_arrays_and_sizes(model: Path, photos: Path, tmp_path: Path) -> None:
    explainer = fastcam.Explainer(model)
    sizes: list[tuple[Any, Callable[[dict[str, Any]], tuple[int, int]]]] = [
        ("image", lambda entry: tuple(entry["image_size"])),
        ("input", lambda entry: explainer.input_size),
        ((7, 9), lambda entry: (7, 9)),
    ]
    for number, (size, expected_size) in enumerate(sizes):
        out = tmp_path / str(number)
        fastcam.explain_files(model, photos, out, target=["pug", 0], format="npy", size=size, report=False)
        wanted: list[int | str] = ["pug", 0]
        for entry in _entries(out):
            expected = explainer(entry["path"], wanted, size=expected_size(entry)).heatmaps[0]
            found = [np.load(out / described["file"]) for described in entry["classes"]]
            assert [described["index"] for described in entry["classes"]] == [1, 0]
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert "thumbnail" not in entry


@pytest.mark.parametrize("format_", ["jpg", "webp"])
def test_overlays_at_another_size(model: Path, photos: Path, tmp_path: Path, format_: str) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out", format=format_, size=(60, 50), alpha=0)
    entry = _entries(tmp_path / "out")[3]
    with Image.open(tmp_path / "out" / entry["classes"][0]["file"]) as overlay:
        assert overlay.size == (50, 60)
        expected = Image.open(entry["path"]).resize((50, 60), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(overlay, int) - np.asarray(expected)).mean() < 12


def test_method_and_layer_are_the_explainers(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out", method="layercam", format="npy", size="input", top_k=1)
    for entry in _entries(tmp_path / "out"):
        expected = fastcam.Explainer(model)(entry["path"], method="layercam").heatmaps[0, 0]
        np.testing.assert_allclose(np.load(tmp_path / "out" / entry["classes"][0]["file"]), expected, atol=1e-5)


def test_same_named_pictures_both_survive(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, [photos / "photo0000.png", photos / "more"], tmp_path / "out")
    files = [entry["classes"][0]["file"] for entry in _entries(tmp_path / "out")]
    assert len(set(files)) == len(files) == 6
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 6


def test_an_unreadable_picture_is_named_and_the_others_are_done(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.png").write_bytes((photos / "photo0001.png").read_bytes()[:200])
    result = fastcam.explain_files(model, [photos, tmp_path / "gone.jpg"], tmp_path / "out")
    names = ["broken.png", "cut.png", "empty.jpg", "gone.jpg"]
    assert [Path(path).name for path, _ in result.failures] == names
    assert result.images == 15
    entries = _entries(tmp_path / "out")
    assert [Path(entry["path"]).name for entry in entries if "error" in entry] == names
    assert sum("classes" in entry for entry in entries) == 11
    assert "does not exist" in result.failures[3][1]
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert (run["images"], run["failed"], run["state"]) == (15, 4, "finished")


def test_an_image_that_breaks_the_model_is_named_and_its_batch_is_done(tmp_path: Path) -> None:
    """A picture of one colour makes only its own scores 0 / 0."""
    net = NetworkBuilder(("batch", 3, 12, 12))
    spread = net.add("ReduceMax", net.input, net.constant(np.array([1, 2, 3])), keepdims=1)
    low = net.add("ReduceMin", net.input, net.constant(np.array([1, 2, 3])), keepdims=1)
    scaled = net.add("Div", net.add("Sub", net.input, low), net.add("Sub", spread, low))
    features = net.add("Tanh", net.conv(scaled, (4, 3, 3, 3)))
    scores = net.add("MatMul", net.add("Flatten", features), net.weight(400, 5))
    fastcam.export(net.build(net.add("Softmax", scores, axis=-1)).to_model(), tmp_path / "m.onnx", preprocess="scale")
    make_photos(tmp_path / "photos", 5)
    Image.new("RGB", (30, 30), "gray").save(tmp_path / "photos" / "flat.png")
    result = fastcam.explain_files(tmp_path / "m.onnx", tmp_path / "photos", tmp_path / "out")
    assert [Path(path).name for path, _ in result.failures] == ["flat.png"]
    assert "NaN or infinite" in result.failures[0][1]
    entries = [entry for entry in _entries(tmp_path / "out") if "classes" in entry]
    assert len(entries) == 5
    for entry in entries:
        probabilities = fastcam.Explainer(tmp_path / "m.onnx")(entry["path"])[0].probabilities
        assert entry["classes"][0]["probability"] == pytest.approx(probabilities.max(), abs=1e-6)


def test_animations_are_said_to_be_explained_by_their_first_frame(model: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "tif", "png"):
        frames[0].save(tmp_path / f"two.{suffix}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.gif")
    result = fastcam.explain_files(model, str(tmp_path / "*.*"), tmp_path / "out", alpha=0, format="png")
    assert result.several_frames == 4
    for entry in _entries(tmp_path / "out"):
        assert ("notes" in entry) == ("two" in entry["path"])
        overlay = np.asarray(Image.open(tmp_path / "out" / entry["classes"][0]["file"]))
        assert overlay[..., 0].min() > 200
        assert overlay[..., 2].max() < 60


def test_large_pictures_are_read_twice_with_the_same_result(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastcam.explain_files(model, photos, tmp_path / "kept")
    monkeypatch.setattr(jobs, "_KEPT_BYTES", 0)
    fastcam.explain_files(model, photos, tmp_path / "read again")
    assert _contents(tmp_path / "kept") == _contents(tmp_path / "read again")


def test_progress_counts_every_image_in_order(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"")
    seen: list[fastcam.JobProgress] = []
    fastcam.explain_files(model, photos, tmp_path / "out", batch_size=4, progress=seen.append)
    assert [(step.done, step.total) for step in seen] == [(number, 12) for number in range(1, 13)]
    assert [step.entry for step in seen] == _entries(tmp_path / "out")
    assert seen[-1].failed == 1


def test_threads_do_not_change_the_files(model: Path, photos: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 5):
        fastcam.explain_files(model, photos, tmp_path / str(threads), threads=threads, batch_size=2)
    assert _contents(tmp_path / "1") == _contents(tmp_path / "2") == _contents(tmp_path / "5")


# Resuming


def test_a_finished_run_is_resumed_without_work_and_extended_by_new_pictures(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out", batch_size=4)
    before = _contents(tmp_path / "out")
    again = fastcam.explain_files(model, photos, tmp_path / "out", batch_size=4, resume=True)
    assert again.resumed == again.images == 11
    assert _contents(tmp_path / "out") == before
    Image.new("RGB", (30, 30), "green").save(photos / "a_new_one.png")
    extended = fastcam.explain_files(model, photos, tmp_path / "out", batch_size=4, resume=True)
    assert (extended.images, extended.resumed) == (12, 11)
    assert Path(_entries(tmp_path / "out")[0]["path"]).name == "a_new_one.png"


def test_what_is_no_input_any_more_keeps_its_results(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    before = _entries(tmp_path / "out")
    fastcam.explain_files(model, photos / "more", tmp_path / "out", resume=True)
    after = _entries(tmp_path / "out")
    assert sorted(entry["id"] for entry in after) == sorted(entry["id"] for entry in before)
    assert [entry["path"] for entry in after][:5] == sorted(map(str, (photos / "more").iterdir()))


def test_a_picture_that_was_repaired_is_done_by_resuming(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "late.png").write_bytes(b"")
    first = fastcam.explain_files(model, photos, tmp_path / "out")
    assert len(first.failures) == 1
    Image.new("RGB", (30, 30), "green").save(photos / "late.png")
    second = fastcam.explain_files(model, photos, tmp_path / "out", resume=True)
    assert (second.failures, second.resumed) == ((), 11)
    assert not any("error" in entry for entry in _entries(tmp_path / "out"))


def test_a_lost_overlay_is_made_again(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    before = _contents(tmp_path / "out")
    lost = sorted((tmp_path / "out" / "overlays").iterdir())
    lost[2].unlink()
    lost[5].write_bytes(b"")
    assert fastcam.explain_files(model, photos, tmp_path / "out", resume=True).resumed == 9
    assert _contents(tmp_path / "out") == before


@pytest.mark.parametrize("tail", [b'{"path": "x", "id": "y", "cla', b'{"id": 3}\n', b"\xff\xfe\n", b"[]\n{}\nnull\n"])
def test_a_torn_or_damaged_line_is_done_again(model: Path, photos: Path, tmp_path: Path, tail: bytes) -> None:
    fastcam.explain_files(model, photos, tmp_path / "whole", batch_size=2)
    fastcam.explain_files(model, photos, tmp_path / "out", batch_size=2)
    lines = (tmp_path / "out" / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").unlink()
    (tmp_path / "out" / "results.partial.jsonl").write_bytes(b"".join(lines[:5]) + tail)
    result = fastcam.explain_files(model, photos, tmp_path / "out", batch_size=2, resume=True)
    assert result.resumed == 5
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


_SCRIPT = """
import sys, fastcam
fastcam.explain_files(sys.argv[1], sys.argv[2], sys.argv[3], top_k=2, batch_size=4, threads=2, resume=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_runs_killed_at_any_moment_end_with_the_same_files(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    make_photos(photos, 400)
    (photos / "broken.png").write_bytes(b"")
    fastcam.explain_files(model, photos, tmp_path / "whole", top_k=2, batch_size=4, threads=2)
    whole = (tmp_path / "whole" / "results.jsonl").stat().st_size
    out = tmp_path / "killed"
    partial = out / "results.partial.jsonl"
    pick = random.Random(time.time_ns())
    kills = finished_before = 0
    for _ in range(100):
        with subprocess.Popen([sys.executable, "-c", _SCRIPT, model, photos, out]) as child:
            # A share of the work, not a time, so that fast and slow machines are killed equally often.
            _wait_for_growth(child, partial, finished_before + pick.uniform(0, whole / 8))
            time.sleep(pick.uniform(0, 0.01))
            child.kill()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        kills += 1
        finished_before = partial.stat().st_size if partial.exists() else 0
    assert child.returncode == 0
    assert kills > 1
    assert _contents(out) == _contents(tmp_path / "whole")


def _wait_for_growth(child: subprocess.Popen[bytes], partial: Path, size: float) -> None:
    while child.poll() is None and (not partial.exists() or partial.stat().st_size <= size):
        time.sleep(0.0005)


# Refusals


def test_an_earlier_run_is_not_overwritten(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    before = _contents(tmp_path / "out")
    with pytest.raises(WriteError, match=r"contains an earlier run .*resume it \(--resume\), or choose another folder"):
        fastcam.explain_files(model, photos, tmp_path / "out")
    assert _contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change", [{"top_k": 2}, {"method": "layercam"}, {"format": "png"}, {"alpha": 0.25}, {"batch_size": 3}]
)
def test_a_run_with_other_settings_is_not_resumed(
    model: Path, photos: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    name = {"top_k": "target"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(ArgumentError, match=f"the earlier run had other settings \\({name} was"):
        fastcam.explain_files(model, photos, tmp_path / "out", resume=True, **change)


def test_another_model_is_not_resumed(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    fastcam.export(small_classifier().to_model(), tmp_path / "other.onnx", preprocess="symmetric")
    with pytest.raises(ArgumentError, match="model_sha256 was"):
        fastcam.explain_files(tmp_path / "other.onnx", photos, tmp_path / "out", resume=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_damaged_settings_are_not_resumed(model: Path, photos: Path, tmp_path: Path, content: bytes) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    (tmp_path / "out" / "run.json").write_bytes(content)
    with pytest.raises(ArgumentError, match="cannot be read"):
        fastcam.explain_files(model, photos, tmp_path / "out", resume=True)


def test_two_runs_at_once_do_not_meet(model: Path, photos: Path, tmp_path: Path) -> None:
    """The second one is rejected while the first one writes; the first one finishes as if it were alone."""
    refused: list[str] = []

    def second(progress: fastcam.JobProgress) -> None:
        for resume in (False, True):
            with pytest.raises(WriteError, match="another run is writing there") as error:
                fastcam.explain_files(model, photos / "more", tmp_path / "out", resume=resume)
            refused.append(str(error.value))

    fastcam.explain_files(model, photos, tmp_path / "alone")
    fastcam.explain_files(model, photos, tmp_path / "out", progress=second)
    assert len(refused) == 22
    assert _contents(tmp_path / "out") == _contents(tmp_path / "alone")


def test_a_full_disk_ends_the_run_and_it_can_be_resumed(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastcam.explain_files(model, photos, tmp_path / "whole", batch_size=2)
    written = 0
    real = jobs._write_file

    def full(path: Path, data: memoryview) -> None:
        nonlocal written
        written += 1
        if written > 9:
            with writing(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    monkeypatch.setattr(jobs, "_write_file", full)
    with pytest.raises(WriteError, match="No space left on device"):
        fastcam.explain_files(model, photos, tmp_path / "out", batch_size=2, threads=1)
    monkeypatch.undo()
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["state"] == "running"
    assert fastcam.explain_files(model, photos, tmp_path / "out", batch_size=2, resume=True).resumed > 0
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small file system, as Linux does")
def test_a_disk_that_is_really_full(model: Path, photos: Path, small_disk: Path) -> None:
    with pytest.raises(WriteError, match="No space left on device"):
        fastcam.explain_files(model, photos, small_disk / "out", format="png")
    assert not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    fastcam.explain_files(model, photos, small_disk / "out", format="png", resume=True)
    assert sum("classes" in entry for entry in _entries(small_disk / "out")) == 11
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(WriteError, match="Read-only file system"):
        fastcam.explain_files(model, photos, small_disk / "other")


@pytest.mark.parametrize("out", ["file.txt", "file.txt/out"])
def test_an_output_that_is_no_folder_is_refused(model: Path, photos: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file.txt").write_bytes(b"mine")
    with pytest.raises(WriteError, match="cannot be written"):
        fastcam.explain_files(model, photos, tmp_path / out)
    assert (tmp_path / "file.txt").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"format": "bmp"}, ArgumentError, "choose one of jpg, png, webp, npy"),
        ({"colormap": "jett"}, ArgumentError, "unknown colour map 'jett'"),
        ({"alpha": 1.5}, ArgumentError, "alpha=1.5: give a number from 0 to 1"),
        ({"size": "big"}, ArgumentError, "size='big': choose 'image', 'input'"),
        ({"size": (3,)}, ArgumentError, r"size=\(3,\): give \(height, width\)"),
        ({"size": 224}, ArgumentError, r"size=224: give \(height, width\)"),
        ({"size": (60_000, 60_000)}, ArgumentError, r"2\*\*28 pixels"),
        ({"alpha": "x"}, ArgumentError, "alpha='x': give a number"),
        ({"colormap": None}, ArgumentError, "colormap=None"),
        ({"target": "pug", "top_k": 2}, ArgumentError, "pass only one of them"),
        ({"target": ["pug", "1"]}, ArgumentError, r"classes \[1\] more than once"),
        ({"size": (0, 3)}, ArgumentError, r"size=\(0, 3\): give \(height, width\)"),
        ({"top_k": 0}, ArgumentError, "top_k=0: give a whole number"),
        ({"top_k": 6}, TargetError, "top6"),
        ({"batch_size": 0}, ArgumentError, "batch_size=0"),
        ({"threads": 0}, ArgumentError, "threads=0"),
        ({"method": "gradcamm"}, ArgumentError, "did you mean 'gradcam'"),
        ({"layer": "nope"}, LayerError, "does not explain a layer 'nope'"),
        ({"target": 5}, TargetError, "out of range"),
        ({"target": "pugg"}, TargetError, "did you mean 'pug'"),
        ({"target": ["pug", 9]}, TargetError, "out of range"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    model: Path, photos: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fastcam.explain_files(model, photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_jobs_compare_with_a_background(photos: Path, tmp_path: Path) -> None:
    """The heatmaps are Explainer's with the same background; a resumed job needs the same pictures."""
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx", preprocess="symmetric", gradients="image")
    first, second = sorted(photos.glob("*.png"))[:2]
    options: dict[str, Any] = {"method": "expectedgradients", "settings": {"samples": 3}, "format": "npy"}
    fastcam.explain_files(tmp_path / "m.onnx", first, tmp_path / "out", background=second, size="input", **options)
    (entry,) = _entries(tmp_path / "out")
    found = np.load(tmp_path / "out" / entry["classes"][0]["file"])
    explainer = fastcam.Explainer(tmp_path / "m.onnx", background=[second])
    expected = explainer(first, method="expectedgradients", settings={"samples": 3})
    np.testing.assert_allclose(found, expected.heatmaps[0, 0], atol=1e-6)
    with pytest.raises(ArgumentError, match=r"the earlier run had other settings .*background_sha256"):
        fastcam.explain_files(
            tmp_path / "m.onnx", first, tmp_path / "out", background=photos, size="input", resume=True, **options
        )


@pytest.mark.parametrize(
    ("inputs", "out"), [(None, "out"), (b"x", "out"), ("x.jpg", "a\0b"), ("x.jpg", None), ("", "out")]
)
def test_what_is_no_path_is_refused(model: Path, inputs: Any, out: Any) -> None:
    with pytest.raises(ArgumentError, match=r"give a path|give the path"):
        fastcam.explain_files(model, inputs, out)


def test_files_that_cannot_explain_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.onnx").write_bytes(small_classifier().to_model().SerializeToString())
    with pytest.raises(FileFormatError, match=r"run fastcam\.export on it first"):
        fastcam.explain_files(tmp_path / "plain.onnx", photos, tmp_path / "out")
    fastcam.export(small_classifier().to_model(), tmp_path / "raw.onnx")
    with pytest.raises(ImageError, match="export it again with preprocess="):
        fastcam.explain_files(tmp_path / "raw.onnx", photos, tmp_path / "out")


def test_memory_does_not_grow_with_the_number_of_images(model: Path, tmp_path: Path) -> None:
    """Two thousand images after a warm-up of a thousand: less than a kilobyte each remains, the lists of names."""
    make_photos(tmp_path / "photos", 3000)
    sizes: dict[int, int] = {}

    def watch(progress: fastcam.JobProgress) -> None:
        if progress.done in (1000, 3000):
            sizes[progress.done] = psutil.Process().memory_info().rss

    fastcam.explain_files(model, tmp_path / "photos", tmp_path / "out", progress=watch, report=False)
    assert sizes[3000] - sizes[1000] < 4 * 2**20


def test_outputs_hold_the_drawn_heat_in_the_right_corner(model: Path, tmp_path: Path) -> None:
    """An image with one bright corner, explained and drawn: the overlay is hottest where the heatmap is."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:20, :25] = np.random.default_rng(1).integers(100, 256, (20, 25, 3))
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    fastcam.explain_files(model, tmp_path / "corner.png", tmp_path / "out", alpha=1.0, colormap="gray", format="png")
    (entry,) = _entries(tmp_path / "out")
    drawn: Array = np.asarray(Image.open(tmp_path / "out" / entry["classes"][0]["file"]), float)[..., 0]
    heat = fastcam.Explainer(model)(tmp_path / "corner.png", size=(60, 80)).heatmaps[0, 0]
    assert heat.max() - heat.min() > 0.5
    assert np.abs(drawn - 255 * heat).max() <= 1


def test_a_picture_that_the_format_cannot_hold_is_named_and_the_others_are_done(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (70_000, 2)).save(photos / "a_wide_one.png")
    result = fastcam.explain_files(model, photos, tmp_path / "out")
    assert [Path(path).name for path, _ in result.failures] == ["a_wide_one.png"]
    assert "JPEG cannot hold a picture of 70000 x 2 pixels" in result.failures[0][1]
    assert sum("classes" in entry for entry in _entries(tmp_path / "out")) == 11
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html", "results.jsonl", "results.partial.jsonl"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_others_are_not_replaced(model: Path, photos: Path, tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(WriteError, match=f"contains {name}, but no run"):
        fastcam.explain_files(model, photos, tmp_path / "out", resume=resume)
    assert (tmp_path / "out" / name).read_bytes() == b"mine"


def test_only_the_jobs_own_leftovers_are_removed(model: Path, photos: Path, tmp_path: Path) -> None:
    mark = "0123456789abcdef" * 2
    for name in (".x.part", "sub/.video.mp4.part", f"sub/.x.{mark}.part", f"overlays/.x.jpg.{mark}.part"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"")
    fastcam.explain_files(model, photos, tmp_path / "out")
    left = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.part"))
    assert left == [".x.part", "sub/.video.mp4.part", f"sub/.x.{mark}.part"]


def test_a_picture_that_changed_is_done_again(model: Path, photos: Path, tmp_path: Path) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out", batch_size=1)
    Image.new("RGB", (50, 30), "green").save(photos / "photo0001.png")
    assert fastcam.explain_files(model, photos, tmp_path / "out", batch_size=1, resume=True).resumed == 10
    (entry,) = [entry for entry in _entries(tmp_path / "out") if entry["path"] == str(photos / "photo0001.png")]
    assert entry["image_size"] == [30, 50]


def test_results_may_stand_among_the_pictures(model: Path, photos: Path) -> None:
    for resume in (False, True):
        assert fastcam.explain_files(model, photos, photos, resume=resume).images == 11


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_for_the_journal_is_refused(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_full(*arguments: Any) -> Any:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr("fastcam.folders.journal.open_unlinked", open_full)
    with pytest.raises(WriteError, match="No space left on device"):
        fastcam.explain_files(model, photos, tmp_path / "out")


def test_long_names_still_fit_a_file_system(tmp_path: Path) -> None:
    labels = ["𠀀" * 60 + str(index) for index in range(5)]
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx", classes=labels, preprocess="scale")
    Image.new("RGB", (20, 20)).save(tmp_path / f"{'蓝' * 80}.png")
    assert fastcam.explain_files(tmp_path / "m.onnx", str(tmp_path / "*.png"), tmp_path / "out").failures == ()


@pytest.mark.parametrize("classes", [[{}], [{"file": 3}], [3], 3])
def test_a_line_with_damaged_classes_is_done_again(model: Path, photos: Path, tmp_path: Path, classes: Any) -> None:
    fastcam.explain_files(model, photos, tmp_path / "out")
    with (tmp_path / "out" / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "x", "classes": classes}) + "\n")
    assert fastcam.explain_files(model, photos, tmp_path / "out", resume=True).resumed == 11
    assert len(_entries(tmp_path / "out")) == 11


def test_counts_are_of_all_results_even_where_a_resumed_run_names_fewer(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.png").write_bytes(b"")
    fastcam.explain_files(model, photos, tmp_path / "out")
    fastcam.explain_files(model, photos / "more", tmp_path / "out", resume=True)
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert (run["images"], run["failed"]) == (12, 1)


def test_numbers_of_numpy_are_numbers(model: Path, photos: Path, tmp_path: Path) -> None:
    target: Any = np.array([3, 1])
    for resume in (False, True):
        options: dict[str, Any] = {"alpha": np.float32(0.5), "batch_size": np.int64(2), "resume": resume}
        fastcam.explain_files(model, photos, tmp_path / "out", target=target, **options)
    assert [item["index"] for item in _entries(tmp_path / "out")[0]["classes"]] == [3, 1]


def test_a_pipe_is_named_and_not_waited_for(model: Path, photos: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    result = fastcam.explain_files(model, [tmp_path / "pipe.jpg", photos], tmp_path / "out")
    assert [reason.split(" is ")[1][:18] for _, reason in result.failures] == ["not a regular file"]
