"""Which method to trust, and what it costs: `python -m bench.methods --weights FILE --write docs`.

Three networks (`bench.stamp_networks`) explain cut-out photos (Debian's package tuxpaint-stamps-default) whose masks
are known. For each network: a sheet of every method on the same six pictures; every method by every metric, with 95 %
intervals, beside the baselines; the time of one heatmap; and faithfulness over time as a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import fastcam
from bench.harness import RESULTS
from bench.stamp_networks import Photos, explained, write_photos
from fastcam.evaluating.baselines import BASELINES

NETWORKS = {"vgg16": "VGG16", "efficientnet": "EfficientNet-Lite0", "transformer": "a transformer on its middle"}
_METRICS = ("insertion", "deletion", "average_drop", "road", "sparseness", "pointing", "energy", "iou")
_SIDE, _MARGIN, _HEAD, _GROUPS = 96, 3, 15, 3
_PICTURES, _LEAST, _SLOW = 6, 9, 1000
# Fewer runs than by default where one picture would take minutes.
_SETTINGS: dict[str, dict[str, float]] = {
    "sscam": {"samples": 2},
    "iscam": {"samples": 3},
    "rise": {"masks": 500},
    "expectedgradients": {"samples": 50},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), help="folder of cut-outs")
    parser.add_argument("--weights", default="imagenet", help="'imagenet', or VGG16's notop weights file")
    parser.add_argument(
        "--work", type=Path, default=RESULTS / "methods", help="folder for pictures, models and results"
    )
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="repeatable; all by default")
    parser.add_argument("--evaluate", type=int, default=4, help="pictures per class; 0: times again")
    parser.add_argument("--skip", action="append", default=[], help="a method that is not evaluated; repeatable")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write gallery.md and its pictures from the results")
    parser.add_argument("--no-sheets", dest="sheets", action="store_false", help="do not draw the sheets")
    options = parser.parse_args()
    learned, held_out = write_photos(options.work, options.stamps, 32, 16)
    opened = {
        name: fastcam.Explainer(
            explained(name, learned, options.work, options.weights), device="cpu", background=learned.paths[::6]
        )
        for name in options.network or NETWORKS
    }
    if options.sheets:
        _draw_sheets(opened, held_out, options.work)
    for name, explainer in opened.items():
        path = options.work / f"{name}.json"
        if options.evaluate:
            _evaluate(explainer, held_out, name, options).save(path)
        if path.exists():
            record = json.loads(path.read_text())
            record["milliseconds"] = _times(explainer, held_out.paths[0], record["summary"])
            path.write_text(json.dumps(record))
            print(_table(record))
            _plot(record, NETWORKS[name], options.work / f"{name}-cost.png")
    if options.write:
        _write_page(options.work, options.write)


_PAGE = """# Gallery: every method, three networks, and what it costs

Written by `python -m bench.methods --write docs` on {date}: nine kinds of cut-out photos on varied backgrounds, of
objects that no network has seen, each with the mask of its object (as in [training.md](training.md)). Six of them,
which all three networks classify correctly, are shown for every method that the network's file offers. What the methods
do, and their sources: [methods.md](methods.md).

The metrics ([evaluation.md](evaluation.md)) are means with 95 % intervals over as many pictures as the heading says.
"random", "centre" and "edges" know nothing of the network. **With so few pictures most intervals overlap.** The last
column names the baselines that a method beats in insertion for certain, picture by picture. Times are those of one
heatmap on {processors} processors.
"""


def _write_page(work: Path, folder: Path) -> None:
    """Write the page from what the work folder holds."""
    parts = [_PAGE.format(date=date.today().isoformat(), processors=os.cpu_count())]
    for name, title in NETWORKS.items():
        path = work / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        count = max(row["values"] for row in record["summary"])
        parts.append(f"## {title}\n")
        parts.append(f"![Every method on six pictures](gallery-{name}.jpg)\n")
        parts.append(f"### {count} pictures\n\n{_table(record)}\n")
        parts.append(f"![Insertion over milliseconds per heatmap](cost-{name}.png)\n")
        shutil.copyfile(work / f"{name}.jpg", folder / f"gallery-{name}.jpg")
        shutil.copyfile(work / f"{name}-cost.png", folder / f"cost-{name}.png")
    (folder / "gallery.md").write_text("\n".join(parts), encoding="utf-8")


def _draw_sheets(opened: Mapping[str, fastcam.Explainer], photos: Photos, folder: Path) -> None:
    """Draw the methods of each network on pictures of different classes that all of them classify correctly."""
    right = np.ones(len(photos.paths), bool)
    for name, explainer in opened.items():
        correct = explainer(photos.paths).targets[:, 0] == photos.labels
        print(f"{name}: {correct.mean():.1%} of {len(correct)} held-out pictures are classified correctly", flush=True)
        right &= correct
    first = [np.flatnonzero(right & (photos.labels == label))[:1] for label in range(len(photos.classes))]
    chosen = [photos.paths[index] for index in np.concatenate(first)[:_PICTURES]]
    for name, explainer in opened.items():
        _sheet(explainer, chosen).save(folder / f"{name}.jpg", quality=80)


def _evaluate(
    explainer: fastcam.Explainer, photos: Photos, name: str, options: argparse.Namespace
) -> fastcam.Evaluation:
    of_class = [np.flatnonzero(photos.labels == label) for label in range(len(photos.classes))]
    numbers = [int(index) for indices in of_class for index in indices[: options.evaluate]]
    methods = [method for method in _methods(explainer) if method not in options.skip]
    return fastcam.evaluate(
        explainer,
        [photos.paths[index] for index in numbers],
        methods=methods,
        metrics=list(_METRICS),
        masks=[photos.masks[index] for index in numbers],
        method_settings={key: value for key, value in _SETTINGS.items() if key in methods},
        progress=lambda done, count: print(f"{name}: {done} of {count}", flush=True),
    )


def _methods(explainer: fastcam.Explainer) -> list[str]:
    """Return what the file offers; "cam" only where the head is linear."""
    evidence, _ = explainer.evidence(
        np.zeros((1, *explainer.signature[0][next(iter(explainer.signature[0]))][1:]), np.float32)
    )
    return [name for name in explainer.methods if name != "cam" or evidence.has_linear_head()]


def _sheet(explainer: fastcam.Explainer, paths: Sequence[Path]) -> Image.Image:
    """Return the methods in groups of rows, each with its overlays of the pictures side by side."""
    methods = _methods(explainer)
    lines = -(-len(methods) // _GROUPS)
    width, height = len(paths) * (_SIDE + _MARGIN) + 3 * _MARGIN, _SIDE + _HEAD + _MARGIN
    sheet = Image.new("RGB", (_GROUPS * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(methods):
        left, top = index // lines * width, index % lines * height
        draw.text((left + 2, top + 1), name, fill="black")
        found = explainer(list(paths), method=name, settings=_SETTINGS.get(name))
        for place, image in enumerate(found):
            overlay = Image.fromarray(image.overlay()).resize((_SIDE, _SIDE))
            sheet.paste(overlay, (left + place * (_SIDE + _MARGIN), top + _HEAD))
    return sheet


def _times(explainer: fastcam.Explainer, path: Path, summary: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median time of one heatmap by each method; those above a second run once."""
    found = {}
    for name in dict.fromkeys(row["method"] for row in summary):
        if name in BASELINES:
            continue
        # The first call opens sessions.
        samples = [_milliseconds(explainer, path, name)]
        if samples[0] < _SLOW:
            samples = [_milliseconds(explainer, path, name) for _ in range(_LEAST)]
        found[name] = statistics.median(samples)
    return found


