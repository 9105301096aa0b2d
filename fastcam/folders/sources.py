"""From the inputs that a user names (files, folders, patterns, lists) to the pictures to explain."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..arguments import is_path, shown
from ..errors import ArgumentError, ImageError
from ..files import digest, identity, walk
from ..pictures.reading import PICTURE_SUFFIXES

STANDARD_INPUT = "-"
_LIST_SUFFIXES = (".txt", ".lst")
# Bytes. File systems allow 255 per name, which has to hold two slugs, a digest, numbers, suffixes and the mark
# of a temporary file.
_LONGEST_SLUG = 80
_DIGEST_LETTERS = 16


class Source(NamedTuple):
    """One picture to explain.

    Attributes
    ----------
    path : str
        As named or found.
    id : str
        Prefix of its output files: the stem, and 64 bits of the SHA-256 of the picture's location. Pictures with the
        same name in different folders have different ids, and a picture has the same id in every run, however it is
        named.
    """

    path: str
    id: str


def named_source(name: str) -> Source:
    """Return the source of a picture that is not a file here, by its name or address."""
    return Source(name, _id(name))


def find_sources(
    inputs: Iterable[str | os.PathLike[str]], exclude: Iterable[Path] = (), stdin: BinaryIO | None = None
) -> list[Source]:
    """List the pictures that the inputs name, each once and in order.

    Parameters
    ----------
    inputs
        Each is the path of a picture; a folder, for all pictures below it, sorted; a pattern with ``*``, ``?``,
        ``[...]`` or ``**``; a .txt or .lst file with one path, folder or pattern per line; or "-" for such a list on
        standard input, where entries may also be separated by null characters. Missing files, unreadable folders and
        broken links are listed as well, so that the job reports them.
    exclude
        Folders to ignore: the job's own output.
    stdin
        Read instead of the process's standard input.

    Raises
    ------
    ArgumentError
        An input is empty or not a path.
    ImageError
        A folder or pattern contains no picture, a list cannot be read, or there are no inputs.
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
    """The real locations of files, regardless of links to their folders; the folders' locations are cached."""

    def __init__(self, exclude: Iterable[Path]) -> None:
        self._folders: dict[str, str] = {}
        self._excluded = [os.path.realpath(folder) for folder in exclude]
        self.excluded = set()
        for folder in self._excluded:
            with suppress(OSError):
                self.excluded.add(identity(folder))

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
    if not isinstance(name, str) or not is_path(name):
        raise ArgumentError(
            f"{shown(item)} does not name a picture: give the path of a picture, a folder, a pattern or a list"
        )
    return name


def _standard_input(stdin: BinaryIO | None) -> bytes:
    # Accessed only if named: a process may have none.
    if stdin is None and sys.stdin is None:
        raise ImageError("there is no standard input to read a list from: give the list as a .txt file")
    try:
        data: object = (sys.stdin.buffer if stdin is None else stdin).read()
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise ImageError(f"the list on standard input cannot be read: {error}") from None
    if not isinstance(data, bytes):
        raise ImageError("the list on standard input cannot be read: give a binary file")
    return data


def _list_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"the list '{path}' cannot be read: {error.strerror}. Check the path") from None


def _lines(data: bytes) -> list[str]:
    # To the file system, paths are bytes: os.fsdecode keeps those that are not valid UTF-8.
    data = data.removeprefix(codecs.BOM_UTF8)
    lines = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    return [os.fsdecode(line) for line in lines if line.strip()]


def _expanded(entry: str, places: _Places) -> list[str]:
    if os.path.isdir(entry):
        return _some(sorted(_pictures_below(entry, places)), f"the folder '{entry}'")
    if not os.path.lexists(entry) and glob.has_magic(entry):
        matches = _matches(entry)
        found = [path for path in matches if _is_picture(path) and not places.is_excluded(os.path.dirname(path))]
        # Links may provide several paths to a file: the shortest is kept.
        shortest = {places.of(path): path for path in sorted(found, key=len, reverse=True)}
        return _some(sorted(shortest.values()), f"the pattern '{entry}'")
    return [entry]


def _some(paths: list[str], where: str) -> list[str]:
    if not paths:
        raise ImageError(f"{where} contains no pictures (files ending in {', '.join(sorted(PICTURE_SUFFIXES))})")
    return paths


def _pictures_below(folder: str, places: _Places) -> Iterator[str]:
    unreadable: list[str] = []
    if places.is_excluded(folder):
        return
    tree = walk(folder, lambda error: unreadable.append(str(error.filename)), exclude=places.excluded)
    for parent, names in tree:
        yield from filter(_is_picture, (os.path.join(parent, name) for name in names))
    yield from unreadable


def _matches(pattern: str) -> list[str]:
    """Return the paths that a pattern matches, as `glob.glob` does, but visiting each folder once.

    `glob` follows links that lead back to their own folder again and again, and recurses into every folder.
    """
    drive, rest = os.path.splitdrive(pattern)
    parts = [part for part in re.split(r"[/\\]" if os.sep == "\\" else "/", rest) if part]
    found = [drive + os.sep if rest[:1] in (os.sep, os.altsep) else drive]
    for number, part in enumerate(parts, start=1):
        is_last = number == len(parts)
        found = [path for folder in found for path in _step(folder, part, is_last)]
    return found


def _step(folder: str, part: str, is_last: bool) -> Iterator[str]:
    """Yield the matches of one part of a pattern in a folder; ``folder`` is empty for the current one."""
    if part == "**":
        tree = walk(folder or os.curdir, lambda error: None, follow_links=True)
        for parent, names in tree:
            place = parent if folder else parent.removeprefix(os.curdir).removeprefix(os.sep)
            yield place
            if is_last:
                yield from (os.path.join(place, name) for name in names)
    elif not glob.has_magic(part):
        path = os.path.join(folder, part)
        if os.path.lexists(path):
            yield path
    else:
        yield from (os.path.join(folder, name) for name in _names(folder or os.curdir) if _fits(name, part))


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        # A file, or a folder that cannot be read, in the middle of a pattern matches nothing.
        return []


def _fits(name: str, part: str) -> bool:
    return fnmatch.fnmatch(name, part) and (not name.startswith(".") or part.startswith("."))


def _is_picture(path: str) -> bool:
    """Return whether to explain a file that was found; a broken link counts, so that it is reported."""
    return os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES and (
        os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))
    )


def _id(place: str) -> str:
    letters = digest([Path(place).as_posix().encode("utf-8", "surrogateescape")])[:_DIGEST_LETTERS]
    stem = slug(Path(place).stem)
    return f"{stem}-{letters}" if stem else letters


def slug(text: str) -> str:
    """Return the text reduced to letters, digits, "-" and "_", and short enough to be part of a file name."""
    letters = re.sub(r"[^\w-]+", "_", text).strip("_")
    return letters.encode()[:_LONGEST_SLUG].decode(errors="ignore")
