"""The photos of a training: one folder per class, read once and split into training and validation photos."""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ArgumentError, ImageError
from ..files import digest, open_regular, read_chunks, refuse_links, replacing, walk, writing
from ..pictures.preparing import resize_image
from ..pictures.reading import PICTURE_SUFFIXES, read_image
from ..pictures.writing import encode_image

TRAINING, VALIDATION = "train", "val"
_VALIDATION_FOLDERS = (VALIDATION, "valid", "validation")
# Folders with these names contain parts of the photos; they are not classes.
_PART_NAMES = frozenset(("train", "training", "test", *_VALIDATION_FOLDERS))
_STAGED_NAME = re.compile(r"[0-9a-f]{32}\.png")
_INCOMING = "incoming"
# Bytes. No photo is larger, but a damaged or sparse file may claim to be.
_LARGEST_FILE = 2**30


class Photo(NamedTuple):
    """A photo that was read.

    Attributes
    ----------
    source : Path
        The user's file.
    staged : Path
        A PNG of the input's size, with the pixels that `Explainer` would pass to the network.
    label : int
        Index of its class.
    """

    source: Path
    staged: Path
    label: int


@dataclass(frozen=True)
class Photos:
    """The photos in a folder.

    Attributes
    ----------
    classes : tuple of str
        Names of the class folders, sorted; a label is an index into them.
    train, val : tuple of Photo
        Sorted by label and staged name, the order in which Keras lists a folder.
    skipped : tuple of str
        Files that are not readable pictures, each with the reason.
    """

    classes: tuple[str, ...]
    train: tuple[Photo, ...]
    val: tuple[Photo, ...]
    skipped: tuple[str, ...]


class _Candidate(NamedTuple):
    """A file in a class folder; ``part`` is empty if the folders are not split into training and validation."""

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
    """Read the photos in a folder, resize them to the input's size, and split them.

    Keras then reads only what fastcam has read: every format, upright, and resized as for explanations. Photos that an
    earlier run has staged are not read again.

    Parameters
    ----------
    folder
        Contains one folder per class, or folders "train" and "val" that do. Class names may contain any printable
        characters.
    staging
        Where the photos are staged, as "train/0000/<digest>.png"; staged photos that are no longer used are removed.
    side
        Height and width of the network's input, pixels.
    validation
        Fraction of each class to hold out for validation, 0..1, unless the folders are already split: at least one
        photo, and never all.
    seed
        Determines which photos are held out.
    progress
        Called with the number of files read so far and the total.

    Raises
    ------
    ArgumentError
        The folder does not exist, or contains fewer than two classes; a class has no usable photo for training or for
        validation, or is missing from one of "train" and "val".
    WriteError
        The staging folder cannot be written, or contains links.
    """
    listing = _list_folder(folder)
    _refuse_links(staging, len(listing.classes))
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
        earlier = {path.name: path for path in _staged(staging)}
    incoming = staging / _INCOMING
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
    """Raise ArgumentError if `stage_photos` would reject the folders, without reading any photo."""
    _parts_and_classes(folder)


def load_batches(
    keras: Any, staging: Path, part: str, side: int, batch_size: int, seed: int, *, shuffle: bool = False
) -> Any:
    """Return the staged photos of a part as a tf.data.Dataset of images, float32 0..255 (N,side,side,3), and labels."""
    return keras.utils.image_dataset_from_directory(
        staging / part,
        image_size=(side, side),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        verbose=False,
    )


def _refuse_links(staging: Path, class_count: int) -> None:
    refuse_links(staging, (_INCOMING, TRAINING, VALIDATION))
    for part in (TRAINING, VALIDATION):
        refuse_links(staging / part, (f"{label:04}" for label in range(class_count)))


def _staged(staging: Path) -> list[Path]:
    return [path for path in staging.rglob("*.png") if _STAGED_NAME.fullmatch(path.name)]


