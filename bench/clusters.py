"""Pictures per second of `explain_dataset` on a Ray node of this machine, beside `explain_files` on the same photos.

    python -m bench.clusters [--pictures 600] [--rounds 3]

EfficientNet-Lite0 with the demo's photos as JPEG files. Both run in turn; the cluster is started once, before that.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import fastcam
from bench.networks import lite0
from bench.serving import demo_photos
from fastcam.demo.network import class_names
from fastcam.demo.run import PREPROCESSING
from fastcam.ray import explain_dataset


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(prog="python -m bench.clusters", description=__doc__)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ray.init(num_cpus=os.cpu_count(), log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rates: dict[str, list[float]] = {"explain_files": [], "explain_dataset": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = work / "lite0.onnx"
        fastcam.export(lite0(), model, classes=class_names(), preprocess=PREPROCESSING)
        sources = sorted(demo_photos(work / "sources").iterdir())
        photos = work / "photos"
        photos.mkdir()
        for number in range(options.pictures):
            (photos / f"{number:05}.jpg").write_bytes(sources[number % len(sources)].read_bytes())
        print(f"load: {os.getloadavg()[0]:.2f}")
        for turn in range(options.rounds):
            # Without overlays on either side: what a dataset of this size is stored as.
            begin = time.perf_counter()
            explain_dataset(model, photos, str(work / f"ray{turn}"), device="cpu", report=False, rows_per_file=64)
            rates["explain_dataset"].append(options.pictures / (time.perf_counter() - begin))
            begin = time.perf_counter()
            fastcam.explain_files(model, photos, work / f"files{turn}", device="cpu", format="npy", size="input")
            rates["explain_files"].append(options.pictures / (time.perf_counter() - begin))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name}: {medians[name]:.1f} pictures/s, {[round(rate, 1) for rate in found]}")
    print(f"explain_dataset makes {medians['explain_dataset'] / medians['explain_files']:.2f} of explain_files")


if __name__ == "__main__":
    main()
