"""How fastcam compares with other ways of computing Grad-CAM.

The same weights and images in fastcam, in hand-written torch and TensorFlow code, and in every installed library.
Before timing, each peer's maps must be those that follow from fastcam's raw maps by the peer's own formula
(`contestants`); a peer that is missing, fails or disagrees is reported and not timed. In addition: the plain forward
pass in the runtimes that a user could choose.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plots
from .contestants import FASTCAM, PEERS, Models, agreement
from .harness import Case, Measurement, Pace, Record, Settings, figures, interleave, markdown
from .networks import Vgg, drawn_images, small, tiny, vgg16
from .runtimes import ONNX_RUNTIME, RUNTIMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "Grad-CAM by fastcam and by every peer; plain forward passes by runtime"
PACKAGES = (
    "fastcam numpy onnxruntime torch captum torchcam grad-cam tensorflow tensorflow-cpu keras tf-keras-vis xplique "
    "openvino MNN"
).split()

PLAIN = "plain forward (ONNX Runtime)"
_RUNTIMES = "plain forward"
EXPLAINED = "fastcam (scores + heatmap)"
_TEXTBOOK = "textbook TensorFlow"


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        models = {"tiny": _models(tiny(), settings, "tiny")}
        return [
            _peers_case(models, "tiny", 1, 1, 60),
            _peers_case(models, "tiny", 2, 3, 60),
            _runtimes_case(models, "tiny", 1, 30),
        ]
    models = {
        "VGG16": _models(vgg16(settings.weights), settings, "vgg16"),
        "small": _models(small(), settings, "small"),
    }
    # Seconds that three rounds take on two cores. The last case takes half an hour.
    return [
        _peers_case(models, "VGG16", 1, 1, 75),
        _runtimes_case(models, "VGG16", 1, 20),
        _peers_case(models, "small", 1, 1, 25),
        _peers_case(models, "VGG16", 16, 1, 250),
        _peers_case(models, "VGG16", 1, 15, 105),
        _peers_case(models, "small", 16, 1, 20),
        _peers_case(models, "small", 1, 15, 20),
        _peers_case(models, "small", 16, 15, 30),
        _runtimes_case(models, "VGG16", 8, 40),
        _runtimes_case(models, "VGG16", 16, 70),
        _peers_case(models, "VGG16", 16, 15, 1500),
    ]


def _models(network: Vgg, settings: Settings, name: str) -> Models:
    folder = settings.folder / name
    folder.mkdir()
    return Models(network, folder, settings.threads)


def _peers_case(models: dict[str, Models], network: str, batch: int, classes: int, seconds: float) -> Case:
    def measure(allowance: float) -> Measurement:
        return _measure_peers(models[network], batch, list(range(classes)), allowance)

    return Case(f"{network}, batch {batch}, {_counted(classes)}", seconds, measure)


def _counted(classes: int) -> str:
    return "1 class" if classes == 1 else f"{classes} classes"


def _runtimes_case(models: dict[str, Models], network: str, batch: int, seconds: float) -> Case:
    return Case(
        f"{_RUNTIMES}: {network}, batch {batch}",
        seconds,
        lambda allowance: _measure_runtimes(models[network], batch, allowance),
    )


def _images(models: Models, batch: int) -> Any:
    network = models.network
    return drawn_images(batch, (network.channels, network.side, network.side))


def _measure_peers(models: Models, batch: int, classes: Sequence[int], allowance: float) -> Measurement:
    begin = time.perf_counter()
    images = _images(models, batch)
    # A loop over classes is right if its first and last results are.
    checked = sorted({classes[0], classes[-1]})
    raw = models.explainer(images, checked, size="layer", normalize=None).maps
    contestants: dict[str, Callable[[], object]] = {PLAIN: RUNTIMES[ONNX_RUNTIME].make(models, images)}
    contestants[PLAIN]()
    missing, errors, known = {}, {}, {}
    for name, peer in PEERS.items():
        try:
            explain = peer.make(models, images)
            start = time.perf_counter()
            found = agreement(name, explain, raw, checked, images.shape[2:])
            known[name] = (time.perf_counter() - start) * len(classes) / len(checked)
        except Exception as error:  # noqa: BLE001  # whatever a peer raises is reported, and the others go on
            missing[name] = why_missing(error)
            continue
        errors[name] = {"median": found.median, "worst": found.worst}
        if found.holds:
            contestants[name] = _asked(explain, classes)
        else:
            missing[name] = f"other maps: relative error {found.median:.1g}, at worst {found.worst:.1g}"
    agreeing = set(PEERS) & set(contestants) - {FASTCAM}
    if FASTCAM not in contestants or (len(errors) > 1 and not agreeing):
        sys.exit(f"fastcam does not agree with any peer: {missing}")
    timings = interleave(contestants, Pace(allowance - (time.perf_counter() - begin)), known=known)
    return Measurement.of(timings, facts={"errors": errors, "maps": batch * len(classes)}, missing=missing)


def _asked(explain: Callable[[Sequence[int]], object], classes: Sequence[int]) -> Callable[[], object]:
    return lambda: explain(classes)


def why_missing(error: Exception) -> str:
    """Return in one line why a peer cannot take part."""
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    lines = str(error).strip().splitlines()
    return f"does not run here ({type(error).__name__}: {lines[0][:150] if lines else 'no message'})"


def _measure_runtimes(models: Models, batch: int, allowance: float) -> Measurement:
    begin = time.perf_counter()
    images = _images(models, batch)
    contestants: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    errors: dict[str, float] = {}
    expected = RUNTIMES[ONNX_RUNTIME].make(models, images)()
    for name, runtime in RUNTIMES.items():
        try:
            run = runtime.make(models, images)
            errors[name] = float(np.abs(run() - expected).max())
        except Exception as error:  # noqa: BLE001  # whatever a runtime raises is reported, and the others go on
            missing[name] = why_missing(error)
            continue
        if errors[name] <= 1e-3:
            contestants[name] = run
        else:
            missing[name] = f"other probabilities: off by {errors[name]:.1g}"
    contestants[EXPLAINED] = lambda: models.explainer(images)
    timings = interleave(contestants, Pace(allowance - (time.perf_counter() - begin)))
    return Measurement.of(timings, facts={"errors": errors}, missing=missing)


def peer_cases(record: Record) -> list[str]:
    """Return the keys of the cases that compare peers."""
    return [key for key in record.cases if not key.startswith(_RUNTIMES)]


def best_peer(medians: dict[str, float]) -> str | None:
    """Return the fastest peer."""
    return min((name for name in PEERS if name in medians and name != FASTCAM), key=medians.__getitem__, default=None)


def comparison(record: Record) -> str:
    """Return the table of peers: milliseconds, and the ratio to fastcam's."""
    keys = peer_cases(record)
    names = [PLAIN, *PEERS]
    rows: list[list[object]] = []
    for name in names:
        cells: list[object] = [f"**{name}**" if name == FASTCAM else name]
        for key in keys:
            medians = record.medians(key)
            if name not in medians:
                cells.append("-")
                continue
            low, high = record.spread(key, name)
            times = medians[name] / medians[FASTCAM]
            cells.append(f"{figures(medians[name] * 1e3)} ({figures(low * 1e3)}..{figures(high * 1e3)}), {times:.2f}x")
        rows.append(cells)
    return markdown(["ms (quartiles), ratio to fastcam", *keys], rows)


