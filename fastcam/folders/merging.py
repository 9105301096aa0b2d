"""`merge_results`: the shards of one job, explained apart, as one folder of results."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..arguments import check_path, shown
from ..errors import ArgumentError, WriteError
from ..files import locked, open_regular, refuse_links, replacing, writing
from .journal import FOLDERS, PAGE, RESULTS, RUN, parse_line
from .report import write_report

# Facts of a run that differ between shards and say nothing about what was drawn.
_OWN_FACTS = ("shard", "images", "failed", "seconds", "started", "finished", "state", "providers", "model")


class MergeResult(NamedTuple):
    """The result of `merge_results`.

    Attributes
    ----------
    results : Path
    report : Path or None
    images, failed : int
    """

    results: Path
    report: Path | None
    images: int
    failed: int


class _Shard(NamedTuple):
    folder: Path
    run: dict[str, Any]
    number: int
    of: int


def merge_results(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> MergeResult:
    """Join the folders that ``explain_files(..., shard=(1, n))`` to ``shard=(n, n)`` wrote.

    The result is what one job over all pictures would have written, line by line: results, pictures and report. The
    shards' folders stay as they are.

    Parameters
    ----------
    folders : sequence of path
        All n of them, in any order, finished.
    out : path
        A folder without results; created if it does not exist.

    Raises
    ------
    ArgumentError
        A shard is missing, given twice, unfinished or damaged, had other settings, or explained other pictures.
    WriteError
        The folder cannot be written, or holds results already.
    """
    shards = _ordered([_opened(check_path("folders", folder)) for folder in _listed(folders)])
    destination = check_path("out", out)
    with writing(destination):
        destination.mkdir(parents=True, exist_ok=True)
    if (destination / RESULTS).exists() or (destination / RUN).exists():
        raise WriteError(f"{destination} contains results already: choose another folder")
    with locked(destination):
        refuse_links(destination, (RESULTS, RUN, PAGE, *FOLDERS))
        counts = _write_results(shards, destination)
        _write_run(shards, destination, counts)
        page = write_report(destination) if shards[0].run.get("report") else None
    return MergeResult(destination / RESULTS, page, *counts)


def _listed(folders: Any) -> list[Any]:
    if isinstance(folders, str | os.PathLike) or not isinstance(folders, list | tuple) or not folders:
        raise ArgumentError(f"folders={shown(folders)}: give a list of the folders of all shards")
    return list(folders)


def _opened(folder: Path) -> _Shard:
    try:
        with open_regular(folder / RUN) as file:
            run = json.loads(file.read())
        number, count = run["shard"]
        known = 1 <= int(number) <= int(count) and isinstance(run["images"], int)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(f"{folder} does not hold a shard of a job ({error!r}): give folders of --shard") from None
    if not known or run.get("state") != "finished" or not (folder / RESULTS).is_file():
        raise ArgumentError(f"{folder}: its run is not finished: continue it with --resume")
    return _Shard(folder, run, int(number), int(count))


def _ordered(shards: list[_Shard]) -> list[_Shard]:
    """Return the shards by number after checking that they belong together."""
    first = shards[0]
    numbers = sorted(shard.number for shard in shards)
    missing = sorted(set(range(1, first.of + 1)) - set(numbers))
    if missing:
        raise ArgumentError(f"the shards {', '.join(f'{number}/{first.of}' for number in missing)} are missing")
    if len(set(numbers)) != len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ArgumentError(f"the shard {twice}/{first.of} is given twice")
    for shard in shards:
        different = [
            name for name in {*first.run, *shard.run} - set(_OWN_FACTS) if first.run.get(name) != shard.run.get(name)
        ]
        if shard.of != first.of or different:
            names = ", ".join(sorted(different)) or "number of shards"
            raise ArgumentError(f"{shard.folder} was explained with other settings than {first.folder}: {names}")
    ordered = sorted(shards, key=lambda shard: shard.number)
    total = sum(shard.run["images"] for shard in ordered)
    for shard in ordered:
        expected = len(range(shard.number - 1, total, shard.of))
        if shard.run["images"] != expected:
            raise ArgumentError(
                f"{shard.folder} has {shard.run['images']} pictures, and {expected} of {total} are its share: the "
                "shards listed different pictures"
            )
    return ordered


def _write_results(shards: Sequence[_Shard], destination: Path) -> tuple[int, int]:
    """Copy every line, in the order of the whole job, and the files that it names; return the counts."""
    images = failed = 0
    seen: set[str] = set()
    with ExitStack() as stack, writing(destination / RESULTS):
        files = [stack.enter_context(open_regular(shard.folder / RESULTS)) for shard in shards]
        results = stack.enter_context(replacing(destination / RESULTS))
        for shard, line in _interleaved(shards, files):
            entry = _parsed(shard, line)
            if entry["id"] in seen:
                raise ArgumentError(f"{shard.folder}: {entry['path']} was explained by two shards")
            seen.add(entry["id"])
            for name in _named(entry):
                (destination / name).parent.mkdir(exist_ok=True)
                shutil.copy2(shard.folder / name, destination / name, follow_symlinks=False)
            results.write(line)
            images += 1
            failed += "error" in entry
    return images, failed


def _interleaved(shards: Sequence[_Shard], files: Sequence[BinaryIO]) -> Iterator[tuple[_Shard, bytes]]:
    """Yield the lines in the order of the whole job: the first of each shard, the second of each, and so on."""
    for row in itertools.zip_longest(*files):
        yield from ((shard, line) for shard, line in zip(shards, row, strict=True) if line is not None)


def _parsed(shard: _Shard, line: bytes) -> dict[str, Any]:
    try:
        return parse_line(line)
    except ValueError as error:
        raise ArgumentError(f"{shard.folder / RESULTS}: a line is damaged: {error}") from None


def _named(entry: dict[str, Any]) -> Iterator[str]:
    """Yield the files that a line names."""
    named = [row.get("file") for row in entry.get("classes", [])]
    yield from dict.fromkeys(name for name in (*named, entry.get("thumbnail"), entry.get("overlay")) if name)


def _write_run(shards: Sequence[_Shard], destination: Path, counts: tuple[int, int]) -> None:
    run = {name: value for name, value in shards[0].run.items() if name != "shard"}
    run |= {
        "images": counts[0],
        "failed": counts[1],
        "seconds": round(sum(shard.run["seconds"] for shard in shards), 3),
        "started": min(shard.run["started"] for shard in shards),
        "finished": max(shard.run["finished"] for shard in shards),
    }
    with replacing(destination / RUN) as file:
        file.write(json.dumps(run, indent=2).encode() + b"\n")
