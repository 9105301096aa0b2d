"""The server under load: images per second and latencies, beside `explain_files` on the same photos.

    python -m bench.serving MODEL.onnx [--photos DIR] [--seconds 20] [--users 4] [--peers]

The load comes from Locust (pip install locust), in a process of its own on the same machine. With --peers, services
written with LitServe and BentoML (`bench.recipes`) answer the same requests, by Explainer and by pytorch-grad-cam on an
EfficientNet-Lite0 (pip install litserve bentoml efficientnet_lite_pytorch).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import fastcam

from .harness import figures

_LOCUSTFILE = """
import itertools
from pathlib import Path
from locust import FastHttpUser, constant, constant_throughput, task

PHOTOS = [path.read_bytes() for path in sorted(Path({photos!r}).iterdir())]

class Client(FastHttpUser):
    wait_time = {wait}
    def on_start(self):
        self.photos = itertools.cycle(PHOTOS)
    @task
    def explain(self):
        photo = next(self.photos)
        with self.client.post({route!r}, **{request}, catch_response=True) as answer:
            if answer.status_code != 200 or not answer.content.startswith(b"\\xff\\xd8"):
                answer.failure("no JPEG")
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", type=Path, help="JPEG files; by default those of the demo")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--peers", action="store_true", help="also ask services written with LitServe and BentoML")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = options.photos or demo_photos(work / "photos")
        print(f"load: {os.getloadavg()[0]:.2f}")
        job = _job(options.model, photos, work)
        own = _Service(_own_command(options), "/explain", "{'data': photo}", "/v2/health/ready", {})
        full = _served(own, photos, work, options, "constant(0)")
        rate = 0.7 * full["rate"] / options.users
        steady = _served(own, photos, work, options, f"constant_throughput({rate})")
        services = _peers(options) if options.peers else {}
        peers = {name: _served(one, photos, work, options, "constant(0)") for name, one in services.items()}
        again = _job(options.model, photos, work)
    print(f"explain_files: {figures(job)} and {figures(again)} images/s")
    print(f"serve, {options.users} clients: {json.dumps(full)}, {full['rate'] / max(job, again):.2f} of explain_files")
    for name, found in peers.items():
        print(f"{name}: {json.dumps(found)}, {found['rate'] / full['rate']:.2f} of serve")
    print(f"serve at 70 % load: {json.dumps(steady)}, p99 is {steady['p99'] / steady['p50']:.2f} times p50")


def demo_photos(folder: Path) -> Path:
    """Write the demo's photos as JPEG files, and return their folder."""
    from PIL import Image
    from skimage import data

    folder.mkdir()
    for name in ("astronaut", "cat", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg")
    return folder


def _job(model: Path, photos: Path, work: Path) -> float:
    """Return the images per second of a folder job over the photos, repeated to a few hundred."""
    many = work / "many"
    many.mkdir(exist_ok=True)
    sources = sorted(photos.iterdir())
    for number in range(300):
        link = many / f"{number:03}.jpg"
        if not link.exists():
            link.write_bytes(sources[number % len(sources)].read_bytes())
    out = Path(tempfile.mkdtemp(dir=work))
    begin = time.perf_counter()
    fastcam.explain_files(model, many, out, batch_size=1, report=False)
    return 300 / (time.perf_counter() - begin)


class _Service(NamedTuple):
    """A server's command, how to ask it, where it says that it is ready, and its environment."""

    command: list[str]
    route: str
    request: str
    ready: str
    environment: dict[str, str]


def _own_command(options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "fastcam", "serve", str(options.model), "--port", str(options.port)]
    command += [] if options.workers is None else ["--workers", str(options.workers)]
    return command + ([] if options.threads is None else ["--threads", str(options.threads)])


def _peers(options: argparse.Namespace) -> dict[str, _Service]:
    """Return both servers with both explainers, each with a process and a thread per processor."""
    port, workers = str(options.port), str(os.cpu_count() or 1)
    commands = {
        "LitServe": [sys.executable, "-m", "bench.recipes.lit_app", port, workers],
        "BentoML": [
            *(sys.executable, "-m", "bentoml", "serve", "bench.recipes.bento_app:Heatmaps"),
            *("--host", "127.0.0.1", "--port", port),
        ],
    }
    ready = {"LitServe": "/health", "BentoML": "/readyz"}
    request = "{'files': {'request': ('photo.jpg', photo, 'image/jpeg')}}"
    return {
        f"{server} with {recipe}": _Service(
            command,
            "/predict",
            request,
            ready[server],
            {"FASTCAM_RECIPE": recipe, "FASTCAM_MODEL": str(options.model), "FASTCAM_WORKERS": workers},
        )
        for server, command in commands.items()
        for recipe in ("fastcam", "pytorch-grad-cam")
    }


def _served(service: _Service, photos: Path, work: Path, options: argparse.Namespace, wait: str) -> dict[str, float]:
    locustfile = _LOCUSTFILE.format(photos=str(photos), wait=wait, route=service.route, request=service.request)
    (work / "locustfile.py").write_text(locustfile)
    address, users = f"http://127.0.0.1:{options.port}", options.users
    environment = {**os.environ, **service.environment}
    output = subprocess.DEVNULL
    # A group of its own: some servers leave their workers behind.
    server = subprocess.Popen(service.command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        _wait_for(address + service.ready)
        command = [sys.executable, "-m", "locust", "-f", str(work / "locustfile.py"), "--headless", "--host", address]
        command += ["-u", str(users), "-r", str(users), "-t", f"{options.seconds}s", "--csv", str(work / "load")]
        subprocess.run([*command, "--only-summary"], check=False, capture_output=True)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    with (work / "load_stats.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    return {
        "rate": float(row["Requests/s"]),
        "requests": int(row["Request Count"]),
        "failures": int(row["Failure Count"]),
        "p50": float(row["50%"]),
        "p99": float(row["99%"]),
    }


def _wait_for(address: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"there is no answer from {address}")


if __name__ == "__main__":
    main()
