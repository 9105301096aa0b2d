"""Photos to learn from: a folder for each class, read once, and divided; some are held out to test on."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import ArgumentError, ImageError
from ..files import replacing, writing
from ..pictures.preparing import resize_image
from ..pictures.reading import PICTURE_SUFFIXES, read_image
from ..pictures.writing import encode_image

TRAINING, VALIDATION = "train", "val"
_VALIDATION_FOLDERS = (VALIDATION, "valid", "validation")
# Folders of such names hold parts of the photos, and are no classes.
_PART_NAMES = frozenset(("train", "training", "test", *_VALIDATION_FOLDERS))
_STAGED_NAME = re.compile(r"[0-9a-f]{32}\.png")


class Photo(NamedTuple):
    """A photo that was read.

    Attributes
    ----------
    source : Path
        As its owner knows it.
    staged : Path
        A PNG of the network's size, with the pixels that `Explainer` would give the network.
    label : int
        Number of its class.
    """

    source: Path
    staged: Path
    label: int


@dataclass(frozen=True)
class Photos:
    """What a folder holds.

    Attributes
    ----------
    classes : tuple of str
        Names of the class folders, sorted; a label is an index into them.
    train, val : tuple of Photo
        In the order of labels and staged names, which is how Keras lists a folder.
    skipped : tuple of str
        Files that are no readable pictures, each with the reason.
    """

    classes: tuple[str, ...]
    train: tuple[Photo, ...]
    val: tuple[Photo, ...]
    skipped: tuple[str, ...]


class _Candidate(NamedTuple):
    """A file in a class's folder; ``part`` is empty where the folder does not say whether it is for testing."""

    source: Path
    relative: str
    label: int
    part: str


class _Listing(NamedTuple):
    classes: list[str]
    candidates: list[_Candidate]
    skipped: list[str]


