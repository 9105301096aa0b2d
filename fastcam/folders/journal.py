"""What a folder job has done so far, on disk: nothing finished is lost when it is killed, and nothing is done twice.

While a job runs, every finished image adds a line to ``results.partial.jsonl``. At the end the lines are put into the
pictures' order and become ``results.jsonl``. A line is written after the files that it names, so whatever a line names
is there. ``run.json`` holds the settings from the start, and the counts from the end.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import ArgumentError, WriteError
from ..files import locked, replacing, writing

RESULTS = "results.jsonl"
RUN = "run.json"
PAGE = "report.html"
# The job's own folders, in which nothing else is kept.
FOLDERS = ("overlays", "heatmaps", "thumbnails")
_PARTIAL = "results.partial.jsonl"

# What `files.replacing` writes until a file is whole.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.part", re.DOTALL)

Entry = dict[str, Any]
# Size and time of the last change of an image's file: another stamp is another image.
Stamp = list[int]


class _Line(NamedTuple):
    """Where an image's line stands."""

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
        """Whether the image was explained, with this stamp where one is known, and all its files are there."""
        line = self._lines.get(id_)
        return line is not None and not line.failed and stamp in (None, line.stamp)

    def has_failed(self, id_: str) -> bool:
        """Whether an earlier run could not explain the image."""
        return id_ in self._lines and self._lines[id_].failed

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write the settings and ``facts``, so that the next run can compare."""
        self._started = self._started or facts["started"]
        self._write_run({**facts, "started": self._started, "state": "running"})

    def add(self, entry: Entry) -> None:
        """Append one image's line; the files that it names are there."""
        with writing(self._folder / _PARTIAL):
            offset = self._file.tell()
            self._file.write(_line(entry))
            # To the system, not to the disk: a killed process loses nothing by it.
            self._file.flush()
        self._lines[entry["id"]] = _described(entry, _PARTIAL, offset)

    def finish(self, order: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Write ``results.jsonl`` in this order of ids, earlier images that are not among them last, and the facts."""
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
    """Open the results in a folder; until the end of the block, no other run may write there.

    Parameters
    ----------
    folder : Path
        Made where it does not exist.
    settings : mapping
        Everything that the outputs depend on, as JSON types.
    resume : bool
        Whether to go on with what is there.

    Raises
    ------
    WriteError
        The folder cannot be written, holds an earlier run (without ``resume``), or another run is at work in it.
    ArgumentError
        The earlier run had other settings.
    """
    with contextlib.ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            run = _earlier_run(folder, settings, resume)
            names = (RESULTS, _PARTIAL) if run else ()
            lines = {id_: line for name in names for id_, line in _read_lines(folder, name)}
            _remove_leftovers(folder)
            file = (folder / _PARTIAL).open("ab" if run else "wb")
            stack.callback(_close, file)
        yield Journal(folder, settings, run, lines, file)


def _close(file: BinaryIO) -> None:
    # Every line was flushed when it was added: what is left is one that the disk refused, which was reported then.
    with contextlib.suppress(OSError):
        file.close()


def _earlier_run(folder: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """Return what ``run.json`` says, nothing where there is no earlier run."""
    # Empty partial results alone are a run that was killed before it wrote its settings, and so before its first line.
    there = [name for name in (RESULTS, RUN, PAGE) if (folder / name).exists()]
    if (folder / _PARTIAL).exists() and (folder / _PARTIAL).stat().st_size:
        there.append(_PARTIAL)
    if not there:
        return {}
    if RUN not in there:
        raise WriteError(
            f"{folder}: holds {', '.join(there)}, but no {RUN} of a run that made it: choose another folder"
        )
    if not resume:
        raise WriteError(
            f"{folder}: holds an earlier run ({', '.join(there)}): resume it (--resume), or choose another folder"
        )
    try:
        run = json.loads((folder / RUN).read_bytes())
        earlier = {name: run.get(name) for name in settings}
    except (OSError, ValueError, AttributeError) as error:
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
    """Find the images of a file of lines; a last line that was cut off is taken away."""
    if not (folder / name).exists():
        return
    with (folder / name).open("r+b") as file:
        offset = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(offset)
                break
            entry = _entry(line)
            if entry is not None and _files_are_there(folder, entry):
                yield entry["id"], _described(entry, name, offset)
            offset += len(line)


def _files_are_there(folder: Path, entry: Entry) -> bool:
    # After a power failure a renamed file may be empty.
    paths = [folder / name for name in files_of(entry)]
    return all(path.is_file() and path.stat().st_size for path in paths)


def _remove_leftovers(folder: Path) -> None:
    """Take away what a killed run was writing; the lock says that nobody is writing now."""
    for place in (folder, *(folder / name for name in FOLDERS)):
        for part in place.glob(".*.part"):
            if _UNFINISHED.fullmatch(part.name):
                part.unlink()


def files_of(entry: Entry) -> list[str]:
    """Return the files that a line names, relative to the job's folder."""
    thumbnail = [entry["thumbnail"]] if "thumbnail" in entry else []
    return [*thumbnail, *(item["file"] for item in entry.get("classes", ()))]


def _described(entry: Entry, file: str, offset: int) -> _Line:
    return _Line(file, offset, "error" in entry, entry.get("stamp"))


def _line(entry: Entry) -> bytes:
    # Escapes only, so that names which are no UTF-8 survive as well.
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _entry(line: bytes) -> Entry | None:
    """Return what a line says, None where it is damaged."""
    try:
        entry = json.loads(line)
        is_whole = isinstance(entry["id"], str) and ("error" in entry or entry["classes"])
        return entry if is_whole and all(isinstance(name, str) for name in files_of(entry)) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
