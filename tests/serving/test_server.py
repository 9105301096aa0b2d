"""The server's answers are Explainer's; its limits hold; nothing that it accepted is lost."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Array, small_classifier
from PIL import Image
from starlette import testclient

import fastcam
from fastcam.cli import commands
from fastcam.errors import ArgumentError
from fastcam.pictures.writing import encode_image
from fastcam.serving import protocol
from fastcam.serving.app import create_app
from fastcam.serving.metrics import Metrics
from fastcam.serving.models import ModelStore
from fastcam.serving.pictures import choose_media
from fastcam.serving.scheduling import BusyError, LateError, Scheduler
from fastcam.serving.server import JsonLines, default_workers
from fastcam.serving.settings import ServerSettings

_BREEDS = ["beagle", "pug", "boxer", "collie", "husky"]
_JSON = {"Accept": "application/json"}


def _export(path: Path, seed: int = 0) -> Path:
    fastcam.export(
        small_classifier(seed=seed).to_model(), path, classes=_BREEDS, preprocess="imagenet", gradients="full"
    )
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tmp_path_factory.mktemp("serving") / "dogs.onnx")


@pytest.fixture(scope="module")
def explainer(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, device="cpu", threads=1)


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[Any]:
    with _client(path) as client:
        yield client


def _client(*paths: Path, **limits: Any) -> Any:
    store = ModelStore(paths, device="cpu", threads=1)
    return testclient.TestClient(create_app(store, ServerSettings(**limits)))


def _photo(seed: int, size: tuple[int, int] = (30, 40), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


# POST /explain


@pytest.mark.parametrize("method", ["gradcam", "layercam", "eigencam"])
def test_json_is_what_explainer_says(client: Any, explainer: fastcam.Explainer, method: str) -> None:
    photo = _photo(1)
    answer = client.post("/explain", content=photo, headers=_JSON, params={"top_k": 3, "method": method, "map": "true"})
    assert answer.status_code == 200
    found = answer.json()
    expected = explainer(photo, "top3", method=method)[0]
    assert found["model"] == "dogs"
    assert found["image_size"] == [30, 40]
    assert expected.probabilities is not None
    for k, row in enumerate(found["classes"]):
        target = int(expected.targets[k])
        assert (row["index"], row["label"]) == (target, _BREEDS[target])
        assert row["score"] == pytest.approx(float(expected.logits[target]), rel=1e-6)
        assert row["probability"] == pytest.approx(float(expected.probabilities[target]), rel=1e-6)
        assert row["evidence"] == pytest.approx(float(expected.evidence[k]), rel=1e-6)
        values = np.frombuffer(base64.b64decode(row["map"]["data"]), np.uint8).reshape(row["map"]["size"])
        np.testing.assert_array_equal(values, np.rint(expected.maps[k] * 255))


def test_arrays_and_pictures_are_explainers(client: Any, explainer: fastcam.Explainer) -> None:
    photo = _photo(2)
    expected = explainer(photo, "pug")[0]
    query = {"target": "pug", "colormap": "viridis"}
    array = client.post("/explain", content=photo, headers={"Accept": "application/x-npy"}, params=query)
    np.testing.assert_array_equal(np.load(io.BytesIO(array.content)), expected.heatmaps)
    png = client.post("/explain", content=photo, headers={"Accept": "image/png"}, params=query)
    overlay = expected.overlay(0, colormap="viridis")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.content))), overlay)
    jpeg = client.post("/explain", content=photo, params=query)
    assert jpeg.headers["content-type"] == "image/jpeg"
    assert json.loads(jpeg.headers["x-explained"])["label"] == "pug"
    assert jpeg.content == bytes(encode_image(overlay, Path("overlay.jpg")))


def test_a_form_with_a_file(client: Any) -> None:
    photo = _photo(3)
    form = client.post("/explain", files={"image": ("dog.png", photo)}, headers=_JSON)
    assert form.json() == client.post("/explain", content=photo, headers=_JSON).json()
    other = client.post("/explain", files={"photo": ("dog.png", photo)}, headers=_JSON)
    assert (other.status_code, other.json()["error"]) == (400, 'the form has no file "image"')


def test_settings_of_methods_in_the_query(client: Any, explainer: fastcam.Explainer) -> None:
    photo = _photo(4)
    query = {"method": "rise", "masks": 20, "seed": 5}
    found = client.post("/explain", content=photo, headers={"Accept": "application/x-npy"}, params=query)
    expected = explainer(photo, method="rise", settings={"masks": 20, "seed": 5})
    np.testing.assert_array_equal(np.load(io.BytesIO(found.content)), expected.heatmaps[0])


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "image/jpeg"),
        ("*/*", "image/jpeg"),
        ("image/*", "image/jpeg"),
        ("text/html, application/json;q=0.5", "application/json"),
        ("application/json;q=0.5, image/webp", "image/webp"),
        ("image/png;q=0, application/x-npy", "application/x-npy"),
    ],
)
def test_accept(accept: str, media: str) -> None:
    assert choose_media(accept) == media


@pytest.mark.parametrize(
    ("query", "content", "status", "message"),
    [
        ({}, b"", 400, "the body is empty"),
        ({}, b"rubbish", 400, "picture in memory"),
        ({}, _photo(0)[:100], 400, "picture in memory"),
        ({"target": "cat"}, _photo(0), 400, "no class 'cat'"),
        ({"target": "9"}, _photo(0), 400, "out of range"),
        ({"top_k": "0"}, _photo(0), 400, "top_k=0"),
        ({"top_k": "2", "target": "pug"}, _photo(0), 400, "both choose the classes"),
        ({"method": "gradcan"}, _photo(0), 400, "choose one of gradcam"),
        ({"method": "saliency"}, _photo(0), 400, 'gradients="image"'),
        ({"colormap": "grue"}, _photo(0), 400, "unknown colour map"),
        ({"method": "rise", "masks": "many"}, _photo(0), 400, "not a number"),
        ({"path": "/etc/passwd"}, _photo(0), 400, "parameter 'path' is not known"),
        ({"model": "../dogs"}, _photo(0), 404, "choose one of dogs"),
    ],
)
def test_what_is_refused(client: Any, query: dict[str, str], content: bytes, status: int, message: str) -> None:
    answer = client.post("/explain", params=query, content=content)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_unknown_pages_and_methods(client: Any) -> None:
    assert client.get("/no-such-page").json() == {"error": "there is no such page"}
    other = client.get("/explain")
    assert (other.status_code, other.headers["allow"]) == (405, "POST")
    assert client.post("/explain", content=_photo(0), headers={"Accept": "audio/ogg"}).status_code == 400


def test_limits_and_the_token(path: Path) -> None:
    with _client(path, max_bytes=500, token="secret") as client:
        refused = client.post("/explain", content=_photo(0))
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/v2/health/ready").status_code == 200
        allowed = {"Authorization": "Bearer secret"}
        assert client.post("/explain", content=_photo(0), headers=allowed).status_code == 413
        assert client.get("/metrics", headers={"Authorization": "Bearer secreT"}).status_code == 401
    with _client(path, max_pixels=100) as client:
        large = client.post("/explain", content=_photo(0))
        assert large.status_code == 413
        assert "40 x 30 pixels" in large.json()["error"]


def test_several_models_and_names(path: Path, tmp_path: Path) -> None:
    other = _export(tmp_path / "cats.onnx", seed=1)
    with _client(path, other) as client:
        assert client.post("/explain", content=_photo(0)).status_code == 404
        scores = [
            client.post("/explain", content=_photo(0), headers=_JSON, params={"model": name}).json()["classes"]
            for name in ("dogs", "cats")
        ]
        assert scores[0] != scores[1]
        for page in ("/", "/openapi.json"):
            assert "cats" in client.get(page).text
    with pytest.raises(ArgumentError, match="another model is called 'dogs'"):
        ModelStore([path, path], device="cpu", threads=1)
    with pytest.raises(ArgumentError, match="becomes a part of URLs"):
        ModelStore([_export(tmp_path / "my dogs.onnx")], device="cpu", threads=1)
    with pytest.raises(ArgumentError, match="no model to serve"):
        ModelStore([], device="cpu", threads=1)


def test_a_changed_file_is_opened_and_a_broken_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcam.serving.models._LOOK", 0.0)
    path = _export(tmp_path / "dogs.onnx")
    photo = _photo(7)

    def scores() -> Any:
        return server.post("/explain", content=photo, headers=_JSON).json()["classes"][0]["score"]

    def until(expected: float) -> bool:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if scores() == pytest.approx(expected, rel=1e-6):
                return True
            time.sleep(0.05)
        return False

    with _client(path) as server:
        first = scores()
        (tmp_path / "new.onnx").write_bytes(_export(tmp_path / "other.onnx", seed=3).read_bytes())
        (tmp_path / "new.onnx").replace(path)
        second = float(fastcam.Explainer(path, device="cpu")(photo).logits.max())
        assert second != pytest.approx(first, rel=1e-3)
        assert until(second)
        (tmp_path / "broken.onnx").write_bytes(b"no model")
        (tmp_path / "broken.onnx").replace(path)
        for _ in range(10):
            assert scores() == pytest.approx(second, rel=1e-6)
            time.sleep(0.02)


def test_metrics_count_what_happened(path: Path) -> None:
    with _client(path) as client:
        client.post("/explain", content=_photo(0))
        client.post("/explain", content=b"rubbish")
        text = client.get("/metrics").text
    assert 'fastcam_requests_total{route="/explain",status="200"} 1.0' in text
    assert 'fastcam_requests_total{route="/explain",status="400"} 1.0' in text
    assert re.search(r'fastcam_stage_seconds_count\{stage="model"\} [12]\.0', text)


# The Open Inference Protocol


def _infer(client: Any, inputs: Sequence[tuple[str, Any]], *, binary: bool, **rest: Any) -> Any:
    items, blocks = [], []
    for name, array in inputs:
        item: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": protocol.type_name(array.dtype)}
        if binary:
            item["parameters"] = {"binary_data_size": array.nbytes}
            blocks.append(array.tobytes())
        else:
            item["data"] = array.ravel().tolist()
        items.append(item)
    text = json.dumps({"inputs": items, **rest}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))} if binary else {}
    return client.post("/v2/models/dogs/infer", content=b"".join([text, *blocks]), headers=headers)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_inference_is_explainers(client: Any, explainer: fastcam.Explainer, binary: bool, count: int) -> None:
    batch = np.random.default_rng(count).normal(size=(count, 3, 12, 12)).astype(np.float32)
    target = np.array([[1, 4]] * count)
    asked = [{"name": name} for name in ("heatmaps", "logits", "targets", "evidence", "probabilities")]
    answer = _infer(client, [("image", batch), ("target", target)], binary=binary, outputs=asked, id="seven")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["id"], found["model_name"], found["model_version"]) == ("seven", "dogs", "1")
    expected = explainer(batch, target.tolist())
    assert [item["name"] for item in found["outputs"]] == [item["name"] for item in asked]
    for item in found["outputs"]:
        array = np.array(item["data"]).reshape(item["shape"])
        np.testing.assert_array_equal(array.astype(np.float32), getattr(expected, item["name"]).astype(np.float32))


def test_inference_of_photos_and_binary_answers(client: Any, explainer: fastcam.Explainer) -> None:
    photos = [_photo(1), _photo(2, (50, 20), "JPEG")]
    block = b"".join(len(photo).to_bytes(4, "little") + photo for photo in photos)
    item = {"name": "pictures", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(block)}}
    text = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True, "method": "layercam"}}).encode()
    answer = client.post(
        "/v2/models/dogs/versions/1/infer",
        content=text + block,
        headers={"Inference-Header-Content-Length": str(len(text))},
    )
    assert answer.status_code == 200, answer.text
    length = int(answer.headers["inference-header-content-length"])
    rest, expected = answer.content[length:], explainer(photos, method="layercam")
    for output in json.loads(answer.content[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        dtype = {"FP32": np.float32, "INT64": np.int64}[output["datatype"]]
        array = np.frombuffer(rest[:size], dtype).reshape(output["shape"])
        np.testing.assert_array_equal(array, getattr(expected, output["name"]))
        rest = rest[size:]
    assert not rest


def test_tritons_client_works_unchanged(path: Path, explainer: fastcam.Explainer) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    with _running(path) as address:
        client = triton.InferenceServerClient(address.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("dogs")
        assert client.get_model_metadata("dogs")["inputs"][0]["shape"] == [-1, 3, 12, 12]
        batch = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
        image = triton.InferInput("image", list(batch.shape), "FP32")
        image.set_data_from_numpy(batch)
        target = triton.InferInput("target", [1, 1], "INT64")
        target.set_data_from_numpy(np.array([[2]]))
        found = client.infer("dogs", [image, target])
        expected = explainer(batch, 2)
        np.testing.assert_array_equal(found.as_numpy("heatmaps"), expected.heatmaps)
        np.testing.assert_array_equal(found.as_numpy("logits"), expected.logits)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", 'a list "inputs"'),
        (b'{"inputs": []}', 'a list "inputs"'),
        (b'{"inputs": [{"name": "image", "shape": [1], "datatype": "FP99", "data": [1]}]}', "datatype"),
        (b'{"inputs": [{"name": "image", "shape": [-1], "datatype": "FP32", "data": [1]}]}', "shape"),
        (b'{"inputs": [{"name": "image", "shape": [2], "datatype": "FP32", "data": [1]}]}', "not numbers of shape"),
        (b'{"inputs": [{"name": "image", "shape": [1], "datatype": "FP32", "data": ["x"]}]}', "not numbers of shape"),
        (b'{"inputs": [{"name": "camera", "shape": [1], "datatype": "FP32", "data": [1]}]}', "the inputs are camera"),
        (b'{"inputs": [{"name": "image", "shape": [1], "datatype": "FP32", "data": [1]}]}', "the model takes"),
        (
            b'{"inputs": [{"name": "image", "shape": [1], "datatype": "INT64", "data": [1]}], "outputs": 3}',
            "outputs",
        ),
    ],
)
def test_wrong_messages(client: Any, message: bytes, expected: str) -> None:
    answer = client.post("/v2/models/dogs/infer", content=message)
    assert answer.status_code == 400
    assert expected in answer.json()["error"]


def test_wrong_binary_messages(client: Any) -> None:
    batch = np.zeros((1, 3, 12, 12), np.float32)
    good = _infer(client, [("image", batch)], binary=True)
    assert good.status_code == 200
    text = json.dumps({"inputs": [{"name": "image", "shape": [1, 3, 12, 12], "datatype": "FP32",
                                   "parameters": {"binary_data_size": batch.nbytes}}]}).encode()  # fmt: skip
    for length, content in [
        ("x", text), (str(len(text)), text), (str(10**30), text), (str(len(text)), text + batch.tobytes() + b"1"),
        (str(len(text)), text + batch.tobytes()[:-4]),
    ]:  # fmt: skip
        headers = {"Inference-Header-Content-Length": length}
        assert client.post("/v2/models/dogs/infer", content=content, headers=headers).status_code == 400


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["image", "pictures", "target"]) | _VALUES,
        "shape": st.lists(st.integers(-2, 20) | st.integers(0, 2**62), max_size=5) | _VALUES,
        "datatype": st.sampled_from(["FP32", "BYTES", "INT64", "BOOL"]) | _VALUES,
        "data": _VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-5, 100)}) | _VALUES,
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(_ITEMS, max_size=3), rest=st.binary(max_size=60), length=st.none() | st.integers(-5, 400))
def test_rubbish_gives_400(client: Any, items: list[Any], rest: bytes, length: int | None) -> None:
    text = json.dumps({"inputs": items}).encode()
    header = str(len(text) if length is None else length)
    answer = client.post(
        "/v2/models/dogs/infer", content=text + rest, headers={"Inference-Header-Content-Length": header}
    )
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["error"]


_QUERIES = st.dictionaries(st.sampled_from(["target", "top_k", "method", "map", "model"]), st.text(max_size=6))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), query=_QUERIES)
def test_odd_requests_never_give_500(client: Any, body: bytes, query: dict[str, str]) -> None:
    answer = client.post("/explain", content=body, params=query)
    assert answer.status_code in (400, 404), (answer.status_code, answer.text)


# Scheduling


def test_requests_join_a_batch_and_one_bad_one_spoils_only_itself() -> None:
    seen: list[int] = []

    def run(values: Sequence[int], left: float) -> list[int]:
        seen.append(len(values))
        if 13 in values:
            raise ValueError("13")
        return [value * 2 for value in values]

    async def ask() -> list[Any]:
        scheduler = Scheduler(ServerSettings(max_batch=4, max_wait=0.05), Metrics())
        work = [scheduler.submit("same", value, run, 10) for value in (1, 2, 13, 4, 5)]
        answers = await asyncio.gather(*work, return_exceptions=True)
        scheduler.close()
        return answers

    answers = asyncio.run(ask())
    assert [answer for answer in answers if not isinstance(answer, Exception)] == [2, 4, 8, 10]
    assert isinstance(answers[2], ValueError)
    assert seen[0] == 4
    assert sorted(seen[1:]) == [1, 1, 1, 1, 1]


def test_a_full_queue_turns_requests_away_and_late_ones_end() -> None:
    release = threading.Event()

    def run(values: Sequence[int], left: float) -> Sequence[int]:
        release.wait(20)
        return values

    async def ask() -> list[Any]:
        scheduler = Scheduler(ServerSettings(workers=1, queue=2), Metrics())
        work = [asyncio.ensure_future(scheduler.submit(object(), value, run, 0.3)) for value in range(4)]
        await asyncio.sleep(0.6)
        release.set()
        answers = await asyncio.gather(*work, return_exceptions=True)
        scheduler.close()
        return answers

    answers = asyncio.run(ask())
    assert answers[0] == 0
    assert [type(answer) for answer in answers[1:]] == [LateError, LateError, BusyError]


def test_what_clients_gave_up_waiting_for_does_not_run() -> None:
    ran: list[int] = []
    release = threading.Event()

    def run(values: Sequence[int], left: float) -> Sequence[int]:
        release.wait(20)
        ran.extend(values)
        return values

    async def ask() -> None:
        scheduler = Scheduler(ServerSettings(), Metrics())
        first, second, third = (asyncio.ensure_future(scheduler.submit(object(), n, run, 10)) for n in range(3))
        await asyncio.sleep(0.1)
        second.cancel()
        await asyncio.sleep(0)
        release.set()
        assert await first == 0
        assert await third == 2
        scheduler.close()

    asyncio.run(ask())
    assert ran == [0, 2]


def test_batches_of_a_server_give_single_answers(path: Path, explainer: fastcam.Explainer) -> None:
    photos = [_photo(seed) for seed in range(12)]
    expected = [explainer(photo).heatmaps[0] for photo in photos]
    with _client(path, max_batch=4, max_wait=0.05) as client, ThreadPoolExecutor(12) as pool:

        def ask(photo: bytes) -> Any:
            return np.load(
                io.BytesIO(client.post("/explain", content=photo, headers={"Accept": "application/x-npy"}).content)
            )

        found = list(pool.map(ask, photos))
        sizes = client.get("/metrics").text
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert float(re.findall(r"fastcam_batch_pictures_count ([\d.]+)", sizes)[0]) < 12


# A process that listens


class _running:  # noqa: N801 - used as a function
    """`fastcam serve` on a free port; its address."""

    def __init__(self, *paths: Path, options: Sequence[str] = ()) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "fastcam", "serve", *map(str, paths), "--port", str(self.port), *options]
        # Not a pipe: it would be full after some hundred requests.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `__exit__`
        self.process = subprocess.Popen([*command, "--threads", "1"], stderr=self._log)

    def __enter__(self) -> str:
        address = f"http://127.0.0.1:{self.port}"
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"{address}/v2/health/ready"):
                return address
            time.sleep(0.05)
        raise AssertionError(self.log())

    def log(self) -> str:
        """Return what the process has written so far."""
        self._log.seek(0)
        return self._log.read()

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        self._log.close()


def _ask(address: str, photo: bytes, accept: str = "application/x-npy") -> Array:
    request = urllib.request.Request(f"{address}/explain", photo, {"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return np.asarray(np.load(io.BytesIO(answer.read())))


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_every_answer_is_right_under_load(path: Path, explainer: fastcam.Explainer, clients: int) -> None:
    photos = [_photo(seed) for seed in range(8)]
    expected = [explainer(photo).heatmaps[0] for photo in photos]
    with _running(path, options=["--queue", "200"]) as address, ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda number: (number % 8, _ask(address, photos[number % 8])), range(128)))
    assert len(found) == 128
    for number, heatmap in found:
        np.testing.assert_array_equal(heatmap, expected[number])


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_requests(path: Path, explainer: fastcam.Explainer) -> None:
    """Every answer is compared. The first requests fill caches and arenas, which the limit leaves out."""
    photos = [_photo(seed, kind=kind) for seed in range(4) for kind in ("PNG", "JPEG")]
    expected = [explainer(photo).heatmaps[0] for photo in photos]
    server = _running(path, options=["--queue", "200"])
    sizes: list[int] = []

    def ask(first: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        right = 0
        for number in range(first, first + 250):
            connection.request("POST", "/explain", photos[number % 8], {"Accept": "application/x-npy"})
            heatmap = np.load(io.BytesIO(connection.getresponse().read()))
            right += np.array_equal(heatmap, expected[number % 8])
        connection.close()
        return right

    with server, ThreadPoolExecutor(8) as pool:
        process = psutil.Process(server.process.pid)
        for _ in range(5):
            assert sum(pool.map(ask, range(8))) == 2000
            sizes.append(process.memory_info().rss)
    # A photo of 3.6 KB kept from each of the last 8,000 requests would be 28 MB.
    assert sizes[-1] - sizes[0] < 8 * 2**20, [size >> 20 for size in sizes]


def test_termination_under_load_loses_nothing_that_was_accepted(path: Path) -> None:
    server = _running(path, options=["--queue", "200"])
    query = "/explain?method=rise&masks=300"
    done: list[int] = []
    started = threading.Semaphore(0)

    def ask(seed: int) -> None:
        request = urllib.request.Request(f"{address}{query}", _photo(seed), _JSON)
        started.release()
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.loads(answer.read())["classes"]
            done.append(seed)

    with server as address, ThreadPoolExecutor(6) as pool:
        work = [pool.submit(ask, seed) for seed in range(6)]
        for _ in range(6):
            started.acquire()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        for item in work:
            item.result()
    assert sorted(done) == list(range(6))
    assert server.process.returncode in (0, -signal.SIGTERM)


def test_slow_and_half_closed_connections_do_not_stop_others(path: Path) -> None:
    photo = _photo(0)
    head = f"POST /explain HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
    with _running(path) as address:
        port = int(address.rpartition(":")[2])
        slow, half, gone = (socket.create_connection(("127.0.0.1", port)) for _ in range(3))
        slow.sendall(head[:20])
        half.sendall(head + photo)
        half.shutdown(socket.SHUT_WR)
        gone.sendall(head + photo[:50])
        gone.close()
        for _ in range(3):
            assert _ask(address, photo).shape == (1, 12, 12)
        slow.sendall(head[20:] + photo)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        slow.close()
        half.close()
        with pytest.raises(urllib.error.HTTPError):
            _ask(address, b"rubbish")


def test_the_openapi_document_is_kept(path: Path, tmp_path: Path) -> None:
    """schemathesis asks what the document allows and what it does not, and checks every answer against it."""
    pytest.importorskip("schemathesis", reason="needs schemathesis: pip install fastcam[peers]")
    with _running(path) as address:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--max-examples", "20"]
        # Bytes that are no picture, and objects that are no message, fit the document and are refused.
        command += ["--exclude-checks", "positive_data_acceptance", "--seed", "1"]
        # It keeps what it found in the current folder.
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Tested: 8" in done.stdout


def test_nothing_listens_on_other_addresses_unless_asked(path: Path) -> None:
    others = [item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with _running(path) as address:
        port = int(address.rpartition(":")[2])
        for host in {host for host in others if not str(host).startswith("127.")}:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((str(host), port), timeout=5)
        _ask(address, _photo(0))


def test_log_lines_are_json(path: Path) -> None:
    server = _running(path)
    with server as address:
        _ask(address, _photo(0))
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)
        text = server.log()
    lines = [json.loads(line) for line in text.splitlines()]
    row = next(line for line in lines if line.get("route") == "/explain")
    assert row["status"] == 200
    assert row["milliseconds"] > 0


def test_the_command_starts_a_server_with_its_options(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    started: dict[str, Any] = {}

    def run(app: Any, **options: Any) -> None:
        started.update(options, app=app)
        logging.getLogger("fastcam.serving").info("request", extra={"route": "/explain", "status": 200})

    monkeypatch.setattr(uvicorn, "run", run)
    arguments = ["serve", str(path), "--port", "8123", "--host", "::1", "--max-batch", "4", "--queue", "7"]
    done = CliRunner().invoke(commands, [*arguments, "--timeout", "5"], env={"FASTCAM_TOKEN": "secret"})
    assert done.exit_code == 0, done.output
    assert (started["host"], started["port"]) == ("::1", 8123)
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert lines[0]["message"] == "listening on http://::1:8123"
    assert (lines[1]["route"], lines[1]["status"]) == ("/explain", 200)
    with testclient.TestClient(started["app"]) as client:
        assert client.post("/explain", content=_photo(0)).status_code == 401
        assert client.post("/explain", content=_photo(0), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_how_many_workers_fill_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [default_workers("cpu", threads) for threads in (None, 2, 16)] == [8, 4, 1]
    assert default_workers("cuda", None) == 1


def test_errors_are_logged_with_their_traceback() -> None:
    try:
        raise ValueError("seven")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "it %s", ("failed",), sys.exc_info())
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["message"]) == ("error", "it failed")
    assert "ValueError: seven" in line["traceback"]


def test_an_unexpected_error_gives_500_and_no_details(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the inside")

    monkeypatch.setattr("fastcam.serving.pictures.explain", broken)
    with _client(path) as client:
        answer = client.post("/explain", content=_photo(0))
    assert answer.status_code == 500
    assert answer.json() == {"error": "an unexpected error: see the server's log"}


def test_metadata_and_health(client: Any) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/models/dogs/ready").json() == {"name": "dogs", "ready": True}
    assert client.get("/v2/models/cats").status_code == 404
    found = client.get("/v2/models/dogs/versions/1").json()
    assert [item["name"] for item in found["inputs"]] == ["image", "pictures", "target"]
    assert found["outputs"][2]["shape"] == [-1, -1, 12, 12]


@pytest.mark.parametrize(
    "option", [{"workers": 0}, {"max_wait": 2}, {"timeout": 0}, {"token": ""}, {"max_bytes": "many"}]
)
def test_settings_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        ServerSettings(**option).checked()
