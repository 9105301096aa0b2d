"""The cost of the first heatmap: import, start, memory, disk.

Everything runs in separate processes. ``import``: only the statement. ``first heatmap``: from the start of Python to
the heatmap of one image by a VGG16 on disk, with the process's peak memory: fastcam's file, the Keras file in the
textbook code, the torch module in pytorch-grad-cam. ``installed``: the sizes of all files of the packages
that pip would install, according to their records.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import fastcam

from . import plots
from .export import run_watched
from .harness import Case, Measurement, Record, Settings, figures, markdown
from .networks import Vgg, drawn_images, run_python, tiny, vgg16

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASKS = "import time, time to the first heatmap, memory, installed size"
PACKAGES = (
    "fastcam numpy onnxruntime torch captum torchcam grad-cam tensorflow tensorflow-cpu keras tf-keras-vis xplique"
).split()

_IMPORTS = {
    "fastcam": "import fastcam",
    "fastcam.Explainer, onnxruntime": "import fastcam, onnxruntime; fastcam.Explainer",
    "torch": "import torch",
    "captum": "import captum.attr",
    "pytorch-grad-cam": "from bench import shims; shims.install(); import pytorch_grad_cam",
    "TensorFlow": "import tensorflow",
    "tf-keras-vis": "from bench import shims; shims.install(); import tf_keras_vis.gradcam",
}
_TIMED = """
import time
begin = time.perf_counter()
{statement}
print(time.perf_counter() - begin)
"""

# Each reads files in the folder argv[1] and explains image.npy, (1,3,H,W).
_FIRST = {
    "fastcam": """
import sys, numpy as np, fastcam
folder = sys.argv[1]
assert fastcam.Explainer(folder + "/explained.onnx")(np.load(folder + "/image.npy")).heatmaps.max() > 0
""",
    "pytorch-grad-cam": """
import sys
sys.path.insert(0, sys.argv[2])
from bench import shims
shims.install()
import numpy as np, torch
from pytorch_grad_cam import GradCAM
folder = sys.argv[1]
features, head = torch.load(folder + "/modules.pt", weights_only=False)
method = GradCAM(torch.nn.Sequential(*features, *head), [features[-1]])
assert method(torch.from_numpy(np.load(folder + "/image.npy")), None).max() > 0
""",
    "textbook TensorFlow": """
