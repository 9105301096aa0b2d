"""Do the heatmaps show the object? `python -m bench.localisation --stamps FOLDER --weights FILE`.

Cut-out photos (Debian's package tuxpaint-stamps-default: /usr/share/tuxpaint/stamps) are pasted on varied backgrounds;
a VGG16 is fine-tuned on some of them and explained on others, whose masks are known. For each heatmap: the share of
its energy inside the object, whether its maximum is inside (pointing game; Zhang et al. 2016), and the intersection
over union with the mask at the best single threshold for all pictures. The baselines are a centred Gaussian and random
maps of the same size as the network's. Two objects of different classes in one picture: does the heatmap of each
class prefer its own?
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fastcam
from bench.composites import Composite, find_stamps, pairs, write_folders
from bench.harness import RESULTS, save, table
from fastcam.explaining.methods import FORMULAS

_THRESHOLDS = np.linspace(0.05, 0.95, 19)
_PACKAGES = ("fastcam", "tensorflow", "keras", "onnxruntime", "numpy", "pillow", "scikit-image")

Maps = NDArray[np.float32]
Masks = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), help="folder of cut-outs")
    parser.add_argument("--weights", default="imagenet", help="'imagenet', or VGG16's notop weights file")
    parser.add_argument("--work", type=Path, default=RESULTS / "localisation", help="folder for pictures and model")
    parser.add_argument("--train", type=int, default=32, help="training pictures per class")
    parser.add_argument("--val", type=int, default=16, help="test pictures per class")
    parser.add_argument("--unfreeze", type=int, default=0, help="blocks to train after the head")
    parser.add_argument("--pairs", type=int, default=200, help="pictures of two objects")
    options = parser.parse_args()

    stamps = find_stamps(options.stamps)
    model, training = _model(options, stamps)
    explainer = fastcam.Explainer(model)
    photos, masks = _held_out(options.work, explainer)
    report: dict[str, Any] = {"training": training, "masks": float(masks.mean()), "single": {}, "pairs": {}}
    report["single"] = _single(explainer, photos, masks)
    report["pairs"] = {method: _prefers(explainer, pairs(stamps, options.pairs), method) for method in FORMULAS}
    _print(report)
    _draw(explainer, photos, pairs(stamps, 4), options.work / "examples.png")
    print(f"\n{save('localisation', _PACKAGES, report)}, {options.work / 'examples.png'}")


def _model(options: argparse.Namespace, stamps: Mapping[str, tuple[list[Path], list[Path]]]) -> tuple[Path, Any]:
    """Fine-tune and export, as a user would."""
    write_folders(options.work, stamps, options.train, options.val)
    begin = time.perf_counter()
    result = fastcam.finetune(
        options.work / "photos",
        options.work / "stamps.keras",
        weights=options.weights,
        augmentations=2,
        unfreeze=options.unfreeze,
        fine_epochs=3,
        resume=True,
        progress=_say,
    )
    fastcam.export(result.path, options.work / "stamps.onnx", gradients="full")
    facts = {
        "accuracy": result.accuracy,
        "head_accuracy": max(row["val_accuracy"] for row in result.history["head"]),
        "photos": result.photos,
        "held_out": result.held_out,
        "cutouts": {name: [len(part) for part in parts] for name, parts in stamps.items()},
        "seconds": dict(result.seconds),
        "total_seconds": time.perf_counter() - begin,
        "history": {step: list(rows) for step, rows in result.history.items()},
    }
    return options.work / "stamps.onnx", facts


def _say(progress: fastcam.TrainingProgress) -> None:
    if progress.logs:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in progress.logs.items())
        print(f"{progress.step} {progress.done}/{progress.total}: {figures}", flush=True)


def _held_out(work: Path, explainer: fastcam.Explainer) -> tuple[list[Path], Masks]:
    """Return the pictures that the network has not seen, with masks of its input size."""
    photos = sorted((work / "photos" / "val").rglob("*.png"))
    return photos, np.stack([_at_input(work / "masks" / "val" / photo.parent.name / photo.name) for photo in photos])


def _at_input(mask: Path | NDArray[np.bool_], side: int = 224) -> NDArray[np.bool_]:
    image = Image.fromarray(mask) if isinstance(mask, np.ndarray) else Image.open(mask)
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR)) > 127


def _single(explainer: fastcam.Explainer, photos: Sequence[Path], masks: Masks) -> dict[str, dict[str, float]]:
    labels = [photo.parent.name for photo in photos]
    assert explainer.classes is not None
    right = [explainer.classes.index(label) for label in labels]
    found = {}
    for method in FORMULAS:
        best = explainer(photos, method=method, size="input")
        found[f"{method}, top class"] = quality(best.heatmaps[:, 0], masks)
        named = explainer(photos, target=[[index] for index in right], method=method, size="input")
        found[f"{method}, true class"] = quality(named.heatmaps[:, 0], masks)
        correct = best.targets[:, 0] == right
        found[f"{method}, where correct"] = quality(best.heatmaps[correct, 0], masks[correct])
    side = masks.shape[1]
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    gaussian = np.exp(-(rows**2 + columns**2) / (2 * (side / 4) ** 2)).astype(np.float32)
    found["centred Gaussian"] = quality(np.broadcast_to(gaussian, masks.shape), masks)
    found["random 14 x 14"] = quality(_random_maps(len(masks), side), masks)
    return found


def _random_maps(count: int, side: int) -> Maps:
    coarse = np.random.default_rng(0).random((count, 14, 14), np.float32)
    resized = [Image.fromarray(each).resize((side, side), Image.Resampling.BILINEAR) for each in coarse]
    return np.stack([np.asarray(each) for each in resized])


def quality(heatmaps: Maps, masks: Masks) -> dict[str, float]:
    """Energy inside, pointing game, IoU at the best threshold for all; each a mean over the pictures, 0..1."""
    peaks = heatmaps.max(axis=(1, 2))
    scaled = heatmaps / np.where(peaks > 0, peaks, 1)[:, None, None]
    energy = (scaled * masks).sum(axis=(1, 2)) / np.maximum(scaled.sum(axis=(1, 2)), 1e-12)
    highest = scaled.reshape(len(scaled), -1).argmax(axis=1)
    pointing = masks.reshape(len(masks), -1)[range(len(masks)), highest] & (peaks > 0)
    overlaps = [_overlap(scaled >= threshold, masks) for threshold in _THRESHOLDS]
    best = int(np.argmax(overlaps))
    return {
        "pictures": len(masks),
        "energy": float(energy.mean()),
        "pointing": float(pointing.mean()),
        "iou": overlaps[best],
        "threshold": float(_THRESHOLDS[best]),
        "blank": int((peaks == 0).sum()),
    }


def _overlap(found: Masks, masks: Masks) -> float:
    both, either = (found & masks).sum(axis=(1, 2)), (found | masks).sum(axis=(1, 2))
    return float((both / np.maximum(either, 1)).mean())


def _prefers(explainer: fastcam.Explainer, composites: Sequence[Composite], method: str) -> dict[str, float]:
    """How often a class's heatmap is hotter on its own object than on the other one, and points at it."""
    assert explainer.classes is not None
    names = [list(composite.masks) for composite in composites]
    explanation = explainer([composite.pixels for composite in composites], target=names, method=method, size="input")
    hotter, pointed, astray, both_found = [], [], [], []
    for image, composite in enumerate(composites):
        masks = [_at_input(mask) for mask in composite.masks.values()]
        best = set(np.argsort(explanation.logits[image])[-2:])
        both_found.append({explainer.classes.index(name) for name in names[image]} == best)
        for own, other in ((0, 1), (1, 0)):
            heat = explanation.heatmaps[image, own]
            hotter.append(heat[masks[own]].mean() > heat[masks[other]].mean())
            highest = np.unravel_index(heat.argmax(), heat.shape)
            pointed.append(heat.max() > 0 and masks[own][highest])
            astray.append(heat.max() > 0 and masks[other][highest])
    kept = np.repeat(both_found, 2)
    return {
        "prefers_own": float(np.mean(hotter)),
        "prefers_own_where_both_are_found": float(np.array(hotter)[kept].mean()),
        "points_at_own": float(np.mean(pointed)),
        "points_at_other": float(np.mean(astray)),
        "both_found": float(np.mean(both_found)),
    }


