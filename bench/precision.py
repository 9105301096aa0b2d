"""The effect of float16: ``python -m bench.precision [MODEL ...]``.

Exports EfficientNet-Lite0, or the named classifiers, with ``precision="fp32"`` and ``"fp16"``, explains views
of scikit-image's photos (whole, four corners, middle, and each of these mirrored) for the top three classes of the
float32 file, and writes results/precision.json: file sizes, whether the top class is the same, the largest
difference of a logit, and the relative L2 error of raw maps and of heatmaps.

ONNX Runtime's CPU provider computes most float16 ops in float32 and rounds some of their results: this measures the
rounding of weights and values, not of the sums inside an op, which GPUs also compute in float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastcam
from fastcam.demo.run import PREPROCESSING
from fastcam.pictures.reading import read_image

from .harness import save, table
from .networks import lite0

PACKAGES = ("fastcam", "numpy", "onnx", "onnxruntime", "scikit-image")
_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_TARGET = "top3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help=".keras, .h5 or .onnx")
    parser.add_argument("--preprocess", help="of the named models, if they do not define it")
    arguments = parser.parse_args()
    sources: dict[str, tuple[Any, Any]] = {model.stem: (model, arguments.preprocess) for model in arguments.models} or {
        "EfficientNet-Lite0": (lite0(), PREPROCESSING)
    }
    views = list(_views())
    with tempfile.TemporaryDirectory() as folder:
        results = {name: _compare(*source, Path(folder), views) for name, source in sources.items()}
    rows = [_row(name, figures) for name, figures in results.items()]
    header = ["network", "images", "file", "same top class", "logit, largest", "maps, median", "largest", "heatmaps"]
    print(table(header, rows))
    print(f"written to {save('precision', PACKAGES, results)}")


def _views() -> Iterator[NDArray[np.uint8]]:
    """Yield the photos whole and in crops of three quarters of their sides, unchanged and mirrored."""
    for name in _PHOTOS:
        photo = read_image(str(files("skimage") / "data" / name))
        height, width = (side * 3 // 4 for side in photo.shape[:2])
        bottom, right = photo.shape[0] - height, photo.shape[1] - width
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        for view in (photo, *(photo[top : top + height, left : left + width] for top, left in corners)):
            yield np.ascontiguousarray(view)
            yield np.ascontiguousarray(view[:, ::-1])


def _compare(model: Any, preprocess: Any, folder: Path, views: list[NDArray[np.uint8]]) -> dict[str, Any]:
    exported = {
        precision: fastcam.export(model, folder / f"{precision}.onnx", preprocess=preprocess, precision=precision)
        for precision in ("fp32", "fp16")
    }
    full, half = (fastcam.Explainer(result.path) for result in exported.values())
    expected = full(views, _TARGET, normalize=None)
    found = half(views, expected.targets.tolist(), normalize=None)
    return {
        "images": len(views),
        "maps": int(np.prod(expected.targets.shape)),
        "bytes": {precision: result.bytes for precision, result in exported.items()},
        "notes": exported["fp16"].notes,
        "same_best_class": float((expected.logits.argmax(axis=1) == found.logits.argmax(axis=1)).mean()),
        "largest_logit_difference": float(np.abs(expected.logits - found.logits).max()),
        "largest_logit": float(np.abs(expected.logits).max()),
        "map_error": _summary(expected.maps, found.maps),
        "heatmap_error": _summary(_normalized(expected.heatmaps), _normalized(found.heatmaps)),
    }


def _normalized(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    top = maps.max(axis=(2, 3), keepdims=True)
    normalized: NDArray[np.float32] = np.divide(maps, top, out=np.zeros_like(maps), where=top > 0)
    return normalized


def _summary(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """Return median and maximum of the relative L2 errors of individual maps; blank ones have none."""
    norms = np.linalg.norm(expected, axis=(2, 3))
    errors = np.linalg.norm(found - expected, axis=(2, 3))[norms > 0] / norms[norms > 0]
    return {"median": float(np.median(errors)), "largest": float(errors.max())}


def _row(name: str, figures: Mapping[str, Any]) -> list[object]:
    return [
        name,
        figures["images"],
        f"{figures['bytes']['fp16'] / figures['bytes']['fp32']:.3f}",
        f"{figures['same_best_class']:.1%}",
        f"{figures['largest_logit_difference']:.4f} of {figures['largest_logit']:.1f}",
        f"{figures['map_error']['median']:.1e}",
        f"{figures['map_error']['largest']:.1e}",
        f"{figures['heatmap_error']['median']:.1e}",
    ]


if __name__ == "__main__":
    main()
