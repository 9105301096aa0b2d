"""Time, memory and results of exporting Keras models, compared with tf2onnx and Keras itself.

Networks of keras.applications are saved as .keras; each exporter reads the file and writes ONNX in a separate process
(including TensorFlow's start): seconds and peak memory. Then the forward passes of the files are timed in ONNX Runtime
in this process, in turn; of fastcam's file only the part that computes the logits counts. A contestant that fails or
takes too much time or memory is stopped and reported.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.utils import extract_model

from . import plots
from .harness import Case, Measurement, Pace, Record, Settings, Timing, figures, interleave, markdown
from .networks import SAVE_KERAS, run_python
from .runtimes import open_session

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "seconds, memory and speed of exported Keras models, against tf2onnx and Keras' exporter"
PACKAGES = ("fastcam", "tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "onnx", "onnxruntime", "numpy")
OWN = "fastcam"

# Limits of a contestant: more is not a practical way to export on a typical machine.
_PATIENCE_SECONDS = 150
_MOST_BYTES = 10e9

FAMILIES = (
    "MobileNetV2 VGG16 ResNet50 EfficientNetB0 MobileNetV3Small MobileNetV3Large ResNet50V2 EfficientNetV2B0 "
    "DenseNet121 InceptionV3 Xception ConvNeXtTiny NASNetMobile InceptionResNetV2 VGG19"
).split()

# Each reads the .keras file argv[1] and writes the ONNX file argv[2].
_EXPORTERS = {
    OWN: "import fastcam; fastcam.export(source, path)",
    "tf2onnx": """
