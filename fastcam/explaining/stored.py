"""A model file without its weights: a message of a few kilobytes, and the location of each weight in the file.

A model is a Protocol Buffers message. Parsing it copies every weight, and ONNX Runtime copies them again. Here the
message is walked instead: large weights stay on disk until they are read, once, into their final place.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..protobuf import varint

# Field numbers of onnx.proto3.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW_DATA = 1, 2, 8, 9
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_EXTERNAL = 1
# Wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# onnx.TensorProto.DataType: types of the weights that are left in the file.
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 7: np.dtype("<i8"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}

# Size in bytes from which a weight is left in the file. Constants that determine shapes are much smaller.
_LEAST = 4096


class StoredTensor(NamedTuple):
    """Type, shape and offset of a weight in a file."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> npt.NDArray[Any]:
        """Read the weight from the file.

        Raises
        ------
        OSError
            The file is missing or has become shorter.
        """
        array = np.empty(self.shape, self.dtype)
        self._read_into(array.reshape(-1).view(np.uint8).data)
        return array

    def read_rows(self, count: int) -> Iterator[npt.NDArray[Any]]:
        """Return the weight ``count`` rows at a time; raises OSError as `read` does."""
        row = self.nbytes // self.shape[0]
        for first in range(0, self.shape[0], count):
            rows = min(count, self.shape[0] - first)
            yield self._replace(shape=(rows, *self.shape[1:]), offset=self.offset + first * row).read()

    def _read_into(self, memory: memoryview) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            begin = 0
            while begin < self.nbytes:
                count = file.readinto(memory[begin:])
                if not count:
                    raise OSError(f"{self.path}: the file was truncated while it was being read")
                begin += count


class StoredModel(NamedTuple):
    """A model whose large weights stay in the file.

    Attributes
    ----------
    message : bytes
        The ModelProto, in which the large weights are external data that point into the file itself.
    tensors : dict of str to StoredTensor
        Large weights by name.
    has_external_data : bool
        Whether the file keeps weights in other files.
    """

    message: bytes
    tensors: dict[str, StoredTensor]
    has_external_data: bool


class _Field(NamedTuple):
    number: int
    wire: int
    begin: int  # of the tag
    value: int  # the number, or the offset of the bytes
    end: int


def read_stored(path: Path) -> StoredModel:
    """Read the structure of a model file.

    Raises
    ------
    ValueError
        The file is not a Protocol Buffers message.
    OSError
        The file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        tensors: dict[str, StoredTensor] = {}
        has_external_data = False
        outer: list[bytes] = []
        inner: list[bytes] = []
        for field in _fields(data, 0, len(data)):
            if field.number != _MODEL_GRAPH or field.wire != _BYTES:
                outer.append(data[field.begin : field.end])
                continue
            for part in _fields(data, field.value, field.end):
                whole = data[part.begin : part.end] if part.end - part.begin < _LEAST else None
                if part.number != _GRAPH_INITIALIZER or part.wire != _BYTES:
                    inner.append(whole or data[part.begin : part.end])
                    continue
                name, tensor, header, external = _tensor(path, data, part)
                has_external_data |= external
                if tensor is None:
                    inner.append(whole or data[part.begin : part.end])
                    continue
                tensors[name] = tensor
                inner.append(_delimited(_GRAPH_INITIALIZER, header + _external(path.name, tensor)))
        message = b"".join((*outer, _delimited(_MODEL_GRAPH, b"".join(inner))))
    return StoredModel(message, tensors, has_external_data)


def _tensor(path: Path, data: mmap.mmap, part: _Field) -> tuple[str, StoredTensor | None, bytes, bool]:
    """Return a TensorProto's name, its weight if it stays in the file, its other fields, and whether it is external."""
    name, kind, shape, raw, external = "", 0, [], None, False
    header: list[bytes] = []
    for field in _fields(data, part.value, part.end):
        if field.number == _TENSOR_RAW_DATA and field.wire == _BYTES:
            raw = field
            continue
        header.append(data[field.begin : field.end])
        if field.number == _TENSOR_NAME and field.wire == _BYTES:
            name = data[field.value : field.end].decode()
        elif field.number == _TENSOR_TYPE and field.wire == _VARINT:
            kind = field.value
        elif field.number == _TENSOR_DIMS:
            shape += [field.value] if field.wire == _VARINT else _packed(data, field)
        elif field.number in (_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION):
            external = True
    if raw is None or raw.end - raw.value < _LEAST or kind not in _DTYPES:
        return name, None, b"", external
    tensor = StoredTensor(path, _DTYPES[kind], tuple(shape), raw.value)
    if tensor.nbytes != raw.end - raw.value:
        raise ValueError(f"initializer {name!r} has {raw.end - raw.value} bytes instead of {tensor.nbytes}")
    return name, tensor, b"".join(header), external


def _packed(data: mmap.mmap, field: _Field) -> list[int]:
    numbers, position = [], field.value
    while position < field.end:
        number, position = _varint(data, position, field.end)
        numbers.append(number)
    return numbers


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[_Field]:
    while position < end:
        begin = position
        tag, position = _varint(data, position, end)
        wire = tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position, end)
        elif wire == _BYTES:
            length, value = _varint(data, position, end)
            position = value + length
        elif wire in (_FIXED32, _FIXED64):
            value = position
            position += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"byte {begin} does not start a field of a message")
        if position > end:
            raise ValueError(f"the field at byte {begin} extends past the end of the message")
        yield _Field(tag >> 3, wire, begin, value, position)


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Return a base-128 number and the position after it."""
    number = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise ValueError(f"the number before byte {position} does not end")


def _external(location: str, tensor: StoredTensor) -> bytes:
    """Return the fields of a TensorProto that locate its data."""
    entries = {"location": location, "offset": str(tensor.offset), "length": str(tensor.nbytes)}
    pairs = (_delimited(1, key.encode()) + _delimited(2, value.encode()) for key, value in entries.items())
    where = b"".join(_delimited(_TENSOR_EXTERNAL_DATA, pair) for pair in pairs)
    return where + varint(_TENSOR_DATA_LOCATION << 3 | _VARINT) + varint(_EXTERNAL)


def _delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | _BYTES) + varint(len(content)) + content