def _print(report: Mapping[str, Any]) -> None:
    training = report["training"]
    print(f"\naccuracy on {training['held_out']} pictures of cut-outs held out: {training['accuracy']:.1%}")
    print(f"objects cover {report['masks']:.1%} of the pictures\n")
    print(
        table(
            ["heatmap", "energy inside", "pointing game", "IoU", "at threshold", "pictures", "blank"],
            [
                (name, *(f"{row[key]:.3f}" for key in ("energy", "pointing", "iou")), f"{row['threshold']:.2f}",
                 row["pictures"], row["blank"])
                for name, row in report["single"].items()
            ],
        )
    )  # fmt: skip
    print()
    print(
        table(
            ["two objects", "prefers its own", "where both are the best two", "points at its own", "at the other"],
            [
                (method, *(f"{row[key]:.1%}" for key in ("prefers_own", "prefers_own_where_both_are_found",
                                                          "points_at_own", "points_at_other")))
                for method, row in report["pairs"].items()
            ],
        )
    )  # fmt: skip


def _draw(explainer: fastcam.Explainer, photos: Sequence[Path], doubles: Sequence[Composite], path: Path) -> None:
    """A contact sheet: some pictures with the top class, and pictures of two objects with each class."""
    from matplotlib.figure import Figure

    chosen = [photos[index] for index in np.linspace(0, len(photos) - 1, 10).astype(int)]
    pictures: list[tuple[str, NDArray[np.uint8]]] = []
    for photo, image in zip(chosen, explainer(chosen), strict=True):
        pictures.append((f"{photo.parent.name}: {image.labels[0]}", image.overlay(0)))
    for composite in doubles:
        image = explainer(composite.pixels, target=list(composite.masks))[0]
        pictures += [(f"two: {name}", image.overlay(index)) for index, name in enumerate(composite.masks)]
    figure = Figure(figsize=(15, 8), layout="constrained")
    for axes, (title, pixels) in zip(figure.subplots(3, 6).ravel(), pictures, strict=True):
        axes.imshow(pixels)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
