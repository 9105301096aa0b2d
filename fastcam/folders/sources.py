"""From what a person names (files, folders, globs, lists) to the pictures to explain."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import ArgumentError, ImageError
from ..pictures.reading import PICTURE_SUFFIXES

STANDARD_INPUT = "-"
_LIST_SUFFIXES = (".txt", ".lst")
# Bytes. File systems allow 255 a name, which holds two slugs, a digest, numbers, suffixes and a temporary file's mark.
_LONGEST_SLUG = 80
_DIGEST_LETTERS = 16


class Source(NamedTuple):
    """One picture to explain.

    Attributes
    ----------
    path : str
        As it was named, or found.
    id : str
        Start of the names of its output files: stem, and 64 bits of the SHA-256 of where the picture is. Pictures of
        the same name in different folders have different ones, and a picture has the same one in every run, however
        and from wherever it is named.
    """

    path: str
    id: str


def find_sources(
    inputs: Iterable[str | os.PathLike[str]], exclude: Iterable[Path] = (), stdin: BinaryIO | None = None
) -> list[Source]:
    """List the pictures that the inputs name, each once, in their order.

    Parameters
    ----------
    inputs
        Each is a picture's path; a folder, for all pictures below it, sorted; a pattern with ``*``, ``?``, ``[...]`` or
        ``**``; a .txt or .lst file with one path, folder or pattern a line; or "-" for such a list on standard input,
        where entries may also be separated by null characters. What is no file is listed all the same, and so are
        folders that may not be read and links that lead nowhere: their job is to be reported.
    exclude
        Folders of which nothing is found: the job's own output.
    stdin
        Instead of the process's standard input.

    Raises
    ------
    ArgumentError
        An input is empty or no path.
    ImageError
        A folder or pattern holds no picture, a list cannot be read, or there are no inputs.
    """
    places = _Places(exclude)
    paths: dict[str, str] = {}
    for entry in _entries(inputs, stdin):
        for path in _expanded(entry, places):
            paths.setdefault(places.of(path), path)
    if not paths:
        raise ImageError("there are no pictures to explain: name files, folders, patterns or a list of them")
    return [Source(path, _id(place)) for place, path in paths.items()]


class _Places:
    """Where files really are, through whatever links their folders were reached; the folders' answers are kept."""

    def __init__(self, exclude: Iterable[Path]) -> None:
        self._folders: dict[str, str] = {}
        self._excluded = [os.path.realpath(folder) for folder in exclude]

    def of(self, path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.join(self.of_folder(folder), name)

    def of_folder(self, folder: str) -> str:
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return self._folders[folder]

    def is_excluded(self, folder: str) -> bool:
        place = self.of_folder(folder)
        return any(place == excluded or place.startswith(excluded + os.sep) for excluded in self._excluded)


def _entries(inputs: Iterable[str | os.PathLike[str]], stdin: BinaryIO | None) -> Iterator[str]:
    for item in map(_name, inputs):
        if item == STANDARD_INPUT:
            yield from _lines(_standard_input(stdin))
        elif item.lower().endswith(_LIST_SUFFIXES):
            yield from _lines(_list_bytes(item))
        else:
            yield item


def _name(item: object) -> str:
    name = os.fspath(item) if isinstance(item, os.PathLike) else item
    if not isinstance(name, str) or not name or "\0" in name:
        raise ArgumentError(f"{item!r} names no picture: give the path of a picture, a folder, a pattern or a list")
    return name


def _standard_input(stdin: BinaryIO | None) -> bytes:
    # Asked for only where it is named: a process may have none.
    if stdin is None and sys.stdin is None:
        raise ImageError("there is no standard input to read a list from: give the list as a .txt file")
    return (stdin or sys.stdin.buffer).read()


def _list_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"the list '{path}' cannot be read: {error.strerror}. Check the path") from None


def _lines(data: bytes) -> list[str]:
    # Paths are bytes to the file system: os.fsdecode keeps those that are no UTF-8.
    data = data.removeprefix(codecs.BOM_UTF8)
    lines = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    return [os.fsdecode(line) for line in lines if line.strip()]


def _expanded(entry: str, places: _Places) -> list[str]:
    if os.path.isdir(entry):
        return _some(sorted(_pictures_below(entry, places)), f"the folder '{entry}'")
    if not os.path.lexists(entry) and glob.has_magic(entry):
        matches = glob.glob(entry, recursive=True)
        found = [path for path in matches if _is_picture(path) and not places.is_excluded(os.path.dirname(path))]
        # A pattern runs round the loops that links make: of the ways to a file the shortest is kept.
        shortest = {places.of(path): path for path in sorted(found, key=len, reverse=True)}
        return _some(sorted(shortest.values()), f"the pattern '{entry}'")
    return [entry]


def _some(paths: list[str], where: str) -> list[str]:
    if not paths:
        raise ImageError(f"{where} holds no pictures (files that end in {', '.join(sorted(PICTURE_SUFFIXES))})")
    return paths


def _pictures_below(folder: str, places: _Places) -> Iterator[str]:
    unreadable: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(str(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if places.is_excluded(parent):
            folders.clear()
            continue
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and _is_picture(path):
                yield path
    yield from unreadable


def _is_picture(path: str) -> bool:
    """Whether to take a file that was found; a link to nothing is taken, so that it is reported."""
    return os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES and (
        os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))
    )


def _id(place: str) -> str:
    digest = hashlib.sha256(Path(place).as_posix().encode("utf-8", "surrogateescape")).hexdigest()
    stem = slug(Path(place).stem)
    return f"{stem}-{digest[:_DIGEST_LETTERS]}" if stem else digest[:_DIGEST_LETTERS]


def slug(text: str) -> str:
    """Return the text with nothing but letters, digits, "-" and "_", short enough to be part of a file's name."""
    letters = re.sub(r"[^\w-]+", "_", text).strip("_")
    return letters.encode()[:_LONGEST_SLUG].decode(errors="ignore")
