"""Mutated pictures given to Explainer: see `fuzzing`."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Attempt, fuzz
from mutations import flip_bytes
from networks import small_classifier
from PIL import Image, features

import fastcam

_HEAD = 64


def pictures() -> list[bytes]:
    """Return small pictures in every common format and mode, including animations and multi-page files."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True}
    made: list[tuple[str, str, dict[str, Any]]] = [
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("PNG", "RGB", {"exif": exif, **frames}),
        *(("JPEG", mode, {"exif": exif}) for mode in ("L", "RGB", "CMYK")),
        ("JPEG", "RGB", {"progressive": True, "optimize": True}),
        ("MPO", "RGB", frames),
        ("GIF", "P", {}),
        ("GIF", "RGB", frames),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"exif": exif, **frames}),
        *(("TIFF", mode, {}) for mode in ("1", "L", "RGB", "RGBA", "F", "I;16")),
        *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        ("TIFF", "RGB", frames),
        *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB")),
        *(("TGA", mode, {"compression": "tga_rle"}) for mode in ("L", "RGBA")),
        *(("PPM", mode, {}) for mode in ("1", "L", "RGB")),
        ("ICO", "RGBA", {}),
        *((kind, "RGB", {}) for kind, name in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(name)),
    ]
    return [_encoded(photo, *spec) for spec in made]


def _encoded(photo: Image.Image, kind: str, mode: str, options: dict[str, Any]) -> bytes:
    data = io.BytesIO()
    converted = photo.convert("I").convert("I;16") if mode == "I;16" else photo.convert(mode)
    if "save_all" in options:
        # A new one for each file: saving leaves its settings on an image.
        options = {**options, "append_images": [photo.rotate(90), photo.rotate(180)]}
    converted.save(data, kind, **options)
    return data.getvalue()


def mutated(data: bytes, pick: random.Random) -> bytes:
    """Return a picture with changed bytes, or with a part removed, doubled, or replaced by extreme numbers."""
    changed = bytearray(data)
    place = pick.randrange(min(len(changed), _HEAD) if pick.random() < 0.5 else len(changed))
    length = pick.randrange(1, 40)
    ways = [
        lambda: changed.__delitem__(slice(place, place + length)),
        lambda: changed.__setitem__(slice(place, place), changed[place : place + length]),
        lambda: changed.__setitem__(
            slice(place, place + 4), pick.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        ),
        lambda: changed.__setitem__(slice(place, place + 2), pick.choice([b"\xff\xff", b"\0\0", b"\x80\0"])),
    ]
    if pick.random() < 0.5:
        return flip_bytes(data, pick)
    pick.choice(ways)()
    return bytes(changed)


def prepare(folder: Path) -> Attempt:
    """Return what explains a mutation."""
    fastcam.export(small_classifier().to_model(), folder / "m.onnx", preprocess="scale")
    explainer = fastcam.Explainer(folder / "m.onnx", threads=1)
    sound = pictures()

    def attempt(seed: int, pick: random.Random) -> bool:
        (folder / "in.jpg").write_bytes(mutated(sound[seed % len(sound)], pick))
        image = explainer(folder / "in.jpg")[0]
        if image.image is None or image.image.ndim != 3 or not np.isfinite(image.heatmaps).all():
            raise AssertionError(f"seed {seed}: no picture came of it")
        return True

    return attempt


if __name__ == "__main__":
    fuzz(prepare)