import keras, tf2onnx, tensorflow as tf
model = keras.models.load_model(source, compile=False)
signature = [tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")]
tf2onnx.convert.from_keras(model, input_signature=signature, opset=18, output_path=path)
""",
    "Keras": """
import keras, numpy as np
model = keras.models.load_model(source, compile=False)
model(np.zeros((1, *model.input_shape[1:]), np.float32))
model.export(path, format="onnx", verbose=False)
""",
}
_MEASURED = """
import sys
source, path = sys.argv[1:]
{export}
"""


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [_case(settings, "MobileNetV2", 96, 40)]
    # Networks with 100 layers or more are slower, and VGG's weights are too much for some exporters.
    return [_case(settings, family, 224, 110 if family.startswith("VGG") else 55) for family in FAMILIES]


def _case(settings: Settings, family: str, side: int, seconds: float) -> Case:
    return Case(family, seconds, lambda allowance: _measure(settings, family, side, allowance))


def _measure(settings: Settings, family: str, side: int, allowance: float) -> Measurement:
    begin = time.perf_counter()
    source = settings.folder / f"{family}.keras"
    run_python(SAVE_KERAS, family, str(source), "1000", str(side), "linear")
    paths = {exporter: settings.folder / f"{family}-{exporter}.onnx" for exporter in _EXPORTERS}
    samples: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    missing: dict[str, str] = {}
    for exporter in _EXPORTERS:
        try:
            seconds, peaks[exporter] = _export(exporter, source, paths[exporter])
        except RuntimeError as error:
            missing[exporter] = str(error)
        else:
            samples[exporter] = [seconds]
    source.unlink()
    nodes = _nodes(samples, paths)
    forwards = _time_forward(
        list(samples), paths, settings.threads, side, missing, allowance - (time.perf_counter() - begin)
    )
    for path in paths.values():
        path.unlink(missing_ok=True)
    facts = {
        "peak_bytes": peaks,
        "nodes": nodes,
        "forward_seconds": {name: timing.samples for name, timing in forwards.items()},
    }
    return Measurement(samples, facts, missing)


def _export(exporter: str, source: Path, path: Path) -> tuple[float, int]:
    """Return seconds and peak resident bytes of a process that exports."""
    code = _MEASURED.format(export=_EXPORTERS[exporter])
    return run_watched([sys.executable, "-c", code, str(source), str(path)], _PATIENCE_SECONDS, _MOST_BYTES)


def run_watched(command: list[str], most_seconds: float, most_bytes: float) -> tuple[float, int]:
    """Run a process; return its seconds and its peak resident bytes, sampled every 20 ms.

    Raises
    ------
    RuntimeError
        It fails, or is stopped because it exceeds the limits.
    """
    import psutil

    begin = time.perf_counter()
    peak = 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            peak = max(peak, _resident(process))
            seconds = time.perf_counter() - begin
            if seconds > most_seconds or peak > most_bytes:
                raise RuntimeError(f"stopped after {seconds:.0f} s at {peak / 1e9:.1f} GB")
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        lines = process.stderr.read().strip().splitlines()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()
    if process.returncode != 0:
        raise RuntimeError(f"status {process.returncode}: {lines[-1] if lines else 'no message'}")
    return seconds, peak


def _resident(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0


def _nodes(exporters: dict[str, list[float]], paths: dict[str, Path]) -> dict[str, int]:
    if OWN in exporters:
        inputs = [value.name for value in onnx.load(paths[OWN], load_external_data=False).graph.input]
        extract_model(paths[OWN], paths[OWN], [name for name in inputs if name != "target"], ["logits"])
    return {name: len(onnx.load(paths[name], load_external_data=False).graph.node) for name in exporters}


def _time_forward(
    exporters: list[str], paths: dict[str, Path], threads: int, side: int, missing: dict[str, str], seconds: float
) -> dict[str, Timing]:
    image = np.random.default_rng(1).uniform(0, 255, (1, side, side, 3)).astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    expected = None
    for exporter in exporters:
        try:
            session = open_session(paths[exporter], threads)
            run = partial(session.run, None, {session.get_inputs()[0].name: image})
            scores = run()[0]
        except Exception as error:  # noqa: BLE001  # whatever ONNX Runtime raises for a contestant's file
            missing[f"{exporter}, forward pass"] = f"does not run: {str(error).splitlines()[0][:150]}"
            continue
        expected = scores if expected is None else expected
        if not np.allclose(scores, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
            missing[f"{exporter}, forward pass"] = "different scores"
            continue
        runs[exporter] = run
    return interleave(runs, Pace(min(seconds, 20), turn=0.2)) if runs else {}


def write(record: Record) -> str:
    rows: list[list[object]] = []
    for key, case in record.cases.items():
        facts, medians = case["facts"], record.medians(key)
        forwards = {name: Timing(tuple(values)).median for name, values in facts["forward_seconds"].items()}
        for exporter in _EXPORTERS:
            name = f"{key}, {exporter}"
            if exporter not in medians:
                rows.append([name, f"- {case['missing'].get(exporter, '')}", "", "", "", ""])
                continue
            forward = forwards.get(exporter)
            share = f"{forward / forwards[OWN]:.2f}x" if forward and OWN in forwards else "-"
            pass_ms = figures(forward * 1e3) if forward else "-"
            peak = f"{facts['peak_bytes'][exporter] / 1e9:.2f}"
            rows.append([name, f"{medians[exporter]:.1f}", peak, facts["nodes"][exporter], pass_ms, share])
    return markdown(["network, exporter", "seconds", "peak GB", "nodes", "forward pass, ms", "ratio to fastcam"], rows)


def draw(record: Record) -> Figure:
    panels = []
    for unit, title in (("s", "seconds"), ("GB", "peak memory, GB"), ("ms", "forward pass in ONNX Runtime, ms")):
        panels += [_panel(record, key, unit, title) for key in list(record.cases)[:4]]
    return plots.bars([panel for panel in panels if panel.values], "", columns=min(4, len(record.cases)), best="")


def _panel(record: Record, key: str, unit: str, title: str) -> plots.Panel:
    facts = record.cases[key]["facts"]
    values = {
        "s": record.medians(key),
        "GB": {name: found / 1e9 for name, found in facts["peak_bytes"].items()},
        "ms": {name: 1e3 * Timing(tuple(each)).median for name, each in facts["forward_seconds"].items()},
    }[unit]
    return plots.Panel(f"{key}: {title}", values, OWN, unit="")
