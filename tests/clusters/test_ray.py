"""`explain_dataset` on real Ray clusters: one node, two nodes, killed actors and nodes."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from networks import small_classifier
from photo_folders import make_photos
from PIL import Image

import fastcam
import fastcam.ray
from fastcam.errors import ArgumentError, WriteError
from fastcam.ray import explain_dataset

ray = pytest.importorskip("ray", reason="needs ray: pip install fastcam[ray]")
pytest.importorskip("pyarrow", reason="needs pyarrow: pip install fastcam[ray]")
ray_cluster = pytest.importorskip("ray.cluster_utils", reason="needs ray: pip install fastcam[ray]")

# What Ray warns about is not our concern.
pytestmark = pytest.mark.filterwarnings("ignore")

_SUPPORT = str(Path(__file__).parents[1] / "support")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, each a raylet with an object store of its own."""
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(fastcam.__file__).parents[1]), _SUPPORT])}}
    found = ray_cluster.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 10**8})
    found.add_node(num_cpus=2, object_store_memory=10**8)
    ray.init(address=found.address, runtime_env=environment, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "dogs.onnx"
    classes = ["beagle", "pug", "shar pei/fawn", "collie", "husky"]
    fastcam.export(small_classifier().to_model(), path, classes=classes, preprocess="symmetric")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder / "all", 40)
    (folder / "all" / "broken.png").write_bytes(b"not a picture")
    return folder / "all"


