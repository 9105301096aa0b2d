"""Shards of a job, explained apart and joined: byte by byte what one job writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from networks import small_classifier
from PIL import Image

import fastcam
from fastcam.cli import commands
from fastcam.errors import ArgumentError, WriteError

# What depends on the machine's clock.
_TIMES = ("seconds", "started", "finished")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merging") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def _shards(model: Path, photos: Path, folder: Path, count: int, **options: Any) -> list[Path]:
    folders = [folder / f"part{number}" for number in range(1, count + 1)]
    for number, part in enumerate(folders, 1):
        fastcam.explain_files(model, photos, part, shard=(number, count), top_k=2, batch_size=1, **options)
    return folders


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]


@pytest.mark.parametrize("count", [1, 3, 11])
def test_joined_shards_are_the_whole_job(model: Path, photos: Path, tmp_path: Path, count: int) -> None:
    fastcam.explain_files(model, photos, tmp_path / "whole", top_k=2, batch_size=1)
    parts = _shards(model, photos, tmp_path, count)
    assert [path.name for part in parts for path in part.glob("overlays/*")] != []
    result = fastcam.merge_results(parts[::-1], tmp_path / "joined")
    assert (result.images, result.failed) == (8, 1)
    assert _lines(tmp_path / "joined") == _lines(tmp_path / "whole")
    for name in ("overlays", "thumbnails"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "joined" / name).iterdir()} == files
        assert files
    runs = [json.loads((tmp_path / folder / "run.json").read_text()) for folder in ("joined", "whole")]
    for run in runs:
        for name in _TIMES:
            run.pop(name)
    assert runs[0] == runs[1]
    assert result.report is not None
    assert result.report.is_file()


def test_a_killed_shard_is_resumed_and_joined(model: Path, photos: Path, tmp_path: Path) -> None:
    parts = _shards(model, photos, tmp_path, 2)
    lines = (parts[0] / "results.jsonl").read_bytes().splitlines(keepends=True)
    (parts[0] / "results.partial.jsonl").write_bytes(b"".join(lines[:2]))
    (parts[0] / "results.jsonl").unlink()
    run = json.loads((parts[0] / "run.json").read_text()) | {"state": "running"}
    (parts[0] / "run.json").write_text(json.dumps(run))
    with pytest.raises(ArgumentError, match="is not finished: continue it with --resume"):
        fastcam.merge_results(parts, tmp_path / "joined")
    fastcam.explain_files(model, photos, parts[0], shard=(1, 2), top_k=2, batch_size=1, resume=True)
    fastcam.merge_results(parts, tmp_path / "joined")
    fastcam.explain_files(model, photos, tmp_path / "whole", top_k=2, batch_size=1)
    assert _lines(tmp_path / "joined") == _lines(tmp_path / "whole")


def test_what_does_not_belong_together_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    parts = _shards(model, photos, tmp_path, 3)
    fastcam.explain_files(model, photos, tmp_path / "whole", top_k=2, batch_size=1)
    fastcam.explain_files(model, photos, tmp_path / "other", shard=(2, 3), top_k=1, batch_size=1)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(fewer / "one.png")
    fastcam.explain_files(model, fewer, tmp_path / "few", shard=(2, 3), top_k=2, batch_size=1)
    joined = tmp_path / "joined"
    for folders, message in (
        (parts[:2], "the shards 3/3 are missing"),
        ([*parts, parts[0]], "the shard 1/3 is given twice"),
        ([parts[0], tmp_path / "other", parts[2]], "other settings than .*: target"),
        ([parts[0], tmp_path / "few", parts[2]], "the shards listed different pictures"),
        ([tmp_path / "whole"], "does not hold a shard"),
        ([tmp_path / "missing"], "does not hold a shard"),
        ([], "give a list of the folders"),
        (str(parts[0]), "give a list of the folders"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fastcam.merge_results(folders, joined)
        assert not (joined / "results.jsonl").exists()
    with pytest.raises(WriteError, match="contains results already"):
        fastcam.merge_results(parts, tmp_path / "whole")


@pytest.mark.parametrize("shard", [(0, 3), (4, 3), (1,), "1/3", (1.5, 2)])
def test_wrong_shards(model: Path, photos: Path, tmp_path: Path, shard: Any) -> None:
    with pytest.raises(ArgumentError, match="shard="):
        fastcam.explain_files(model, photos, tmp_path / "out", shard=shard)


def test_from_the_command_line(model: Path, photos: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(commands, [*map(str, arguments)], standalone_mode=False)

    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        run("explain", model, photos, "-o", part, "--shard", f"{number}/2")
    joined = run("merge", *parts, "-o", tmp_path / "joined")
    # One picture is broken, as in a job over all of them.
    assert joined.return_value == 1, joined.output
    assert joined.output.startswith("joined 8 images, 1 of them failed")
    for share in ("3/2", "0/2", "half"):
        arguments = ["explain", str(model), str(photos), "-o", str(tmp_path / "out"), "--shard", share]
        assert CliRunner().invoke(commands, arguments).exit_code == 2
