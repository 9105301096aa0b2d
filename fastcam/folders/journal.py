"""The state of a folder job on disk: a killed job loses nothing that was finished, and repeats nothing.

While a job runs, every finished image appends a line to ``results.partial.jsonl``. At the end the lines are sorted into
the order of the pictures and become ``results.jsonl``. A line is written after the files that it names, so those files
exist. ``run.json`` holds the settings from the start, and the counts once the job has ended.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import ArgumentError, WriteError
from ..files import LOCK, PART, locked, open_unlinked, refuse_links, replacing, writing

RESULTS = "results.jsonl"
RUN = "run.json"
PAGE = "report.html"
# The folders that belong to the job and contain nothing else.
FOLDERS = ("overlays", "heatmaps", "thumbnails")
_PARTIAL = "results.partial.jsonl"
# Everything that a job writes in its folder.
_OWN_NAMES = (RESULTS, RUN, PAGE, _PARTIAL, LOCK, *FOLDERS)
# A file that a line names: in one of the job's folders, so never an address or a path that leads elsewhere.
_OWN_FILE = re.compile(rf"({'|'.join(FOLDERS)})/[^/\\]+", re.DOTALL)

Entry = dict[str, Any]
# Size and modification time of an image's file: a different stamp means a different image.
Stamp = list[int]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_integer, value))


def _is_file(value: object) -> bool:
    return isinstance(value, str) and _OWN_FILE.fullmatch(value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    # Not NaN or infinite, which JSON in browsers does not support.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


_Check = Callable[[object], bool]

# The fields of a line and of a class in it. Optional ones are listed in `_OPTIONAL`.
_SCORE: Mapping[str, _Check] = {
    "index": _is_integer,
    "label": _is_text,
    "probability": _is_number_or_none,
    "score": _is_number,
}
_CLASS: Mapping[str, _Check] = {
    **_SCORE,
    "file": _is_file,
    "map": _is_text,
    "evidence": _is_number,
    "caption": _is_text,
    "box": _is_box,
}
_FAILED: Mapping[str, _Check] = {"path": _is_text, "id": _is_text, "error": _is_text}
_EXPLAINED: Mapping[str, _Check] = {
    "path": _is_text,
    "id": _is_text,
    "image_size": _is_size,
    # Empty only for a detector that found nothing.
    "classes": lambda value: _is_list(value, _CLASS),
    "overlay": _is_file,
    "top": lambda value: _is_list(value, _SCORE),
    "map_size": _is_size,
    "thumbnail": _is_file,
    "notes": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "stamp": lambda value: value is None or _is_size(value),
}
_OPTIONAL = frozenset(
    ("map", "map_size", "thumbnail", "notes", "stamp", "score", "evidence", "caption", "box", "overlay")
)


def _is_list(value: object, fields: Mapping[str, _Check]) -> bool:
    return isinstance(value, list) and all(_wrong_field(item, fields) is None for item in value)


def _wrong_field(found: object, fields: Mapping[str, _Check]) -> str | None:
    """Return the first field that is missing or of the wrong type; None if there is none."""
    if not isinstance(found, dict):
        return "object"
    for name, check in fields.items():
        if (name in found or name not in _OPTIONAL) and not check(found.get(name)):
            return name
    return None


def parse_line(line: bytes) -> Entry:
    """Return the contents of a line of ``results.jsonl``.

    Raises
    ------
    ValueError
        The line is not one that `explain_files` writes: not JSON, a field is missing or of the wrong type, or a file
        is outside the job's folders.
    """
    try:
        found: object = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    is_failure = isinstance(found, dict) and "error" in found
    wrong = _wrong_field(found, _FAILED if is_failure else _EXPLAINED)
    if wrong is None and isinstance(found, dict) and not is_failure and not found["classes"] and found["top"]:
        wrong = "classes"
    if wrong is not None:
        raise ValueError(f"the field {wrong!r} is missing or invalid")
    entry: Entry = found  # type: ignore[assignment]  # a dict, as was just checked
    return entry


class _Line(NamedTuple):
    """The position of an image's line."""

    file: str
    offset: int
    failed: bool
    stamp: Stamp | None