def summary(record: Record) -> str:
    """Return the README's table: medians only, of the peers that took part."""
    keys = peer_cases(record)
    peers = [name for name in PEERS if name != FASTCAM and any(name in record.medians(key) for key in keys)]
    header = ["", PLAIN, f"**{FASTCAM}**", *peers]
    rows: list[list[object]] = []
    for key in keys:
        medians = record.medians(key)
        mine = medians[FASTCAM]
        cells: list[object] = [key, f"{figures(medians[PLAIN] * 1e3)} ms", f"**{figures(mine * 1e3)} ms**"]
        cells += [f"{medians[name] / mine:.2f}x" if name in medians else "-" for name in peers]
        rows.append(cells)
    return markdown(header, rows)


def write(record: Record) -> str:
    parts = []
    if peer_cases(record):
        parts += [comparison(record), _agreements(record), _goals(record)]
    runtimes = [key for key in record.cases if key.startswith(_RUNTIMES)]
    if runtimes:
        rows = [[name, *(_share(record, key, name) for key in runtimes)] for name in (*RUNTIMES, EXPLAINED)]
        parts.append(markdown(["ms, times ONNX Runtime's", *runtimes], rows))
    return "\n\n".join(part for part in parts if part)


def _share(record: Record, key: str, name: str) -> str:
    medians = record.medians(key)
    if name not in medians:
        return "-"
    return f"{figures(medians[name] * 1e3)}, {medians[name] / medians[ONNX_RUNTIME]:.2f}x"


def _agreements(record: Record) -> str:
    rows = []
    for name in PEERS:
        found = [
            record.cases[key]["facts"]["errors"][name]
            for key in peer_cases(record)
            if name in record.cases[key]["facts"]["errors"]
        ]
        if found and name != FASTCAM:
            rows.append(
                [name, f"{max(each['median'] for each in found):.1e}", f"{max(each['worst'] for each in found):.1e}"]
            )
    header = ["heatmaps, checked before timing", "relative error, median map", "worst map"]
    return markdown(header, rows) if rows else ""


def _goals(record: Record) -> str:
    """Return lines comparing fastcam with the fastest peer and the textbook code; below 1: slower."""
    lines = []
    for key in peer_cases(record):
        medians = record.medians(key)
        best = best_peer(medians)
        found = [
            f"{medians[name] / medians[FASTCAM]:.2f} times as fast as {said}"
            for name, said in ((best, f"the fastest peer ({best})"), (_TEXTBOOK, "the textbook code"))
            if name is not None and name in medians
        ]
        if found:
            lines.append(f"- {key}: {' and '.join(found)}")
    return "fastcam is:\n\n" + "\n".join(lines) if lines else ""


def draw(record: Record) -> Figure:
    panels = []
    for key in record.cases:
        medians = record.medians(key)
        own = ONNX_RUNTIME if key.startswith(_RUNTIMES) else FASTCAM
        bars = {name: seconds / medians[own] for name, seconds in medians.items()}
        panels.append(plots.Panel(f"{key}\n{own}: {figures(medians[own] * 1e3)} ms", bars, own))
    return plots.bars(panels, "time, {own} = 1")