def _rows(out: Path) -> dict[str, dict[str, Any]]:
    import pyarrow.dataset

    found = pyarrow.dataset.dataset(out / "parts").to_table().to_pylist()
    assert len({row["id"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def _check_rows(out: Path, lines: list[dict[str, Any]]) -> None:
    """Every row is a line of `explain_files`, and every line a row."""
    rows = _rows(out)
    assert rows.keys() == {line["path"] for line in lines}
    for line in lines:
        row = rows[line["path"]]
        assert row["error"] == line.get("error")
        if row["error"] is not None:
            continue
        assert [row[name] for name in ("id", "image_size", "map_size", "top")] == [
            line[name] for name in ("id", "image_size", "map_size", "top")
        ]
        for found, expected in zip(row["classes"], line["classes"], strict=True):
            assert b64encode(found["map"]).decode() == expected["map"]
            same = ("index", "label", "probability", "score", "evidence")
            assert [found[name] for name in same] == [expected[name] for name in same]
        assert row["thumbnail"] is not None


@pytest.fixture(scope="module")
def expected(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of one job, in batches of the same size."""
    out = tmp_path_factory.mktemp("expected")
    fastcam.explain_files(model, photos, out / "out", batch_size=1, top_k=2, device="cpu")
    return _lines(out / "out")


_OPTIONS: dict[str, Any] = {"batch_size": 1, "top_k": 2, "device": "cpu", "threads": 1, "rows_per_file": 5}


def test_rows_are_the_lines_of_explain_files(
    cluster: Any, model: Path, photos: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    result = explain_dataset(model, photos, str(tmp_path / "out"), **_OPTIONS)
    assert (result.images, result.resumed, result.failed) == (41, 0, 1)
    _check_rows(tmp_path / "out", expected)
    # Another batch per file, the same rows; nothing else is written.
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 9
    report = _lines(tmp_path / "out" / "report")
    assert [line["path"] for line in report] == [line["path"] for line in expected]
    assert result.report == f"{tmp_path / 'out'}/report/report.html"
    assert Path(result.report).is_file()
    overlay = Image.open(tmp_path / "out" / "report" / report[1]["classes"][0]["file"])
    assert np.asarray(overlay).std() > 10
    with pytest.raises(WriteError, match="contains an earlier run"):
        explain_dataset(model, photos, str(tmp_path / "out"), **_OPTIONS)
    with pytest.raises(ArgumentError, match=r"the earlier run had other settings .*target was 'top2', is 'top1'"):
        explain_dataset(model, photos, str(tmp_path / "out"), **{**_OPTIONS, "top_k": 1}, resume=True)


def test_stopped_jobs_continue(
    cluster: Any, model: Path, photos: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Some files are missing, and a picture that could not be read can be now."""
    explain_dataset(model, photos, str(tmp_path / "out"), **_OPTIONS, report=True)
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    for part in parts[::2]:
        part.unlink()
    left = len(_rows(tmp_path / "out"))
    failed_before = sum(row["error"] is not None for row in _rows(tmp_path / "out").values())
    result = explain_dataset(model, photos, str(tmp_path / "out"), **_OPTIONS, resume=True)
    assert (result.images, result.resumed, result.failed) == (41, left - failed_before, 1)
    _check_rows(tmp_path / "out", expected)


def test_pictures_that_failed_are_tried_again(cluster: Any, model: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 4)
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")
    options = {**_OPTIONS, "report": False}
    first = explain_dataset(model, tmp_path / "photos", str(tmp_path / "out"), **options)
    (tmp_path / "photos" / "photo0000.png").replace(tmp_path / "photos" / "broken.png")
    second = explain_dataset(model, [tmp_path / "photos"], str(tmp_path / "out"), **options, resume=True)
    assert [first.failed, second.failed] == [1, 0]
    # The picture that is gone keeps its row.
    assert (second.images, second.resumed) == (5, 4)
    assert all(row["error"] is None for row in _rows(tmp_path / "out").values())


def test_results_that_are_lost_are_noticed(cluster: Any, model: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 4)
    explain_dataset(model, tmp_path / "photos", str(tmp_path / "out"), **{**_OPTIONS, "report": False})
    ids = [row["id"] for row in _rows(tmp_path / "out").values()]
    assert fastcam.ray._check(str(tmp_path / "out"), ids) == (4, 0)
    with pytest.raises(fastcam.FastcamError, match="1 pictures have no row"):
        fastcam.ray._check(str(tmp_path / "out"), [*ids, "other"])
    (tmp_path / "out" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"its run\.json cannot be read"):
        explain_dataset(model, tmp_path / "photos", str(tmp_path / "out"), resume=True)
    with pytest.raises(ArgumentError, match="pyarrow does not know this address"):
        explain_dataset(model, tmp_path / "photos", "nowhere://bucket/why")


def test_datasets_of_rays_own_readers(
    cluster: Any, model: Path, photos: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bytes of files, as from an object store; and decoded images, as of a Hugging Face dataset."""
    paths = [line["path"] for line in expected]
    files = ray.data.read_binary_files(paths, include_paths=True)
    result = explain_dataset(model, files, str(tmp_path / "bytes"), **_OPTIONS)
    assert (result.images, result.failed) == (41, 1)
    rows = _rows(tmp_path / "bytes")
    good = [line for line in expected if "error" not in line]
    arrays = [{"image": np.asarray(Image.open(line["path"]).convert("RGB")), "path": line["path"]} for line in good]
    explain_dataset(model, ray.data.from_items(arrays), str(tmp_path / "arrays"), **_OPTIONS, report=False)
    decoded = _rows(tmp_path / "arrays")
    for line in good:
        for found in (rows[line["path"]], decoded[line["path"]]):
            assert found["top"] == line["top"]
            assert [b64encode(one["map"]).decode() for one in found["classes"]] == [
                one["map"] for one in line["classes"]
            ]
    broken = next(line for line in expected if "error" in line)
    assert rows[broken["path"]]["error"] == broken["error"]
    assert decoded[good[0]["path"]]["thumbnail"] is None
    with pytest.raises(Exception, match='it needs "bytes" or "image"'):
        explain_dataset(model, ray.data.from_items([{"x": 1}]), str(tmp_path / "none"), **_OPTIONS)


def test_results_go_to_an_address(
    cluster: Any, model: Path, photos: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """As to an object store, through pyarrow."""
    out = f"file://{tmp_path}/out"
    result = explain_dataset(model, photos, out, **_OPTIONS)
    assert (result.parts, result.report) == (f"{out}/parts", f"{out}/report/report.html")
    _check_rows(tmp_path / "out", expected)
    assert explain_dataset(model, photos, out, **_OPTIONS, resume=True).resumed == 40
    with pytest.raises(WriteError, match=f"file://{tmp_path}/out: contains an earlier run"):
        explain_dataset(model, photos, out, **_OPTIONS)
    # Keys in an address are nobody's business.
    secret = "s3://key:secret@bucket/why?region=us-east-1"
    assert fastcam.ray._place(secret) == "s3://bucket/why"


def test_drawings_are_those_of_explain_files(cluster: Any, model: Path, photos: Path, tmp_path: Path) -> None:
    explain_dataset(model, photos, str(tmp_path / "out"), **_OPTIONS, format="png", report=False)
    fastcam.explain_files(model, photos, tmp_path / "plain", batch_size=1, top_k=2, device="cpu", format="png")
    rows = _rows(tmp_path / "out")
    for line in _lines(tmp_path / "plain"):
        for found, described in zip(rows[line["path"]]["classes"], line.get("classes", []), strict=True):
            assert found["drawing"] == (tmp_path / "plain" / described["file"]).read_bytes()


def _actor(plan: Any, content: bytes) -> Any:
    """Return what a worker is, in this process."""
    return fastcam.ray._Actor(plan, [ray.put(content)])


def test_actors_write_one_file_per_batch(
    cluster: Any, model: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """On a node without the model's file, with rows that hold pictures: bytes, arrays, and records of both."""
    import pyarrow as pa

    plan = fastcam.ray._Plan(
        str(tmp_path / "elsewhere.onnx"), "0", "top2", "gradcam", None, None, None, None, "jet", 0.5, "image", True, 1,
        "cpu", 1, str(tmp_path / "out"),
    )  # fmt: skip
    good = [line for line in expected if "error" not in line][:3]
    content = [Path(line["path"]).read_bytes() for line in good]
    actor = _actor(plan, model.read_bytes())
    rows = [{"path": line["path"], "bytes": data} for line, data in zip(good, content, strict=True)]
    broken = {"path": "s3://broken.png", "bytes": b"not a picture"}
    assert actor(pa.Table.from_pylist([*rows, broken])) == {"images": [4], "failed": [1]}
    records = [{"path": "", "image": {"bytes": data, "path": None}} for data in content]
    actor(pa.Table.from_pylist(records))
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2
    found = _rows(tmp_path / "out")
    assert len(found) == 7
    maps = {tuple(one["map"] for one in row["classes"]) for row in found.values() if row["classes"]}
    assert maps == {tuple(b64decode(one["map"]) for one in line["classes"]) for line in good}
    assert found["s3://broken.png"]["error"].startswith("'s3://broken.png'")
    # The same batch again replaces its file.
    actor(pa.Table.from_pylist(records))
    assert len(_rows(tmp_path / "out")) == 7
    with pytest.raises(ArgumentError, match="keeps its weights in a second file"):
        _actor(plan, b"")


class _Killer(threading.Thread):
    """Calls a function once, when the first files of a job are there."""

    def __init__(self, out: Path, kill: Any) -> None:
        super().__init__()
        self._parts, self._kill = out / "parts", kill
        self.done = False

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._parts.is_dir() and len(list(self._parts.glob("*.parquet"))) >= 2:
                self._kill()
                self.done = True
                return
            time.sleep(0.05)


def _explain_and_kill(model: Path, photos: Path, out: Path, kill: Any) -> None:
    """Run a job of many small batches, in which something is killed after the first ones."""
    killer = _Killer(out, kill)
    killer.start()
    result = explain_dataset(model, photos, str(out), **{**_OPTIONS, "rows_per_file": 1})
    killer.join()
    assert killer.done
    assert result.images == 41


def test_killed_workers_lose_and_double_nothing(
    cluster: Any, model: Path, photos: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    def kill() -> None:
        processes = psutil.process_iter(["cmdline"])
        worker = next(one for one in processes if "MapWorker" in " ".join(one.info["cmdline"] or []))
        worker.kill()

    _explain_and_kill(model, photos, tmp_path / "out", kill)
    _check_rows(tmp_path / "out", expected)


def test_a_lost_node_loses_and_doubles_nothing(
    cluster: Any, model: Path, photos: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=10**8)
    _explain_and_kill(model, photos, tmp_path / "out", lambda: cluster.remove_node(node, allow_graceful=False))
    _check_rows(tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "bmp"}, "format='bmp': choose one of"),
        ({"method": "gradcamm"}, "did you mean 'gradcam'"),
        ({"top_k": 2, "target": "pug"}, "pass only one of them"),
        ({"gpus": -1}, "gpus=-1"),
        ({"colormap": "jett"}, "unknown colour map"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    cluster: Any, model: Path, photos: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        explain_dataset(model, photos, str(tmp_path / "out"), **{"device": "cpu", **options})
    assert not (tmp_path / "out").exists()


def test_the_block_of_the_page_on_scale_runs(
    cluster: Any, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "scale.md"
    (block,) = re.findall(r"<!-- runs ray -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dogs.onnx").symlink_to(model)
    (tmp_path / "photos").symlink_to(photos)
    found: dict[str, Any] = {}
    exec(block, found)
    assert (found["result"].images, found["result"].failed) == (41, 1)
    assert len(_rows(tmp_path / "why-ray")) == 41