def _milliseconds(explainer: fastcam.Explainer, path: Path, method: str) -> float:
    begin = time.perf_counter()
    explainer(path, method=method, settings=_SETTINGS.get(method))
    return (time.perf_counter() - begin) * 1e3


def _table(record: Mapping[str, Any]) -> str:
    """Return a row for each method and baseline: means with intervals, time, and whom it beats in the first metric."""
    cells = {(row["method"], row["metric"]): row for row in record["summary"]}
    names = dict.fromkeys(row["method"] for row in record["summary"] if row["metric"] == _METRICS[0])
    lines = [
        "| method | " + " | ".join(_METRICS) + " | ms | better than |",
        "|---|" + "---:|" * (len(_METRICS) + 1) + "---|",
    ]
    for name in names:
        numbers = (cells[name, metric] for metric in _METRICS)
        texts = [f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in numbers]
        time_taken = record["milliseconds"].get(name)
        beaten = ", ".join(cells[name, _METRICS[0]]["better_than"])
        shown = "" if time_taken is None else f"{time_taken:.0f}"
        lines.append(f"| {name} | {' | '.join(texts)} | {shown} | {beaten} |")
    return "\n".join(lines)


def _plot(record: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw insertion with its interval over the time of one heatmap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in record["summary"] if row["metric"] == "insertion"]
    for row in rows:
        if row["method"] in BASELINES:
            axis.axhline(row["mean"], color="#b9bec6", linewidth=1, zorder=0)
            place: Any = ("axes fraction", "data")
            axis.annotate(row["method"], (1, row["mean"]), xycoords=place, ha="right", fontsize=8, color="#777777")
            continue
        at = record["milliseconds"][row["method"]]
        axis.plot([at, at], [row["low"], row["high"]], color="#1f6fb4", linewidth=0.8, alpha=0.5)
        axis.plot(at, row["mean"], "o", color="#1f6fb4", markersize=4)
    methods = [row for row in rows if row["method"] not in BASELINES]
    for names, at, mean in _together(methods, record["milliseconds"]):
        axis.annotate("\n".join(names), (at, mean), (5, 0), textcoords="offset points", fontsize=6.5, va="center")
    axis.set_xscale("log")
    axis.set_xlabel("milliseconds per heatmap")
    axis.set_ylabel("insertion: area under the class's probability")
    axis.set_title(f"{title}: faithfulness over time, 95 % intervals, baselines in grey", fontsize=10, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=100)


def _together(
    rows: Sequence[Mapping[str, Any]], times: Mapping[str, float]
) -> Iterator[tuple[list[str], float, float]]:
    """Yield the labels of the points: methods whose points would hide each other's names share one, on the right."""
    left = sorted(rows, key=lambda row: times[row["method"]])
    while left:
        first = left[0]
        near = [
            row
            for row in left
            if times[row["method"]] < 2.2 * times[first["method"]] and abs(row["mean"] - first["mean"]) < 0.006
        ]
        left = [row for row in left if row not in near]
        names = [row["method"] for row in near]
        yield names, max(times[name] for name in names), statistics.mean(row["mean"] for row in near)


if __name__ == "__main__":
    main()
