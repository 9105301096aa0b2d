"""The server under load: images per second and latencies, beside `explain_files` on the same photos.

    python -m bench.serving MODEL.onnx [--photos DIR] [--seconds 20] [--users 4]

The load comes from Locust (pip install locust), in a process of its own on the same machine.
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
        with self.client.post("/explain", data=next(self.photos), catch_response=True) as answer:
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = options.photos or _demo_photos(work / "photos")
        print(f"load: {os.getloadavg()[0]:.2f}")
        job = _job(options.model, photos, work)
        full = _served(options.model, photos, work, options, "constant(0)", options.users)
        rate = 0.7 * full["rate"] / options.users
        steady = _served(options.model, photos, work, options, f"constant_throughput({rate})", options.users)
        again = _job(options.model, photos, work)
    print(f"explain_files: {figures(job)} and {figures(again)} images/s")
    print(f"serve, {options.users} clients: {json.dumps(full)}, {full['rate'] / max(job, again):.2f} of explain_files")
    print(f"serve at 70 % load: {json.dumps(steady)}, p99 is {steady['p99'] / steady['p50']:.2f} times p50")


def _demo_photos(folder: Path) -> Path:
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


def _served(
    model: Path, photos: Path, work: Path, options: argparse.Namespace, wait: str, users: int
) -> dict[str, float]:
    (work / "locustfile.py").write_text(_LOCUSTFILE.format(photos=str(photos), wait=wait))
    address = f"http://127.0.0.1:{options.port}"
    command = [sys.executable, "-m", "fastcam", "serve", str(model), "--port", str(options.port)]
    command += [] if options.workers is None else ["--workers", str(options.workers)]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _wait_for(address)
        command = [sys.executable, "-m", "locust", "-f", str(work / "locustfile.py"), "--headless", "--host", address]
        command += ["-u", str(users), "-r", str(users), "-t", f"{options.seconds}s", "--csv", str(work / "load")]
        subprocess.run([*command, "--only-summary"], check=False, capture_output=True)
    finally:
        server.send_signal(signal.SIGTERM)
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
            with urllib.request.urlopen(f"{address}/v2/health/ready"):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
