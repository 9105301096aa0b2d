"""`write_report`: one static page over the results of a folder job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from ..arguments import check_path, shown
from ..errors import ArgumentError
from ..files import refuse_links, replacing, writing
from ..pictures.writing import palette
from .journal import PAGE, RESULTS, RUN, parse_line

# A browser scrolls through this many smoothly, and nobody looks at more.
MOST_IMAGES = 5000

# What the page needs from ``run.json``.
_NEEDED: Mapping[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, str),
    "method": lambda value: isinstance(value, str),
    "layers": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "colormap": lambda value: isinstance(value, str),
    "alpha": lambda value: isinstance(value, int | float) and 0 <= value <= 1,
    "started": lambda value: isinstance(value, str),
}


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` next to the ``results.jsonl`` of `fastcam.explain_files`.

    The page needs no network, no server and nothing outside the folder. It shows the first 5,000 images and lists
    the first 5,000 that were not explained; ``results.jsonl`` contains all of them.

    Parameters
    ----------
    folder : path
        The ``out`` of `fastcam.explain_files`: contains ``results.jsonl``, ``run.json`` and the thumbnails.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ArgumentError
        The folder contains no results, damaged ones, or some that were written with ``report=False``.
    WriteError
        The page cannot be written; an older one is left unchanged.
    """
    from jinja2 import Environment, PackageLoader

    folder = check_path("folder", folder)
    run = _read_run(folder / RUN)
    images: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    # Counted from the lines: the last run may have been resumed with fewer images.
    counts = {"explained": 0, "failed": 0}
    for entry in _read_entries(folder / RESULTS):
        kind, listed = ("failed", failures) if "error" in entry else ("explained", images)
        counts[kind] += 1
        if len(listed) < MOST_IMAGES:
            listed.append(_shown(entry))
    data = {
        "images": images,
        "palette": palette(run["colormap"]).ravel().tolist(),
        "alpha": run["alpha"],
    }
    # Scripts and styles are inlined by the loader, so that the page is a single file.
    loader = PackageLoader("fastcam.folders")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template(PAGE).render(run=run, data=data, failures=failures, counts=counts)
    refuse_links(folder, [PAGE])
    with replacing(folder / PAGE) as file, writing(folder / PAGE):
        file.write(page.encode("utf-8", "backslashreplace"))
    return folder / PAGE


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_bytes())
        needed = {name: run[name] for name in _NEEDED}
        wrong = [name for name, value in needed.items() if not _NEEDED[name](value)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(f"{path}: does not contain the settings of fastcam.explain_files ({error!r})") from None
    if wrong:
        raise ArgumentError(
            f"{path}: does not contain the settings of fastcam.explain_files: {wrong[0]!r} is {shown(needed[wrong[0]])}"
        )
    return {**needed, "model": PurePath(needed["model"]).name}


def _read_entries(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _entry(line, f"{path}, line {number}")
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror}): run fastcam.explain_files first") from None


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """Return the fields of a line that the page needs."""
    try:
        entry = parse_line(line)
    except ValueError as error:
        raise ArgumentError(f"{where}: is not a result of fastcam.explain_files: {error}") from None
    if "error" in entry:
        return {"path": entry["path"], "error": entry["error"]}
    if not {"thumbnail", "map_size"} <= entry.keys() or any("map" not in item for item in entry["classes"]):
        raise ArgumentError(f"{where}: was written without a report: run fastcam.explain_files with report=True")
    needed = ("path", "classes", "top", "image_size", "thumbnail", "map_size")
    return {**{name: entry[name] for name in needed}, "notes": entry.get("notes", [])}


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with its file names as links."""
    if "error" in entry:
        return entry
    classes = [{**described, "file": quote(described["file"])} for described in entry["classes"]]
    return {**entry, "thumbnail": quote(entry["thumbnail"]), "classes": classes}