class Journal:
    """The results in one folder; made by `open_journal`."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], run: Mapping[str, Any], lines: dict[str, _Line], file: BinaryIO
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._started = run.get("started")
        self._lines = lines
        self._file = file

    def is_done(self, id_: str, stamp: Stamp | None = None) -> bool:
        """Return whether the image was explained, with this stamp if one is given, and all its files exist."""
        line = self._lines.get(id_)
        return line is not None and not line.failed and stamp in (None, line.stamp)

    def has_failed(self, id_: str) -> bool:
        """Return whether an earlier run could not explain the image."""
        return id_ in self._lines and self._lines[id_].failed

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write the settings and ``facts``, so that the next run can compare."""
        self._started = self._started or facts["started"]
        self._write_run({**facts, "started": self._started, "state": "running"})

    def add(self, entry: Entry) -> None:
        """Append one image's line; the files that it names have been written."""
        with writing(self._folder / _PARTIAL):
            offset = self._file.tell()
            self._file.write(_line(entry))
            # To the system, not to the disk: that is enough to survive a killed process.
            self._file.flush()
        self._lines[entry["id"]] = _described(entry, _PARTIAL, offset)

    def finish(self, order: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Write ``results.jsonl`` in this order of ids, followed by earlier images not among them, and the facts."""
        wanted = dict.fromkeys([*(id_ for id_ in order if id_ in self._lines), *self._lines])
        with writing(self._folder / RESULTS), contextlib.ExitStack() as stack:
            names = {self._lines[id_].file for id_ in wanted}
            files = {name: stack.enter_context((self._folder / name).open("rb")) for name in names}
            with replacing(self._folder / RESULTS) as results:
                for id_ in wanted:
                    line = self._lines[id_]
                    files[line.file].seek(line.offset)
                    results.write(files[line.file].readline())
        counts = {"images": len(wanted), "failed": sum(line.failed for line in self._lines.values())}
        self._write_run({**facts, **counts, "started": self._started, "state": "finished"})
        with writing(self._folder / _PARTIAL):
            self._file.close()
            (self._folder / _PARTIAL).unlink()

    def _write_run(self, facts: Mapping[str, Any]) -> None:
        with replacing(self._folder / RUN) as file:
            file.write(json.dumps({**self._settings, **facts}, indent=2).encode() + b"\n")


@contextlib.contextmanager
def open_journal(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[Journal]:
    """Open the results in a folder, and lock it until the end of the block.

    Parameters
    ----------
    folder : Path
        Created if it does not exist.
    settings : mapping
        Everything that the outputs depend on, as JSON types.
    resume : bool
        Whether to continue an earlier run.

    Raises
    ------
    WriteError
        The folder cannot be written, contains an earlier run (without ``resume``) or links in place of the job's own
        files, or another run is writing there.
    ArgumentError
        The earlier run had other settings.
    """
    with contextlib.ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            refuse_links(folder, _OWN_NAMES)
            run = _earlier_run(folder, settings, resume)
            names = (RESULTS, _PARTIAL) if run else ()
            lines = {id_: line for name in names for id_, line in _read_lines(folder, name)}
            _remove_leftovers(folder)
            file = open_unlinked(folder / _PARTIAL, "ab" if run else "wb")
            stack.callback(_close, file)
        yield Journal(folder, settings, run, lines, file)


def _close(file: BinaryIO) -> None:
    # Every line was flushed when it was added. Only a line that could not be written remains, which was reported then.
    with contextlib.suppress(OSError):
        file.close()


def _earlier_run(folder: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """Return the contents of ``run.json``; empty if there is no earlier run."""
    # Empty partial results alone mean that a run was killed before it wrote its settings, and so before its first line.
    there = [name for name in (RESULTS, RUN, PAGE) if (folder / name).exists()]
    if (folder / _PARTIAL).exists() and (folder / _PARTIAL).stat().st_size:
        there.append(_PARTIAL)
    if not there:
        return {}
    if RUN not in there:
        raise WriteError(
            f"{folder}: contains {', '.join(there)}, but no {RUN} of the run that wrote it: choose another folder"
        )
    if not resume:
        raise WriteError(
            f"{folder}: contains an earlier run ({', '.join(there)}): resume it (--resume), or choose another folder"
        )
    try:
        run = json.loads((folder / RUN).read_bytes())
        earlier = {name: run.get(name) for name in settings}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ArgumentError(
            f"{folder / RUN}: cannot be read ({error}), so the run cannot be resumed: choose another folder"
        ) from None
    changed = [
        f"{name} was {earlier[name]!r}, is {value!r}" for name, value in settings.items() if earlier[name] != value
    ]
    if changed:
        raise ArgumentError(
            f"{folder}: the earlier run had other settings ({', '.join(changed)}): "
            "resume with the same ones, or choose another folder"
        )
    return dict(run)


def _read_lines(folder: Path, name: str) -> Iterator[tuple[str, _Line]]:
    """Yield the id and position of every valid line; a last line that was cut off is removed."""
    if not (folder / name).exists():
        return
    with open_unlinked(folder / name, "r+b") as file:
        offset = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(offset)
                break
            with contextlib.suppress(ValueError):
                # The image of a damaged line is processed again.
                entry = parse_line(line)
                if _files_exist(folder, entry):
                    yield entry["id"], _described(entry, name, offset)
            offset += len(line)


def _files_exist(folder: Path, entry: Entry) -> bool:
    # After a power failure a renamed file may be empty.
    paths = [folder / name for name in files_of(entry)]
    return all(path.is_file() and path.stat().st_size for path in paths)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a killed run; the lock guarantees that no other run is writing now."""
    for place in (folder, *(folder / name for name in FOLDERS)):
        for part in place.glob(".*.part"):
            if PART.fullmatch(part.name):
                part.unlink()


def files_of(entry: Entry) -> list[str]:
    """Return the files that a line names, relative to the job's folder."""
    named = [entry[field] for field in ("thumbnail", "overlay") if field in entry]
    return [*named, *(item["file"] for item in entry.get("classes", ()))]


def _described(entry: Entry, file: str, offset: int) -> _Line:
    return _Line(file, offset, "error" in entry, entry.get("stamp"))


def _line(entry: Entry) -> bytes:
    # ASCII with escapes, so that names that are not valid UTF-8 survive as well.
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
