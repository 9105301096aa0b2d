"""The gallery: every method on the same photos, as one picture for the docs.

    python -m bench.gallery OUT.jpg

Network, weights, photos and class names are those of the demo: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import fastcam
from fastcam.demo.network import class_names
from fastcam.demo.run import PREPROCESSING

from .networks import lite0

_PHOTOS = ("cat", "coffee", "rocket", "astronaut")
_SIDE, _MARGIN, _HEAD = 150, 4, 18
_COLUMNS = 2
# Enough for maps that no longer change to the eye.
_SETTINGS = {"sscam": {"samples": 3}, "iscam": {"samples": 3}, "rise": {"masks": 2000}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gallery", description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lite0.onnx"
        fastcam.export(lite0(), path, classes=class_names(), preprocess=PREPROCESSING, gradients="image")
        explainer = fastcam.Explainer(path, device="cpu")
        pictures = _photos(explainer.input_size)
        rows = [(name, *_row(explainer, pictures, name)) for name in explainer.methods]
    _sheet(rows).save(options.out, quality=82)
    for name, _, milliseconds in rows:
        print(f"{name:22} {milliseconds:10.1f} ms per map")


def _photos(size: tuple[int, int]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    from skimage import data

    height, width = size
    return [np.asarray(Image.fromarray(getattr(data, name)()).resize((width, height))) for name in _PHOTOS]


def _row(
    explainer: fastcam.Explainer, pictures: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]], method: str
) -> tuple[list[Image.Image], float]:
    """Return the overlays of all photos, and the time of one."""
    begin = time.perf_counter()
    found = explainer(pictures, method=method, settings=_SETTINGS.get(method))
    milliseconds = (time.perf_counter() - begin) / len(pictures) * 1e3
    return [Image.fromarray(image.overlay()).resize((_SIDE, _SIDE)) for image in found], milliseconds


def _sheet(rows: list[tuple[str, list[Image.Image], float]]) -> Image.Image:
    """Return the methods in columns, each with its photos side by side."""
    lines = -(-len(rows) // _COLUMNS)
    width = len(_PHOTOS) * (_SIDE + _MARGIN) + 3 * _MARGIN
    height = _SIDE + _HEAD + _MARGIN
    sheet = Image.new("RGB", (_COLUMNS * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, overlays, _) in enumerate(rows):
        left, top = index // lines * width, index % lines * height
        draw.text((left + 2, top + 3), name, fill="black")
        for place, overlay in enumerate(overlays):
            sheet.paste(overlay, (left + place * (_SIDE + _MARGIN), top + _HEAD))
    return sheet


if __name__ == "__main__":
    main()