import sys
sys.path.insert(0, sys.argv[2] + "/tests")
import keras, numpy as np
from textbook import Textbook
folder, layer = sys.argv[1], sys.argv[3]
model = keras.models.load_model(folder + "/model.keras", compile=False)
image = np.load(folder + "/image.npy").transpose(0, 2, 3, 1)
assert Textbook(model, layer).raw_map(image, 0)[0].shape
""",
}

# Packages that production needs, by their names on PyPI.
_STACKS = {
    "fastcam[cpu]": ["fastcam", "onnxruntime"],
    "torch + pytorch-grad-cam": ["grad-cam"],
    "torch + captum": ["captum"],
    "torch + torchcam": ["torchcam"],
    "TensorFlow": ["tensorflow-cpu", "tensorflow"],
    "TensorFlow + tf-keras-vis": ["tf-keras-vis", "tensorflow-cpu", "tensorflow"],
}
_ROOT = str(Path(__file__).parents[1])


def cases(settings: Settings) -> list[Case]:
    network = tiny() if settings.quick else vgg16()
    return [
        Case("installed", 1, lambda _: _measure_sizes()),
        Case("import", 40, _measure_imports),
        Case("first heatmap", 50, lambda allowance: _measure_first(settings, network, allowance)),
    ]


def _rounds(contestants: Iterable[str], run: Callable[[str], float], allowance: float) -> Measurement:
    """Run each in turn while there is time, at least twice; the first run, from a cold disk, does not count."""
    begin = time.perf_counter()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    missing: dict[str, str] = {}
    for name in list(samples):
        try:
            run(name)
        except RuntimeError as error:
            missing[name] = str(error)
            del samples[name]
    rounds = 0
    while samples and (rounds < 2 or (time.perf_counter() - begin) * (rounds + 2) / (rounds + 1) < allowance):
        for name, values in samples.items():
            values.append(run(name))
        rounds += 1
    return Measurement(samples, missing=missing)


def _measure_imports(allowance: float) -> Measurement:
    return _rounds(_IMPORTS, lambda name: float(run_python(_TIMED.format(statement=_IMPORTS[name]))), allowance)


def _measure_first(settings: Settings, network: Vgg, allowance: float) -> Measurement:
    begin = time.perf_counter()
    folder = settings.folder
    fastcam.export(network.to_onnx(), folder / "explained.onnx")
    np.save(folder / "image.npy", drawn_images(1, (network.channels, network.side, network.side)))
    missing = {}
    for name, save in (("pytorch-grad-cam", _save_torch), ("textbook TensorFlow", _save_keras)):
        try:
            save(network, folder)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    peaks: dict[str, int] = {}

    def run(name: str) -> float:
        command = [sys.executable, "-c", _FIRST[name], str(folder), _ROOT, network.layer]
        seconds, peaks[name] = run_watched(command, 300, 20e9)
        return seconds

    present = [name for name in _FIRST if name not in missing]
    found = _rounds(present, run, allowance - (time.perf_counter() - begin))
    return Measurement(found.samples, {"peak_bytes": peaks}, {**missing, **found.missing})


def _save_torch(network: Vgg, folder: Path) -> None:
    import torch

    torch.save(network.to_torch(), folder / "modules.pt")


def _save_keras(network: Vgg, folder: Path) -> None:
    network.to_keras().save(folder / "model.keras")


def _measure_sizes() -> Measurement:
    sizes = {}
    missing = {}
    for stack, roots in _STACKS.items():
        packages = requirements([root for root in roots if _is_installed(root)])
        if not _is_installed(roots[0]) and not (len(roots) > 1 and packages):
            missing[stack] = f"{roots[0]} is not installed"
            continue
        sizes[stack] = [float(sum(_size(name) for name in packages))]
    return Measurement(sizes, missing=missing, unit="bytes")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def requirements(roots: Iterable[str]) -> set[str]:
    """Return these packages and all their installed dependencies, except extras."""
    found: set[str] = set()
    waiting = [_normal(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in found or not _is_installed(name):
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement, _, marker = line.partition(";")
            if "extra" not in marker:
                match = re.match(r"[A-Za-z0-9._-]+", requirement)
                waiting += [_normal(match[0])] if match else []
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _size(name: str) -> int:
    """Return the bytes of a package's files; for an editable one, those of its folder."""
    files = importlib.metadata.files(name) or []
    listed = sum(path.stat().st_size for path in {Path(str(file.locate())) for file in files} if path.is_file())
    if name == "fastcam":
        package = Path(fastcam.__file__).parent
        listed = max(
            listed, sum(path.stat().st_size for path in package.rglob("*") if path.suffix != ".pyc" and path.is_file())
        )
    return listed


def write(record: Record) -> str:
    parts = []
    if "import" in record.cases:
        medians = record.medians("import")
        rows = []
        for name, seconds in medians.items():
            low, high = record.spread("import", name)
            rows.append([name, f"{figures(seconds)} ({figures(low)}..{figures(high)})"])
        parts.append(markdown(["import", "s (quartiles)"], rows))
    if "first heatmap" in record.cases:
        medians = record.medians("first heatmap")
        peaks = record.cases["first heatmap"]["facts"]["peak_bytes"]
        rows = []
        for name, seconds in medians.items():
            low, high = record.spread("first heatmap", name)
            rows.append([name, f"{figures(seconds)} ({figures(low)}..{figures(high)})", f"{peaks[name] / 1e9:.2f}"])
        parts.append(markdown(["first heatmap, from the start of Python", "s (quartiles)", "peak GB"], rows))
    if "installed" in record.cases:
        rows = [[name, f"{size / 1e6:.0f}"] for name, size in record.medians("installed").items()]
        parts.append(markdown(["installed, with all dependencies", "MB"], rows))
    return "\n\n".join(parts)


def draw(record: Record) -> Figure:
    panels = []
    owns = {"import": "fastcam", "first heatmap": "fastcam", "installed": "fastcam[cpu]"}
    titles = {"import": "import, s", "first heatmap": "first heatmap, s", "installed": "installed, MB"}
    for key, title in titles.items():
        if key in record.cases:
            scale = 1e-6 if key == "installed" else 1
            values = {name: value * scale for name, value in record.medians(key).items()}
            panels.append(plots.Panel(title, values, owns[key], unit=""))
    peaks = record.cases.get("first heatmap", {}).get("facts", {}).get("peak_bytes")
    if peaks:
        panels.append(
            plots.Panel("peak memory, GB", {name: found / 1e9 for name, found in peaks.items()}, "fastcam", unit="")
        )
    return plots.bars(panels, "")
