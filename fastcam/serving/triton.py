"""`write_triton_repository`: an explained file as a model of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..arguments import check_choice, check_count, check_flag, check_path, check_text, checked, optional, shown
from ..errors import ArgumentError, FileFormatError, WriteError
from ..files import replacing, writing
from ..metadata import Metadata

_LABELS = "labels.txt"
# The types of explained files, by onnx.TensorProto's numbers.
_TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64"}
# Triton waits this long for a batch to fill.
_DELAY_MICROSECONDS = 2000
_DEVICES = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}


class _Tensor(NamedTuple):
    name: str
    kind: str
    # Without the batch; -1 for a dynamic side.
    dims: list[int]


class TritonModel(NamedTuple):
    """The result of `write_triton_repository`.

    Attributes
    ----------
    folder : Path
        The model's folder in the repository.
    config : Path
    inputs, outputs : tuple of str
    """

    folder: Path
    config: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@checked(
    model=check_path,
    repository=check_path,
    name=optional(check_text),
    max_batch=check_count,
    instances=check_count,
    device=lambda name, value: check_choice(name, value, list(_DEVICES)),
    tensorrt=check_flag,
)
def write_triton_repository(
    model: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_batch: int = 8,
    instances: int = 1,
    device: Literal["cpu", "gpu"] = "gpu",
    tensorrt: bool = False,
) -> TritonModel:
    """Write a model repository: the file, its configuration, and the names of its classes.

    A normal inference request then returns the heatmap; Triton batches requests, and a class that does not exist
    spoils its own answer only.

    Parameters
    ----------
    model : path
        Written by ``fastcam.export(..., target="required")``, best with ``draw="heatmaps"``: Triton cannot batch inputs
        that may be left out.
    repository : path
        Created if it does not exist; other models in it stay.
    name : str, optional
        Of the model; by default the file's name.
    max_batch : int
        Largest number of images that Triton gives to the model at once.
    instances : int
        Copies of the model that run at the same time.
    device : {"cpu", "gpu"}
    tensorrt : bool
        Whether ONNX Runtime hands the network to TensorRT.

    Returns
    -------
    TritonModel

    Raises
    ------
    ArgumentError
        The file's target may be left out, or an argument is wrong.
    FileFormatError
        The file was not made by `fastcam.export`.
    WriteError
        The repository cannot be written, or holds a model of that name.
    """
    source = Path(model)
    inputs, outputs, metadata, required = _read(source)
    if not required:
        raise ArgumentError(
            f'{source}: its input "target" may be left out, and Triton cannot batch such inputs: export the model '
            'again with target="required"'
        )
    if tensorrt and device != "gpu":
        raise ArgumentError("tensorrt=True needs device='gpu'")
    name = source.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ArgumentError(f"name={shown(name)}: use letters, digits, '.', '_' and '-'")
    fixed = _fixed_batch(source)
    config = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": max_batch if fixed is None else 0,
        "input": [_described(tensor, fixed) for tensor in inputs],
        "output": [_described(tensor, fixed) | _labelled(tensor, metadata) for tensor in outputs],
        "instance_group": [{"count": instances, "kind": _Word(_DEVICES[device])}],
        **({"dynamic_batching": _batching(max_batch)} if fixed is None and max_batch > 1 else {}),
        **({"optimization": _tensorrt(metadata)} if tensorrt else {}),
        "model_warmup": _warm_up(inputs, fixed, max_batch),
    }
    folder = Path(repository) / name
    if folder.exists():
        raise WriteError(f"{folder} exists already: choose another name, or remove it")
    _write(source, folder, config, metadata)
    return TritonModel(
        folder,
        folder / "config.pbtxt",
        tuple(tensor.name for tensor in inputs),
        tuple(tensor.name for tensor in outputs),
    )


def _read(path: Path) -> tuple[list[_Tensor], list[_Tensor], Metadata, bool]:
    """Return inputs, outputs and metadata of a file, and whether its target has no default."""
    model = _load(path)
    metadata = Metadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, str(path))
    inputs, outputs = ([_tensor(item) for item in items] for items in (model.graph.input, model.graph.output))
    defaults = {tensor.name for tensor in model.graph.initializer}
    required = any(tensor.name == "target" for tensor in inputs) and "target" not in defaults
    return [tensor for tensor in inputs if tensor.name not in defaults], outputs, metadata, required


def _load(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf and the file system each raise their own
        raise FileFormatError(f"{path}: it cannot be read as an ONNX file: {error}") from error


def _fixed_batch(path: Path) -> int | None:
    """Return the number of images that the file takes; None for any."""
    first = _load(path).graph.input[0].type.tensor_type.shape.dim[0]
    return first.dim_value or None


def _tensor(info: Any) -> _Tensor:
    shape = [side.dim_value or -1 for side in info.type.tensor_type.shape.dim]
    return _Tensor(info.name, _TYPES.get(info.type.tensor_type.elem_type, "TYPE_INVALID"), shape[1:])


class _Word(str):
    """A name that protobuf's text format writes without quotes."""

    __slots__ = ()


