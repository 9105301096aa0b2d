"""Writing a graph to disk: complete or not at all, and without a second copy of the weights in memory.

A model is a Protocol Buffers message. Its fields may be written one after the other, so the weights go from their
arrays straight to the file; building the message first would hold VGG16 in memory three times.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import external_data_helper, helper

from ..arrays import Array
from ..files import digest, replacing
from ..graph import Graph
from ..protobuf import varint

# Field numbers of onnx.proto3, with wire type 2 (length-delimited).
_MODEL_GRAPH = 7 << 3 | 2
_GRAPH_INITIALIZER = 5 << 3 | 2
_TENSOR_RAW_DATA = 9 << 3 | 2

# Protocol Buffers rejects messages of 2 GiB; the nodes and names need some room too.
INLINE_LIMIT = 2**31 - 2**24
# Shape arithmetic has to be readable without the data file.
_EXTERNAL_MINIMUM = 1024
# Page size: runtimes map the data file.
_ALIGNMENT = 4096


def write_model(
    graph: Graph,
    path: Path,
    metadata: Mapping[str, str],
    complete: Callable[[Path], Mapping[str, str]] = lambda _: {},
) -> int:
    """Write a graph as an .onnx file; above 2 GB its weights go to a second file next to it.

    The weights file is named after its content and complete before the .onnx file that reads it gets its final name:
    readers find the old pair or the new one, never a mixture. Older weights of this model are removed at the
    end.

    Parameters
    ----------
    graph : Graph
    path : Path
    metadata : mapping of str to str
    complete : callable, optional
        Receives the path of the file, which is complete but does not have its final name yet, and returns further
        metadata. If it raises an error, no file appears.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    WriteError
        The disk is full or the folder not writable; existing files are left untouched.
    """
    # Not ascontiguousarray, which turns a scalar into a row.
    arrays = {name: np.asarray(array, order="C") for name, array in {**graph.constants, **graph.defaults}.items()}
    large = sum(array.nbytes for array in arrays.values()) > INLINE_LIMIT
    outside = {name: array for name, array in arrays.items() if large and array.nbytes >= _EXTERNAL_MINIMUM}
    skeleton = graph.skeleton(metadata=metadata)
    data_path = path.with_name(f"{path.name}.{_digest(outside)}.data")
    new = outside and not data_path.exists()
    size = 0
    try:
        if outside:
            with replacing(data_path) as file:
                for name, array in outside.items():
                    skeleton.graph.initializer.append(_write_outside(file, name, array, data_path.name))
                size += file.tell()
        with replacing(path) as file:
            _write_message(file, skeleton, {name: array for name, array in arrays.items() if name not in outside})
            file.flush()
            # Parsers merge messages that follow each other.
            further = onnx.ModelProto()
            helper.set_model_props(further, dict(complete(Path(file.name))))
            file.write(further.SerializeToString(deterministic=True))
            size += file.tell()
    except BaseException:
        if new:
            data_path.unlink(missing_ok=True)
        raise
    _remove_older_weights(path, data_path if outside else None)
    return size


def _digest(arrays: Mapping[str, Array]) -> str:
    parts = (part for name, array in arrays.items() for part in (name.encode(), array.reshape(-1).view(np.uint8).data))
    return digest(parts)[:16]


def _remove_older_weights(path: Path, current: Path | None) -> None:
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name) and other != current:
            with contextlib.suppress(OSError):
                other.unlink()


def _write_outside(file: BinaryIO, name: str, array: Array, location: str) -> onnx.TensorProto:
    """Append an array to the data file and return the message that points at it."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    tensor = _header(name, array)
    tensor.raw_data = b""
    external_data_helper.set_external_data(tensor, location, offset=file.tell(), length=array.nbytes)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    _write_array(file, array)
    return tensor


def _write_message(file: BinaryIO, skeleton: onnx.ModelProto, arrays: Mapping[str, Array]) -> None:
    """Write ``skeleton`` with ``arrays`` as further initializers of its graph."""
    graph = skeleton.graph.SerializeToString(deterministic=True)
    tensors = {name: _tensor_prefix(name, array) for name, array in arrays.items()}
    prefixes = {
        name: varint(_GRAPH_INITIALIZER) + varint(len(prefix) + arrays[name].nbytes) + prefix
        for name, prefix in tensors.items()
    }
    total = len(graph) + sum(len(prefix) + arrays[name].nbytes for name, prefix in prefixes.items())
    outer = onnx.ModelProto()
    outer.CopyFrom(skeleton)
    outer.ClearField("graph")
    file.write(outer.SerializeToString(deterministic=True) + varint(_MODEL_GRAPH) + varint(total) + graph)
    for name, prefix in prefixes.items():
        file.write(prefix)
        _write_array(file, arrays[name])


def _write_array(file: BinaryIO, array: Array) -> None:
    file.write(array.reshape(-1).view(np.uint8).data)


def _tensor_prefix(name: str, array: Array) -> bytes:
    """Return a TensorProto's bytes up to the start of its raw data."""
    header: bytes = _header(name, array).SerializeToString(deterministic=True)
    return header + varint(_TENSOR_RAW_DATA) + varint(array.nbytes)


def _header(name: str, array: Array) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
