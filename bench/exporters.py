"""fastcam's forward graphs beside those of tf2onnx and of Keras itself.

``python -m bench.exporters`` saves networks of keras.applications as .keras and exports each with the three, every time
in a process of its own (TensorFlow's start included): seconds, peak memory, nodes. Then it times the forward passes in
ONNX Runtime in this process, in turns, and writes results/exporters.json. Of fastcam's file only what makes the logits
counts. A contestant that fails is noted with its error.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.utils import extract_model

from .harness import Timing, interleave, save, table

PACKAGES = ("fastcam", "tensorflow-cpu", "tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "numpy")

# Rounds of the timing, and samples in a turn.
_ROUNDS, _BURST = 12, 4
_PATIENCE = 1800

FAMILIES = (
    "MobileNetV2 MobileNetV3Small MobileNetV3Large ResNet50 ResNet50V2 EfficientNetB0 EfficientNetV2B0 DenseNet121 "
    "InceptionV3 InceptionResNetV2 Xception NASNetMobile ConvNeXtTiny VGG19"
).split()

# Normalisations as after training: an exporter may drop a shift of 0 and a scale of 1.
_MAKE = """
import sys, keras, numpy as np
family, path = sys.argv[1:]
make = getattr(keras.applications, family)
model = make(weights=None, input_shape=(224, 224, 3), classifier_activation=None)
generator = np.random.default_rng(0)
for variable in model.variables:
    if len(variable.shape) == 1:
        low, high = (0.8, 1.2) if variable.name in ("gamma", "moving_variance", "variance") else (-0.1, 0.1)
        variable.assign(generator.uniform(low, high, variable.shape).astype(np.float32))
model.save(path)
"""

# Each reads the .keras file argv[1] and writes the ONNX file argv[2].
_EXPORTERS = {
    "fastcam": "import fastcam; fastcam.export(source, path)",
    "tf2onnx": """
import keras, tf2onnx, tensorflow as tf
model = keras.models.load_model(source, compile=False)
signature = [tf.TensorSpec((None, 224, 224, 3), tf.float32, name="images")]
tf2onnx.convert.from_keras(model, input_signature=signature, opset=18, output_path=path)
""",
    "Keras": """
import keras, numpy as np
model = keras.models.load_model(source, compile=False)
model(np.zeros((1, 224, 224, 3), np.float32))
model.export(path, format="onnx", verbose=False)
""",
}
_MEASURED = """
import resource, sys
source, path = sys.argv[1:]
{export}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # All exports before all sessions: a process starts with the peak memory of the one that starts it.
        results = {family: _export_all(family, folder, arguments.runs) for family in arguments.families}
        for family, contestants in results.items():
            for exporter, timing in _time(family, folder, contestants, arguments.threads).items():
                contestants[exporter] |= {"forward_seconds": timing.samples}
    rows = [row for family, contestants in results.items() for row in _rows(family, contestants)]
    print(table(["network", "exporter", "seconds", "peak GB", "nodes", "forward ms", "fastcam's share"], rows))
    print(f"written to {save('exporters', PACKAGES, {'threads': arguments.threads, 'networks': results})}")


def _export_all(family: str, folder: Path, runs: int) -> dict[str, dict[str, Any]]:
    source = folder / f"{family}.keras"
    subprocess.run([sys.executable, "-c", _MAKE, family, source], check=True, capture_output=True)
    found = {exporter: _export(exporter, source, _path(folder, family, exporter), runs) for exporter in _EXPORTERS}
    source.unlink()
    return found


def _export(exporter: str, source: Path, path: Path, runs: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _MEASURED.format(export=_EXPORTERS[exporter]), str(source), str(path)]
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines()
            return {"error": f"status {error.returncode}: {lines[-1] if lines else ''}"}
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {_PATIENCE} s"}
        samples.append({"seconds": time.perf_counter() - start, "peak_bytes": int(done.stdout.splitlines()[-1])})
    if exporter == "fastcam":
        inputs = [info.name for info in onnx.load(path).graph.input if info.name != "target"]
        extract_model(path, path, inputs, ["logits"])
    return {"runs": samples, "nodes": len(onnx.load(path).graph.node)}


def _path(folder: Path, family: str, exporter: str) -> Path:
    return folder / f"{family}-{exporter}.onnx"


def _time(family: str, folder: Path, contestants: dict[str, dict[str, Any]], threads: int) -> dict[str, Timing]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    image = np.random.default_rng(1).uniform(0, 255, (1, 224, 224, 3)).astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    scores = []
    for exporter, result in contestants.items():
        if "error" in result:
            continue
        try:
            session = onnxruntime.InferenceSession(_path(folder, family, exporter), options)
            runs[exporter] = partial(session.run, None, {session.get_inputs()[0].name: image})
            scores.append(runs[exporter]()[0])
        except Exception as error:  # noqa: BLE001  # whatever ONNX Runtime makes of a contestant's file
            runs.pop(exporter, None)
            result["error"] = f"does not run: {error}"
    if not all(np.allclose(other, scores[0], rtol=1e-3, atol=1e-3 * np.abs(scores[0]).max()) for other in scores):
        raise SystemExit(f"{family}: the exported models give different scores")
    return interleave(runs, rounds=_ROUNDS, burst=_BURST, settle=2)


def _rows(family: str, contestants: dict[str, dict[str, Any]]) -> list[list[object]]:
    medians = {
        exporter: statistics.median(result["forward_seconds"])
        for exporter, result in contestants.items()
        if "error" not in result
    }
    rows: list[list[object]] = []
    for exporter, result in contestants.items():
        if "error" in result:
            rows.append([family, exporter, result["error"][:60], "", "", "", ""])
            continue
        rows.append(
            [
                family,
                exporter,
                f"{statistics.median(run['seconds'] for run in result['runs']):.1f}",
                f"{max(run['peak_bytes'] for run in result['runs']) / 1e9:.2f}",
                result["nodes"],
                f"{medians[exporter] * 1e3:.2f}",
                f"{medians['fastcam'] / medians[exporter]:.3f}" if "fastcam" in medians else "",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
