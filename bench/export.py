"""How long exporting a full-size Keras VGG16 takes, and how much memory.

``python -m bench.export`` saves a VGG16 of 15 classes as .keras, exports it in processes of their own (TensorFlow's
start included), and prints wall time and peak memory; the samples go to results/export.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .harness import save, table

PACKAGES = ("fastcam", "tensorflow-cpu", "tensorflow", "keras", "tf2onnx", "onnx", "numpy")

_MAKE = """
import sys, keras
keras.applications.VGG16(weights=None, input_shape=(224, 224, 3), classes=15).save(sys.argv[1])
"""
_EXPORT = """
import resource, sys, fastcam
fastcam.export(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "vgg16.keras", Path(folder) / "vgg16.onnx"
        subprocess.run([sys.executable, "-c", _MAKE, source], check=True, capture_output=True)
        for _ in range(runs):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _EXPORT, source, path], check=True, capture_output=True, text=True
            )
            samples.append({"seconds": time.perf_counter() - start, "peak_bytes": int(done.stdout)})
        size = path.stat().st_size
    seconds = statistics.median(sample["seconds"] for sample in samples)
    peak = max(sample["peak_bytes"] for sample in samples)
    print(
        table(
            ["network", "seconds (median)", "peak GB", "file MB"],
            [["VGG16", f"{seconds:.1f}", f"{peak / 1e9:.2f}", f"{size / 1e6:.1f}"]],
        )
    )
    print(f"written to {save('export', PACKAGES, {'file_bytes': size, 'runs': samples})}")


if __name__ == "__main__":
    main()
