"""Files that draw their own heatmaps: ``python -m bench.drawn [PART ...]``.

- runtime: one run of a file with ``draw="heatmaps"`` against the plain forward pass of the same network, in ONNX
  Runtime on one thread, where processor time is wall time.
- openvino: scores and heatmap by ``Explainer(device="openvino")`` against OpenVINO's plain forward pass.
- browser: the same two files in headless Chromium, by ONNX Runtime Web on one thread of WebAssembly; needs npm and
  chromedriver.

Interleaved runs, ratios of medians; samples in results/drawn.json.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastcam
from fastcam.web.runtime import PACKAGE
from fastcam.web.site import build_site

from .harness import Contestants, Pace, interleave, save, table
from .networks import CLASSES, drawn_images, lite0, vgg16
from .overhead import _extract_logits
from .runtimes import open_session

PACKAGES = ("fastcam", "numpy", "onnxruntime", "openvino")


def _export_mobilenet(path: Path, **options: Any) -> None:
    import keras

    keras.utils.set_random_seed(0)
    fastcam.export(keras.applications.MobileNetV2(weights=None, classes=CLASSES), path, **options)


_DRAWING: dict[str, Any] = {"draw": "heatmaps", "target": "required"}
_NETWORKS: dict[str, Callable[..., object]] = {
    "VGG16": lambda path, **options: fastcam.export(vgg16().to_onnx(), path, **options),
    "MobileNetV2": _export_mobilenet,
    "EfficientNet-Lite0": lambda path, **options: fastcam.export(lite0(), path, **options),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*_PARTS, []], help="all by default")
    parser.add_argument("--seconds", type=float, default=40, help="for each network")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for part in arguments.parts or _PARTS:
        with tempfile.TemporaryDirectory() as folder:
            results[part] = _PARTS[part](Path(folder), arguments.seconds)
    print(f"written to {save('drawn', PACKAGES, results)}")


def _timed(title: str, contestants: Contestants, seconds: float) -> dict[str, list[float]]:
    """Interleave, print medians and their ratios to the first contestant, and return the samples."""
    timings = interleave(contestants, Pace(seconds, least=7, turn=0.3))
    base = next(iter(timings.values())).median
    rows = [[name, f"{1e3 * one.median:.2f}", f"{one.median / base:.3f}"] for name, one in timings.items()]
    print(table([title, "ms", "ratio"], rows))
    return {name: list(one.samples) for name, one in timings.items()}


def _runtime(folder: Path, seconds: float) -> dict[str, Any]:
    results = {}
    for network, export in _NETWORKS.items():
        explained, plain, drawn = (folder / f"{network}-{kind}.onnx" for kind in ("explained", "plain", "drawn"))
        export(explained)
        _extract_logits(explained, plain)
        export(drawn, **_DRAWING)
        bare, drawing = open_session(plain, 1), open_session(drawn, 1)
        name = bare.get_inputs()[0].name
        image = drawn_images(1, bare.get_inputs()[0].shape[1:])
        contestants: dict[str, Callable[[], object]] = {"plain": functools.partial(bare.run, None, {name: image})}
        for count in (1, CLASSES):
            feeds = {drawing.get_inputs()[0].name: image, "target": -np.arange(1, count + 1)[None]}
            contestants[f"drawn, K = {count}"] = functools.partial(drawing.run, ["logits", "heatmaps"], feeds)
        results[network] = _timed(network, contestants, seconds)
    return results


def _openvino(folder: Path, seconds: float) -> dict[str, Any]:
    import openvino

    results = {}
    for network, export in _NETWORKS.items():
        explained, plain = (folder / f"{network}-{kind}.onnx" for kind in ("explained", "plain"))
        export(explained)
        _extract_logits(explained, plain)
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(plain, "CPU", settings)
        explainer = fastcam.Explainer(explained, device="openvino")
        runtime = fastcam.Explainer(explained, device="cpu", convolutions="onnxruntime")
        image = drawn_images(1, explainer.signature[0][next(iter(explainer.signature[0]))][1:])
        contestants: dict[str, Callable[[], object]] = {
            "OpenVINO, plain": functools.partial(compiled, image),
            'Explainer(device="openvino")': functools.partial(explainer, image),
            "Explainer, ONNX Runtime": functools.partial(runtime, image),
        }
        results[network] = _timed(network, contestants, seconds)
    return results


_SCRIPT = """
const [sides, rounds, done] = arguments;
(async () => {
  const ort = await import("/ort/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("/ort/", location).href;
  ort.env.wasm.numThreads = 1;
  const open = async (name) => ort.InferenceSession.create(
    new Uint8Array(await (await fetch(name)).arrayBuffer()), { executionProviders: ["wasm"] });
  const [plain, drawn] = [await open("/plain.onnx"), await open("/model.onnx")];
  const floats = new Float32Array(sides[1] * sides[2] * sides[3]).map((_, i) => (i % 255) / 127 - 1);
  const pixels = new Uint8Array(floats.length).map((_, i) => i % 255);
  const runs = {
    plain: () => plain.run({ [plain.inputNames[0]]: new ort.Tensor("float32", floats, sides) }),
    drawn: () => drawn.run({
      pictures: new ort.Tensor("uint8", pixels, [1, sides[2], sides[3], 3]),
      target: new ort.Tensor("int64", [-1n], [1, 1]) }, ["logits", "heatmaps"]),
  };
  const samples = { plain: [], drawn: [] };
  for (let round = -2; round < rounds; round++)
    for (const [name, run] of Object.entries(runs)) {
      const begin = performance.now();
      await run();
      if (round >= 0) samples[name].push((performance.now() - begin) / 1000);
    }
  done(samples);
})().catch((error) => done({ error: String(error) }));
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None: ...


def _browser(folder: Path, seconds: float) -> dict[str, Any]:
    from selenium import webdriver

    command = ["npm", "pack", PACKAGE, "--silent"]
    archive = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    explained, drawn = folder / "explained.onnx", folder / "drawn.onnx"
    fastcam.export(lite0(), explained)
    fastcam.export(lite0(), drawn, **_DRAWING, picture="input", preprocess="symmetric")
    build_site(drawn, folder / "site", archive=folder / archive.stdout.strip())
    _extract_logits(explained, folder / "site" / "plain.onnx")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder / "site"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(600)
        # A page without the site's content security policy, from the same server.
        driver.get(f"http://127.0.0.1:{server.server_port}/model.json")
        samples = driver.execute_async_script(_SCRIPT, [1, 3, 224, 224], max(7, int(seconds)))
    finally:
        driver.quit()
        server.shutdown()
    if "error" in samples:
        raise SystemExit(samples["error"])
    base = statistics.median(samples["plain"])
    rows = [
        [name, f"{1e3 * statistics.median(found):.1f}", f"{statistics.median(found) / base:.3f}"]
        for name, found in samples.items()
    ]
    print(table(["EfficientNet-Lite0 in Chromium", "ms", "ratio"], rows))
    return dict(samples)


_PARTS = {"runtime": _runtime, "openvino": _openvino, "browser": _browser}


if __name__ == "__main__":
    main()