def stage_photos(
    folder: Path, staging: Path, side: int, validation: float, seed: int, progress: Callable[[int, int], None]
) -> Photos:
    """Read the photos of a folder, bring them to the network's size, and divide them.

    Keras then reads only what fastcam has read: every format, the right way up, resized as in production. What an
    earlier run has staged is not read again.

    Parameters
    ----------
    folder
        One folder a class, or "train" and "val" folders of such. Class names may hold any printable letters.
    staging
        Where the staged photos go, as "train/0000/<digest>.png"; what does not belong there is removed.
    side
        Height and width of the network's input, pixels.
    validation
        Share of each class that is kept for testing, 0..1, where the folder does not say itself: at least one photo,
        and never all.
    seed
        Decides which.
    progress
        Called with the number of files that were read, and of all.

    Raises
    ------
    ArgumentError
        The folder does not exist, or holds fewer than two classes; a class has no usable photo to learn from or to
        test on, or is only in one of "train" and "val".
    WriteError
        The staging folder cannot be written.
    """
    listing = _list_folder(folder)
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
        earlier = {path.name: path for path in _staged(staging)}
    incoming = staging / "incoming"
    with writing(incoming):
        incoming.mkdir(exist_ok=True)
    stage = partial(_stage, side=side, earlier=earlier, incoming=incoming)
    readable: list[tuple[_Candidate, Path]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count, (candidate, result) in enumerate(
            zip(listing.candidates, pool.map(stage, listing.candidates), strict=True), start=1
        ):
            if isinstance(result, ImageError):
                listing.skipped.append(str(result))
            else:
                readable.append((candidate, result))
            progress(count, len(listing.candidates))
    photos = sorted(
        _placed(folder, listing, readable, staging, validation, seed), key=lambda item: (item[1].label, item[1].staged)
    )
    kept = {photo.staged for _, photo in photos}
    with writing(staging):
        for path in _staged(staging):
            if path not in kept:
                path.unlink()
    train, val = (tuple(photo for part, photo in photos if part == wanted) for wanted in (TRAINING, VALIDATION))
    return Photos(tuple(listing.classes), train, val, tuple(listing.skipped))


def check_folders(folder: Path) -> None:
    """Raise ArgumentError where `stage_photos` would do so for the folders alone, without a look at the photos."""
    _parts_and_classes(folder)


def _staged(staging: Path) -> list[Path]:
    return [path for path in staging.rglob("*.png") if _STAGED_NAME.fullmatch(path.name)]


def _parts_and_classes(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folders of each part, "" where they are not divided, and the classes' names."""
    try:
        if not folder.is_dir():
            raise ArgumentError(f"{folder}: is no folder: give one that holds a folder of photos for each class")
        held_out = next((folder / name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), None)
        divided = held_out is not None and (folder / TRAINING).is_dir()
        parts = {TRAINING: folder / TRAINING, VALIDATION: held_out} if held_out and divided else {"": folder}
        names = {part: [path.name for path in _class_folders(path)] for part, path in parts.items()}
    except OSError as error:
        raise ArgumentError(f"{folder}: cannot be read: {error}") from error
    return parts, _checked_classes(folder, names)


def _list_folder(folder: Path) -> _Listing:
    parts, classes = _parts_and_classes(folder)
    skipped = [f"'{path}' is in no class's folder" for path in _files(folder.iterdir()) if _is_picture(path)]
    candidates = []
    for part, path in parts.items():
        for label, name in enumerate(classes):
            for file in sorted(_files(_below(path / name, skipped))):
                if _is_picture(file):
                    candidates.append(_Candidate(file, file.relative_to(folder).as_posix(), label, part))
                else:
                    skipped.append(f"'{file}' is no picture")
    return _Listing(classes, candidates, skipped)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _below(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """Yield what lies in a folder and those in it that are not hidden: tools keep copies of photos in such."""

    def refuse(error: OSError) -> None:
        skipped.append(f"'{error.filename}' may not be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in names)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.is_file() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _checked_classes(folder: Path, names: dict[str, list[str]]) -> list[str]:
    classes, *others = names.values()
    if others and others[0] != classes:
        differ = ", ".join(map(repr, sorted(set(classes) ^ set(others[0]))))
        raise ArgumentError(f"{folder}: only one of train and val has the classes {differ}: both need each")
    if len(classes) < 2:
        found = f"one class's folder, {classes[0]!r}" if classes else "no folders"
        raise ArgumentError(
            f"{folder}: holds {found}: put the photos of each class into a folder named after it, two or more"
        )
    parts = sorted(name for name in classes if name.lower() in _PART_NAMES)
    if len(parts) == len(classes):
        raise ArgumentError(
            f"{folder}: {', '.join(map(repr, parts))} are no classes: name the folders 'train' and 'val', each with a "
            "folder of photos for each class"
        )
    unprintable = [name for name in classes if not name.isprintable()]
    if unprintable:
        raise ArgumentError(f"{folder}: {unprintable[0]!r} is no name for a class: rename its folder")
    return classes


def _stage(candidate: _Candidate, side: int, earlier: dict[str, Path], incoming: Path) -> Path | ImageError:
    """Return where the photo is staged, or why it cannot be read."""
    try:
        content = candidate.source.read_bytes()
    except OSError as error:
        return ImageError(f"'{candidate.source}' may not be read ({error.strerror})")
    # The place counts, too: two classes may hold the same photo.
    digest = hashlib.sha256(f"{side} {candidate.relative}\0".encode("utf-8", "surrogateescape") + content).hexdigest()
    path = incoming / f"{digest[:32]}.png"
    if path.name in earlier:
        return earlier[path.name]
    try:
        encoded = encode_image(resize_image(read_image(candidate.source), (side, side)), path)
    except ImageError as error:
        return error
    with replacing(path, durable=False) as file:
        file.write(encoded)
    return path


def _placed(
    folder: Path,
    listing: _Listing,
    readable: Sequence[tuple[_Candidate, Path]],
    staging: Path,
    validation: float,
    seed: int,
) -> Iterator[tuple[str, Photo]]:
    """Divide the photos, and yield each in the folder of its part and label."""
    for label, name in enumerate(listing.classes):
        members = [(candidate, path) for candidate, path in readable if candidate.label == label]
        parts = [candidate.part for candidate, _ in members]
        if "" in parts or not parts:
            parts = _divided(len(members), validation, f"{seed} {name}")
        if {TRAINING, VALIDATION} - set(parts):
            reasons = [reason for reason in listing.skipped if re.search(f"/{re.escape(name)}[/']", reason)]
            raise ArgumentError(
                f"{folder}: class {name!r} has {len(members)} usable photos, {parts.count(TRAINING)} to learn from and "
                f"{parts.count(VALIDATION)} to test on: each class needs one of both"
                + "".join(f"\n  {reason}" for reason in reasons[:10])
            )
        for part, (candidate, path) in zip(parts, members, strict=True):
            place = staging / part / f"{label:04}" / path.name
            if place != path:
                with writing(place):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(place)
            yield part, Photo(candidate.source, place, label)


def _divided(count: int, validation: float, seed: str) -> list[str]:
    """Divide one class, the same way whatever the other classes are."""
    held_out = min(max(1, round(validation * count)), count - 1)
    chosen = set(random.Random(seed).sample(range(count), max(held_out, 0)))  # noqa: S311 - no secret
    return [VALIDATION if number in chosen else TRAINING for number in range(count)]
