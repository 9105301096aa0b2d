"""The repository in Triton's real server, with a stand-in for its ONNX Runtime backend.

`FASTCAM_TRITON` names a virtual environment with nvidia-pytriton, whose package holds the server, onnxruntime and
numpy < 2. The server does the parsing, batching, warm-up, HTTP, gRPC and metrics; `triton_backend` runs the file.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from networks import Array, small_classifier
from PIL import Image

import fastcam

_TRITON = os.environ.get("FASTCAM_TRITON")
pytestmark = pytest.mark.skipif(
    _TRITON is None, reason="needs FASTCAM_TRITON=ENV: pip install nvidia-pytriton onnxruntime 'numpy<2' in ENV"
)
_BREEDS = ["beagle", "pug", "boxer", "collie", "husky"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Server:
    """A running server; its HTTP, gRPC and metrics ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http, self.grpc, self.metrics = (_free_port() for _ in range(3))
        python = Path(str(_TRITON)) / "bin" / "python"
        code = "import sys, sysconfig; print(sysconfig.get_path('purelib'), sys.base_prefix, *sys.version_info[:2])"
        packages, prefix, *version = subprocess.check_output([python, "-c", code], text=True).split()
        root = Path(packages) / "pytriton" / "tritonserver"
        backends = folder / "backends"
        shutil.copytree(Path(__file__).parents[1] / "support" / "triton_backend", backends)
        shutil.copytree(root / "backends" / "python", backends / "python")
        stub = root / "python_backend_stubs" / ".".join(version) / "triton_python_backend_stub"
        shutil.copy(stub, backends / "python")
        environment = {
            **os.environ,
            "FASTCAM_TRITON_PACKAGES": packages,
            # Where the stub, copied out of its folder, finds what it is linked with.
            "LD_LIBRARY_PATH": str(Path(packages) / "nvidia_pytriton.libs"),
            "PYTHONHOME": prefix,
        }
        ports = [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}"]
        places = [f"--model-repository={folder / 'repository'}", f"--backend-directory={backends}"]
        self._log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [root / "bin" / "tritonserver", *places, *ports], env=environment, stdout=self._log, stderr=self._log
        )

    def wait(self) -> None:
        """Return when the server is ready, warm-ups included."""
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready"):
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self._log.close()

    def count(self, name: str, model: str) -> float:
        """Return a counter of a model."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        (line,) = (line for line in lines if line.startswith(f'{name}{{model="{model}"'))
        return float(line.rpartition(" ")[2])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    folder = tmp_path_factory.mktemp("triton")
    source = small_classifier().to_model()
    options: dict[str, Any] = {"target": "required", "classes": _BREEDS, "preprocess": "imagenet"}
    fastcam.export(source, folder / "dogs.onnx", draw="heatmaps", **options)
    fastcam.export(source, folder / "photos.onnx", draw="overlays", picture="any", **options)
    for name in ("dogs", "photos"):
        fastcam.write_triton_repository(folder / f"{name}.onnx", folder / "repository", max_batch=8, device="cpu")
    running = _Server(folder)
    try:
        running.wait()
        yield running
    finally:
        running.close()


def _client(server: _Server, kind: str) -> tuple[Any, Any]:
    module = pytest.importorskip(f"tritonclient.{kind}", reason="needs tritonclient[http,grpc]")
    return module, module.InferenceServerClient(f"127.0.0.1:{getattr(server, kind)}")


def _ask(server: _Server, kind: str, batch: Array, targets: Array) -> dict[str, Array]:
    module, client = _client(server, kind)
    image = module.InferInput("image", list(batch.shape), "FP32")
    image.set_data_from_numpy(batch)
    target = module.InferInput("target", list(targets.shape), "INT64")
    target.set_data_from_numpy(targets)
    answer = client.infer("dogs", [image, target])
    return {name: answer.as_numpy(name) for name in ("logits", "targets", "maps", "heatmaps")}


def _expected(server: _Server, batch: Array, targets: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(server.folder / "dogs.onnx")
    names = ["logits", "targets", "maps", "heatmaps"]
    return dict(zip(names, session.run(names, {"image": batch, "target": targets}), strict=True))


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_answers_are_those_of_the_file_and_of_explainer(server: _Server, kind: str) -> None:
    explainer = fastcam.Explainer(server.folder / "dogs.onnx", device="cpu", convolutions="onnxruntime")
    for count in range(1, 9):
        batch = np.random.default_rng(count).normal(size=(count, 3, 12, 12)).astype(np.float32)
        targets = np.arange(count)[:, None] % 5
        found = _ask(server, kind, batch, targets)
        for name, expected in _expected(server, batch, targets).items():
            np.testing.assert_array_equal(found[name], expected)
        explained = explainer(batch, targets.tolist())
        np.testing.assert_array_equal(found["logits"], explained.logits)
        # Explainer resizes in its own kernels: the last bits differ.
        np.testing.assert_allclose(found["heatmaps"], explained.heatmaps, atol=1e-6)


def test_requests_share_a_batch_and_one_bad_class_spoils_its_own_answer(server: _Server) -> None:
    requests, executions = (server.count(f"nv_inference_{name}count", "dogs") for name in ("", "exec_"))
    batch = np.random.default_rng(0).normal(size=(32, 3, 12, 12)).astype(np.float32)
    targets = np.where(np.arange(32) == 5, 99, np.arange(32) % 5)[:, None]

    def ask(number: int) -> dict[str, Array]:
        return _ask(server, "http", batch[number : number + 1], targets[number : number + 1])

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(32)))
    assert server.count("nv_inference_count", "dogs") - requests == 32
    assert server.count("nv_inference_exec_count", "dogs") - executions < 32
    for number, answer in enumerate(found):
        if number == 5:
            assert answer["targets"] == -1
            assert np.isnan(answer["heatmaps"]).all()
        else:
            # Joined with others: the last bits of a product may depend on the batch.
            expected = _expected(server, batch[number : number + 1], targets[number : number + 1])
            np.testing.assert_allclose(answer["heatmaps"], expected["heatmaps"], atol=1e-6)


def test_warm_ups_ran_before_the_server_was_ready(server: _Server) -> None:
    """A batch of one and one of eight."""
    before, loaded, _ = (server.folder / "server.log").read_text().partition("successfully loaded 'dogs'")
    assert loaded
    assert "a batch of 1\n" in before
    assert "a batch of 8\n" in before


@pytest.mark.parametrize("body", [b"\xff" * 10, b""])
def test_rubbish_bytes_give_400(server: _Server, body: bytes) -> None:
    image = {"name": "image", "datatype": "FP32", "shape": [1, 3, 12, 12], "parameters": {"binary_data_size": 1728}}
    target = {"name": "target", "datatype": "INT64", "shape": [1, 1], "data": [1]}
    head = json.dumps({"inputs": [image, target]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http}/v2/models/dogs/infer",
        head + body,
        {"Inference-Header-Content-Length": str(len(head))},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    assert b"unexpected size for input 'image'" in refused.value.read()


def test_the_example_sends_a_photo_and_gets_an_overlay(server: _Server, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    script = Path(__file__).parents[2] / "examples" / "triton" / "client.py"
    arguments = [f"127.0.0.1:{server.http}", "photos", str(tmp_path / "photo.png"), str(tmp_path / "o.png")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(server.folder / "photos.onnx")
    feeds = {session.get_inputs()[0].name: pixels[None], "target": np.array([[-1]])}
    logits, overlays = session.run(["logits", "overlays"], feeds)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), overlays[0, 0])
    best = np.argsort(-logits[0])[:3]
    assert [line.split()[1] for line in done.stdout.splitlines()] == [_BREEDS[index] for index in best]
