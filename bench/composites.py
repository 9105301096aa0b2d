"""Pictures whose correct answer is known to the pixel: cut-out photos pasted on varied backgrounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Width and height of a picture, in pixels.
WIDTH, HEIGHT = 360, 270
# Classes by the folder below the stamps; drawings are excluded.
CLASSES = {
    "birds": "animals/birds",
    "fish": "animals/fish",
    "flowers": "plants/flowers",
    "fruit": "food/fruit",
    "instruments": "hobbies/music",
    "mammals": "animals/mammals",
    "road signs": "town/roadsigns",
    "tools": "household/tools",
    "vegetables": "food/vegetables",
}
_MOST_STAMPS = 30
_HELD_OUT = 0.3
# Longest side of an object relative to the picture's height.
_SCALES = (0.35, 0.75)
_TEXTURES = ("brick.png", "grass.png", "gravel.png")


@dataclass(frozen=True)
class Composite:
    """A picture and the location of its objects.

    Attributes
    ----------
    pixels : ndarray
        uint8 (H,W,3).
    masks : mapping of str to ndarray
        For each class in the picture, bool (H,W): its object.
    """

    pixels: NDArray[np.uint8]
    masks: Mapping[str, NDArray[np.bool_]]


def find_stamps(folder: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Return the cut-outs of each class: those to learn from, and those held out."""
    found = {}
    for name, place in CLASSES.items():
        paths = [path for path in sorted((folder / place).rglob("*.png")) if "cartoon" not in path.parts]
        chosen = np.random.default_rng(0).permutation(len(paths))[:_MOST_STAMPS]
        if len(chosen) < 10:
            raise SystemExit(f"{folder / place} holds {len(chosen)} cut-outs: 10 are needed; give --stamps")
        held_out = round(_HELD_OUT * len(chosen))
        found[name] = ([paths[index] for index in chosen[held_out:]], [paths[index] for index in chosen[:held_out]])
    return found


def compose(stamps: Mapping[str, Path], generator: np.random.Generator) -> Composite:
    """Paste one cut-out (or several, side by side) on a background, anywhere and at any size."""
    picture = Image.fromarray(_background(generator))
    masks = {}
    slots = generator.permutation(len(stamps))
    width = WIDTH // len(stamps)
    for (name, path), slot in zip(stamps.items(), slots, strict=True):
        cutout = _cutout(path, generator, width)
        left = slot * width + int(generator.integers(0, width - cutout.width + 1))
        top = int(generator.integers(0, HEIGHT - cutout.height + 1))
        picture.paste(cutout, (left, top), cutout)
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(cutout.getchannel("A"), (left, top))
        masks[name] = np.asarray(mask) > 127
    return Composite(np.asarray(picture), masks)


def _cutout(path: Path, generator: np.random.Generator, width: int) -> Image.Image:
    with Image.open(path) as image:
        cutout = image.convert("RGBA")
    cutout = cutout.crop(cutout.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())
    if generator.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = generator.uniform(*_SCALES) * min(HEIGHT, width * 1.2)
    factor = min(side / max(cutout.size), width / cutout.width)
    return cutout.resize([max(1, round(length * factor)) for length in cutout.size], Image.Resampling.LANCZOS)


def _background(generator: np.random.Generator) -> NDArray[np.uint8]:
    return _BACKGROUNDS[int(generator.integers(len(_BACKGROUNDS)))](generator)


def _gradient(generator: np.random.Generator) -> NDArray[np.uint8]:
    corners = generator.integers(30, 226, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def _clouds(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Blobs of all sizes, as in out-of-focus backgrounds."""
    total = np.zeros((HEIGHT, WIDTH, 3))
    for octave in range(1, 6):
        coarse = Image.fromarray(generator.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) * 0.5**octave
    return np.clip(total, 0, 255).astype(np.uint8)


def _texture(generator: np.random.Generator) -> NDArray[np.uint8]:
    """A piece of a photo of brick, grass or gravel, in a different colour each time."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / _TEXTURES[int(generator.integers(len(_TEXTURES)))]
    with Image.open(path) as image:
        grey = image.convert("L")
        side = int(generator.integers(200, min(grey.size)))
        left, top = (int(generator.integers(0, length - side + 1)) for length in grey.size)
        piece = grey.crop((left, top, left + side, top + side)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    colour = generator.uniform(0.5, 1.3, 3)
    return np.clip(np.asarray(piece)[..., None] * colour, 0, 255).astype(np.uint8)


_BACKGROUNDS = (_gradient, _clouds, _texture)


def write_folders(
    folder: Path, stamps: Mapping[str, tuple[Sequence[Path], Sequence[Path]]], train: int, val: int
) -> None:
    """Write ``train`` and ``val`` pictures per class, one object each, for `fastcam.finetune`, with their masks."""
    for part, (position, count) in {"train": (0, train), "val": (1, val)}.items():
        for label, (name, parts) in enumerate(stamps.items()):
            for number in range(count):
                generator = np.random.default_rng([position, label, number])
                composite = compose({name: parts[position][number % len(parts[position])]}, generator)
                for place, pixels in (("photos", composite.pixels), ("masks", composite.masks[name])):
                    path = folder / place / part / name / f"{number:03}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)


def pairs(stamps: Mapping[str, tuple[Sequence[Path], Sequence[Path]]], count: int) -> list[Composite]:
    """Return pictures of two objects of different classes, both held out."""
    names = list(stamps)
    found = []
    for number in range(count):
        generator = np.random.default_rng([2, number])
        chosen = generator.choice(len(names), 2, replace=False)
        held_out = {names[index]: stamps[names[index]][1] for index in chosen}
        found.append(
            compose({name: paths[int(generator.integers(len(paths)))] for name, paths in held_out.items()}, generator)
        )
    return found