def _parts_and_classes(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each part (or of "" if there are no parts), and the class names."""
    try:
        if not folder.is_dir():
            raise ArgumentError(f"{folder}: is not a folder: give one that contains a folder of photos per class")
        held_out = next((folder / name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), None)
        divided = held_out is not None and (folder / TRAINING).is_dir()
        parts = {TRAINING: folder / TRAINING, VALIDATION: held_out} if held_out and divided else {"": folder}
        names = {part: [path.name for path in _class_folders(path)] for part, path in parts.items()}
    except OSError as error:
        raise ArgumentError(f"{folder}: cannot be read: {error}") from error
    return parts, _checked_classes(folder, names)


def _list_folder(folder: Path) -> _Listing:
    parts, classes = _parts_and_classes(folder)
    skipped = [f"'{path}' is not in a class folder" for path in _files(folder.iterdir()) if _is_picture(path)]
    candidates = []
    for part, path in parts.items():
        for label, name in enumerate(classes):
            for file in sorted(_files(_below(path / name, skipped))):
                if _is_picture(file):
                    candidates.append(_Candidate(file, file.relative_to(folder).as_posix(), label, part))
                else:
                    skipped.append(f"'{file}' is not a picture")
    return _Listing(classes, candidates, skipped)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _below(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """Yield the files in a folder and below, except in hidden folders, where tools keep copies of photos."""

    def skip(error: OSError) -> None:
        skipped.append(f"'{error.filename}' cannot be read ({error.strerror})")

    for parent, names in walk(str(folder), skip):
        yield from (Path(parent, name) for name in names)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.is_file() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _checked_classes(folder: Path, names: dict[str, list[str]]) -> list[str]:
    classes, *others = names.values()
    if others and others[0] != classes:
        differ = ", ".join(map(repr, sorted(set(classes) ^ set(others[0]))))
        raise ArgumentError(f"{folder}: the classes {differ} are missing from train or from val: both need every class")
    if len(classes) < 2:
        found = f"one class folder, {classes[0]!r}" if classes else "no folders"
        raise ArgumentError(
            f"{folder}: contains {found}: put the photos of each class into a folder named after it, two or more"
        )
    parts = sorted(name for name in classes if name.lower() in _PART_NAMES)
    if len(parts) == len(classes):
        raise ArgumentError(
            f"{folder}: {', '.join(map(repr, parts))} are not classes: name the folders 'train' and 'val', each with a "
            "folder of photos per class"
        )
    unprintable = [name for name in classes if not name.isprintable()]
    if unprintable:
        raise ArgumentError(f"{folder}: {unprintable[0]!r} is not a valid class name: rename its folder")
    return classes


def _stage(candidate: _Candidate, side: int, earlier: dict[str, Path], incoming: Path) -> Path | ImageError:
    """Return the path of the staged photo, or why it cannot be read."""
    # The location is part of the digest, because two classes may contain the same photo.
    place = f"{side} {candidate.relative}\0".encode("utf-8", "surrogateescape")
    try:
        with open_regular(candidate.source) as file:
            if os.fstat(file.fileno()).st_size > _LARGEST_FILE:
                return ImageError(f"'{candidate.source}' is too large: give files of at most {_LARGEST_FILE:,} bytes")
            name = digest(itertools.chain([place], read_chunks(file)))
    except OSError as error:
        return ImageError(f"'{candidate.source}' cannot be read ({error.strerror})")
    path = incoming / f"{name[:32]}.png"
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
    """Split the photos, and yield each with its part, moved to the folder of its part and label."""
    for label, name in enumerate(listing.classes):
        members = [(candidate, path) for candidate, path in readable if candidate.label == label]
        parts = [candidate.part for candidate, _ in members]
        if "" in parts or not parts:
            parts = _divided(len(members), validation, f"{seed} {name}")
        if {TRAINING, VALIDATION} - set(parts):
            reasons = [reason for reason in listing.skipped if re.search(f"/{re.escape(name)}[/']", reason)]
            raise ArgumentError(
                f"{folder}: class {name!r} has {len(members)} usable photos, {parts.count(TRAINING)} for training and "
                f"{parts.count(VALIDATION)} for validation: each class needs at least one of each"
                + "".join(f"; {reason}" for reason in reasons[:10])
            )
        for part, (candidate, path) in zip(parts, members, strict=True):
            place = staging / part / f"{label:04}" / path.name
            if place != path:
                with writing(place):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(place)
            yield part, Photo(candidate.source, place, label)


def _divided(count: int, validation: float, seed: str) -> list[str]:
    """Split one class, independently of the other classes."""
    held_out = min(max(1, round(validation * count)), count - 1)
    chosen = set(random.Random(seed).sample(range(count), max(held_out, 0)))  # noqa: S311 - not a secret
    return [VALIDATION if number in chosen else TRAINING for number in range(count)]
