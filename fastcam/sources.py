"""From what a person names (files, folders, globs, lists) to the pictures to explain."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import ImageError

STANDARD_INPUT = "-"
_LIST_SUFFIXES = (".txt", ".lst")
# What is taken from folders and patterns. Pillow's own list holds formats that run other programs, and .h5.
PICTURE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
# File systems allow 255 bytes a name; a letter may take four.
_LONGEST_STEM = 40
_DIGEST_LETTERS = 16


class Source(NamedTuple):
    """One picture to explain.

    Attributes
    ----------
    path : str
        As it was named, or found.
    id : str
        Start of the names of its output files: stem, and 64 bits of the path's SHA-256. Pictures of the same name in
        different folders have different ones, and a picture has the same one in every run.
    """

    path: str
    id: str


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], exclude: Path, stdin: BinaryIO | None = None
) -> list[Source]:
    """List the pictures that the inputs name, each once, in their order.

    Parameters
    ----------
    inputs
        Each is a picture's path; a folder, for all pictures below it, sorted; a pattern with ``*``, ``?``, ``[...]`` or
        ``**``; a .txt or .lst file with one path, folder or pattern a line; or "-" for such a list on standard input,
        where entries may also be separated by null characters. What is no file is listed all the same: its job is to
        be reported.
    exclude
        A folder whose contents are never taken: the job's own output.
    stdin
        Instead of the process's standard input.

    Raises
    ------
    ImageError
        A folder or pattern holds no picture, a list cannot be read, or there are no inputs.
    """
    paths: dict[str, str] = {}
    for entry in _entries(inputs, stdin or sys.stdin.buffer):
        for path in _expanded(entry, exclude.absolute()):
            paths.setdefault(os.path.abspath(path), path)  # noqa: PTH100 - links stay what they are
    if not paths:
        raise ImageError("there are no pictures to explain: name files, folders, patterns or a list of them")
    return [Source(path, _id(path)) for path in paths.values()]


def _entries(inputs: Iterable[str | os.PathLike[str]], stdin: BinaryIO) -> Iterator[str]:
    for item in (os.fspath(item) for item in inputs):
        if item == STANDARD_INPUT:
            yield from _lines(stdin.read())
        elif item.lower().endswith(_LIST_SUFFIXES):
            yield from _lines(_list_bytes(item))
        else:
            yield item


def _list_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"the list '{path}' cannot be read: {error.strerror}. Check the path") from None


def _lines(data: bytes) -> list[str]:
    # Paths are bytes to the file system: os.fsdecode keeps those that are no UTF-8.
    lines = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    return [os.fsdecode(line) for line in lines if line.strip()]


def _expanded(entry: str, exclude: Path) -> list[str]:
    entry = os.path.normpath(entry)
    if Path(entry).is_dir():
        return _some(sorted(_pictures_below(entry, exclude)), f"the folder '{entry}'")
    if not os.path.lexists(entry) and glob.has_magic(entry):
        matches = glob.glob(entry, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = (path for path in matches if _is_picture(path, exclude))
        return _some(sorted(found), f"the pattern '{entry}'")
    return [entry]


def _some(paths: list[str], where: str) -> list[str]:
    if not paths:
        raise ImageError(f"{where} holds no pictures (files that end in {', '.join(sorted(PICTURE_SUFFIXES))})")
    return paths


def _pictures_below(folder: str, exclude: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(parent).absolute().is_relative_to(exclude):
            folders.clear()
            continue
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 - a hundred thousand Path objects take a second
            if not name.startswith(".") and _is_picture(path, exclude):
                yield path


def _is_picture(path: str, exclude: Path) -> bool:
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    return suffix in PICTURE_SUFFIXES and Path(path).is_file() and not Path(path).absolute().is_relative_to(exclude)


def _id(path: str) -> str:
    digest = hashlib.sha256(Path(path).as_posix().encode("utf-8", "surrogateescape")).hexdigest()
    stem = slug(Path(path).stem)
    return f"{stem}-{digest[:_DIGEST_LETTERS]}" if stem else digest[:_DIGEST_LETTERS]


def slug(text: str) -> str:
    """Return the text with nothing but letters, digits, "-" and "_", short enough to be part of a file's name."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:_LONGEST_STEM]
