"""Small folders of pictures: of noise, and of photos whose class is easy to see, for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"grün": (40, 200, 60), "red one": (220, 40, 40), "蓝": (50, 60, 220)}


def make_class_folders(folder: Path, counts: Mapping[str, int] | int = 8, *, seed: int = 0) -> Path:
    """Write photos of grey noise with a square in the class's colour, and return the folder."""
    generator = np.random.default_rng(seed)
    for name, colour in CLASSES.items():
        count = counts if isinstance(counts, int) else counts.get(name, 0)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(_photo(generator, colour)).save(folder / name / f"{number:02}.png")
    return folder


def _photo(generator: np.random.Generator, colour: tuple[int, int, int]) -> np.typing.NDArray[np.uint8]:
    photo = np.repeat(generator.integers(60, 160, (40, 56, 1), dtype=np.uint8), 3, axis=2)
    top, left = generator.integers(0, 16), generator.integers(0, 32)
    photo[top : top + 24, left : left + 24] = colour
    return photo


def make_photos(folder: Path, count: int) -> None:
    """Write small pictures, the same in every run, half of them in a subfolder under the same names."""
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        size = (int(rng.integers(20, 40)), int(rng.integers(20, 40)))
        coarse.resize(size, Image.Resampling.BICUBIC).save(
            folder / ("more" if number % 2 else "") / f"photo{number // 2:04}.png"
        )
