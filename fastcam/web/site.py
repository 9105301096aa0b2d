"""`build_site`: a folder that explains photos in the browser."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FileFormatError, ModelError, WriteError
from ..files import replacing, why_no_file, writing
from ..metadata import Metadata
from ..pictures.writing import palette
from ..selftest import SelfTest
from .runtime import PACKAGE, runtime_files

_PAGE_FILES = ("index.html", "page.css", "page.js", "worker.js", "resize.js")
_FACTS, _MODEL, _RUNTIME = "model.json", "model.onnx", "ort"
# Browsers address 4 GB of WebAssembly memory, which has to hold the file and the session's copy of its weights.
LARGEST_MODEL = 1_000_000_000
_HOW_TO_EXPORT = "fastcam export MODEL FILE --draw heatmaps --picture input --target required"


@dataclass(frozen=True)
class Site:
    """A folder that `build_site` wrote.

    Attributes
    ----------
    folder : Path
    bytes : dict of str to int
        Sizes of its parts: "model", "WebAssembly", "WebGPU" (a browser loads only one of the two runtimes) and "page".
    """

    folder: Path
    bytes: dict[str, int]


def build_site(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    title: str | None = None,
    archive: str | os.PathLike[str] | None = None,
) -> Site:
    """Write a static page that explains photos with an exported file, in the browser only.

    Parameters
    ----------
    model : path
        A file of ``fastcam.export(..., draw="heatmaps", picture="input", target="required")``.
    folder : path
        Created if it does not exist; an older site in it is replaced.
    title : str, optional
        The page's heading; by default the file's name.
    archive : path, optional
        ONNX Runtime Web as ``npm pack`` writes it; by default npm downloads it.

    Raises
    ------
    ArgumentError
        The file does not draw heatmaps, does not take pictures or has an optional ``target`` (the message says how to
        export it), or it is too large for a browser; or the folder holds something else.
    FileFormatError, ModelError
        The file was not made by `fastcam.export`, is missing or damaged.
    MissingExtraError
        npm is not installed, and no archive is given.
    WriteError
        The folder cannot be written.
    """
    source, destination = Path(model), Path(folder)
    facts = _facts(source, title or source.stem)
    _check_folder(destination)
    sizes = {"model": source.stat().st_size, "WebAssembly": 0, "WebGPU": 0, "page": 0}
    # Everything that can fail comes before the first file is written.
    runtime = dict(runtime_files(None if archive is None else Path(archive)))
    with writing(destination):
        (destination / _RUNTIME).mkdir(parents=True, exist_ok=True)
    # The facts mark the folder as a site, so that a failed run can be repeated.
    _write(destination / _FACTS, json.dumps(facts, ensure_ascii=False).encode())
    for name, content in runtime.items():
        _write(destination / _RUNTIME / name, content)
        kind = "WebGPU" if "webgpu" in name or "asyncify" in name else "WebAssembly"
        sizes[kind] += len(content)
    templates = importlib.resources.files(__package__) / "templates"
    for name in _PAGE_FILES:
        content = (templates / name).read_bytes()
        _write(destination / name, content)
        sizes["page"] += len(content)
    with source.open("rb") as read, replacing(destination / _MODEL) as written:
        shutil.copyfileobj(read, written)
    return Site(destination, sizes)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _check_folder(folder: Path) -> None:
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise WriteError(f"{folder}: is a file, not a folder")
        if folder.exists() and any(folder.iterdir()) and not (folder / _FACTS).exists():
            raise ArgumentError(f"{folder} holds other files: choose a new or empty folder, or that of an older site")


def _facts(path: Path, title: str) -> dict[str, Any]:
    """Return what the page needs to know about the file."""
    import onnx

    reason = why_no_file(path)
    if reason is not None:
        raise ModelError(f"{path}: {reason}")
    if path.stat().st_size > LARGEST_MODEL:
        raise ArgumentError(_too_large(path, path.stat().st_size))
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own
        raise ModelError(f"{path}: cannot be read: {error}") from error
    properties = {entry.key: entry.value for entry in model.metadata_props}
    metadata = Metadata.from_properties(properties, str(path))
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise ArgumentError(_too_large(path, 2**31))
    lacks = {
        "does not draw heatmaps": metadata.method is None,
        "does not take pictures": metadata.picture is None,
        "has a default for its input 'target', which ONNX Runtime Web rejects": any(
            tensor.name == "target" for tensor in model.graph.initializer
        ),
        "draws signed maps": metadata.signed,
    }
    wrong = [what for what, applies in lacks.items() if applies]
    if wrong:
        raise ArgumentError(f"{path} {' and '.join(wrong)}: export the model for the browser with\n  {_HOW_TO_EXPORT}")
    image = next(item for item in model.graph.input if item.name != "target")
    if image.type.tensor_type.shape.dim[0].dim_value > 1:
        raise ArgumentError(f"{path} only takes batches of several images: export the model with a dynamic batch")
    heatmaps = next(item for item in model.graph.output if item.name == "heatmaps")
    height, width = (side.dim_value for side in heatmaps.type.tensor_type.shape.dim[2:])
    test = SelfTest.from_properties(properties, str(path))
    count = next(item for item in model.graph.output if item.name == "logits").type.tensor_type.shape.dim[1].dim_value
    if not height or not width or not count:
        raise FileFormatError(f"{path}: the sizes of its outputs are missing: export the model again")
    return {
        "title": title,
        "bytes": path.stat().st_size,
        "runtime": PACKAGE,
        "size": [height, width],
        "classes": list(metadata.classes or (f"class {index}" for index in range(count))),
        "scores": metadata.score_activation,
        "method": metadata.method,
        "layer": metadata.layers[0],
        "colors": palette("jet").ravel().tolist(),
        "selftest": {
            "shape": list(test.shape),
            "target": test.target,
            "logits": [float(number) for number in test.logits],
            "step": test.step,
            "heatmap": [float(number) for number in test.heatmap],
            "tolerance": test.tolerance,
        },
    }


def _too_large(path: Path, size: int) -> str:
    return (
        f"{path} has {size / 1e6:.0f} MB or more, but browsers load models of up to {LARGEST_MODEL / 1e6:.0f} MB: "
        "choose a smaller network, or export it with --precision fp16"
    )
