"""`write_report`: one static page over the results of a folder job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ArgumentError
from ..files import replacing, writing
from ..pictures.writing import palette
from .journal import PAGE, RESULTS, RUN

# What a browser scrolls through without effort, and more than anybody looks at.
MOST_IMAGES = 5000


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` beside the ``results.jsonl`` of `fastcam.explain_files`.

    The page needs no network, no server, and nothing outside the folder. It shows the first 5,000 images, and lists as
    many that were not explained; all of them stay in ``results.jsonl``.

    Parameters
    ----------
    folder : path
        Holds ``results.jsonl``, ``run.json`` and the thumbnails.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ArgumentError
        The folder holds no results, damaged ones, or some that were made without a report.
    WriteError
        The page cannot be written; an older one is left as it was.
    """
    from jinja2 import Environment, PackageLoader

    folder = Path(folder)
    run = _read_run(folder / RUN)
    images: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    # Of what the lines hold, and not of what the last run was asked for: it may have been resumed with fewer images.
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
    # The sources are read through the loader, so that the page is the only file.
    environment = Environment(
        loader=PackageLoader("fastcam.folders"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(PAGE).render(run=run, data=data, failures=failures, counts=counts)
    with replacing(folder / PAGE) as file, writing(folder / PAGE):
        file.write(page.encode("utf-8", "backslashreplace"))
    return folder / PAGE


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_bytes())
        needed = {name: run[name] for name in ("model", "method", "layers", "colormap", "alpha", "started")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path}: holds no settings of fastcam.explain_files ({error!r})") from None
    return {**needed, "model": Path(needed["model"]).name}


def _read_entries(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _entry(line, f"{path}, line {number}")
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror}): run fastcam.explain_files first") from None


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if "error" in entry:
            return {"path": str(entry["path"]), "error": str(entry["error"])}
        known = {name: entry[name] for name in ("path", "classes", "top", "image_size")}
        drawn = {name: entry.get(name) for name in ("thumbnail", "map_size")}
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{where}: is no result of fastcam.explain_files ({error!r})") from None
    if None in drawn.values():
        raise ArgumentError(f"{where}: was made without a report: run fastcam.explain_files with report=True")
    return {**known, **drawn, "notes": entry.get("notes", [])}


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what the page needs of a line, with links that a browser follows."""
    if "error" in entry:
        return entry
    classes = [{**described, "file": quote(described["file"])} for described in entry["classes"]]
    return {**entry, "thumbnail": quote(entry["thumbnail"]), "classes": classes}