def _described(tensor: _Tensor, fixed: int | None) -> dict[str, Any]:
    dims = tensor.dims if fixed is None else [fixed, *tensor.dims]
    return {"name": tensor.name, "data_type": _Word(tensor.kind), "dims": dims}


def _labelled(tensor: _Tensor, metadata: Metadata) -> dict[str, Any]:
    return {"label_filename": _LABELS} if tensor.name == "logits" and metadata.classes else {}


def _batching(max_batch: int) -> dict[str, Any]:
    sizes = [size for size in (2, 4, 8, 16, 32, 64) if size < max_batch]
    return {
        "preferred_batch_size": [*sizes[-2:], max_batch],
        "max_queue_delay_microseconds": _DELAY_MICROSECONDS,
    }


def _tensorrt(metadata: Metadata) -> dict[str, Any]:
    precision = {"key": "precision_mode", "value": metadata.precision.upper()}
    accelerator = {"name": "tensorrt", "parameters": precision}
    return {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}


def _warm_up(inputs: Sequence[_Tensor], fixed: int | None, max_batch: int) -> list[dict[str, Any]]:
    """Return runs of the smallest and the largest batch, with real shapes: one class of each image."""
    sizes = [0] if fixed is not None else sorted({1, max_batch})
    return [
        {
            "name": f"batch of {size or fixed}",
            "batch_size": size,
            "inputs": [{"key": tensor.name, "value": _sample(tensor, fixed)} for tensor in inputs],
        }
        for size in sizes
    ]


def _sample(tensor: _Tensor, fixed: int | None) -> dict[str, Any]:
    # A side that may have any size is a number of classes, or of pixels of a picture.
    any_size = 1 if tensor.name == "target" else 256
    dims = [any_size if side < 0 else side for side in tensor.dims]
    return {
        "data_type": _Word(tensor.kind),
        "dims": dims if fixed is None else [fixed, *dims],
        ("zero_data" if tensor.name == "target" else "random_data"): True,
    }


def _write(source: Path, folder: Path, config: dict[str, Any], metadata: Metadata) -> None:
    """Write a model's folder; a failure leaves none behind."""
    version = folder / "1"
    try:
        with writing(folder):
            version.mkdir(parents=True)
            shutil.copy2(source, version / "model.onnx")
            for name in _data_files(source):
                shutil.copy2(source.parent / name, version / name)
        with replacing(folder / "config.pbtxt") as file:
            file.write("".join(_lines(config)).encode())
        if metadata.classes:
            with replacing(folder / _LABELS) as file:
                file.write("".join(f"{label}\n" for label in metadata.classes).encode())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _data_files(source: Path) -> set[str]:
    """Return the names of the files that hold large weights."""
    tensors = _load(source).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _lines(fields: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield protobuf's text format, one field per line."""
    for name, value in fields.items():
        numbers = isinstance(value, list) and not any(isinstance(item, dict) for item in value)
        for item in value if isinstance(value, list) and not numbers else [value]:
            if isinstance(item, dict):
                yield f"{indent}{name} {{\n"
                yield from _lines(item, indent + "  ")
                yield f"{indent}}}\n"
            else:
                yield f"{indent}{name}: {_literal(item)}\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, _Word):
        return str(value)
    return json.dumps(value)
