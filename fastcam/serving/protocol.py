"""The Open Inference Protocol, version 2: tensors in JSON, and behind it as bytes (the binary tensor extension).

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and Triton's extension_binary_data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arguments import shown
from ..arrays import Array
from ..errors import ArgumentError

HEADER = "inference-header-content-length"

_DTYPES: dict[str, str] = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_NAMES = {np.dtype(code).newbyteorder("="): name for name, code in _DTYPES.items()}
_BYTES = "BYTES"
_LONGEST_SHAPE = 8


def type_name(dtype: Any) -> str:
    """Return the protocol's name of a type."""
    return _NAMES[np.dtype(dtype).newbyteorder("=")]


def read_message(body: bytes, header_length: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the JSON object of a request, and its inputs by name: arrays, or lists of bytes for BYTES.

    Raises
    ------
    ArgumentError
        The message is damaged, and where.
    """
    length = len(body) if header_length is None else _length(header_length, len(body))
    try:
        message = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the request is not JSON: {error}") from None
    inputs = message.get("inputs") if isinstance(message, dict) else None
    if not isinstance(inputs, list) or not inputs or not all(isinstance(item, dict) for item in inputs):
        raise ArgumentError('the request is not an object with a list "inputs"')
    found: dict[str, Any] = {}
    rest = memoryview(body)[length:]
    for item in inputs:
        name = item.get("name")
        if not isinstance(name, str) or name in found:
            raise ArgumentError(f"the inputs' names are missing, or not different: {shown(name)}")
        found[name], rest = _tensor(item, rest)
    if len(rest):
        raise ArgumentError(f"{len(rest)} bytes follow the last input")
    return message, found


def _length(text: str, size: int) -> int:
    length = int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else -1
    if not 0 <= length <= size:
        raise ArgumentError(f"Inference-Header-Content-Length is {shown(text)}, and the body has {size} bytes")
    return length


def _tensor(item: Mapping[str, Any], rest: memoryview) -> tuple[Any, memoryview]:
    """Return an input's value, and the bytes behind it."""
    name, shape, kind = item["name"], item.get("shape"), item.get("datatype")
    if not isinstance(shape, list) or len(shape) > _LONGEST_SHAPE or not all(_is_side(side) for side in shape):
        raise ArgumentError(f"input {name!r}: its shape is {shown(shape)}: give a list of at most 8 sides")
    if not isinstance(kind, str) or kind not in {*_DTYPES, _BYTES}:
        raise ArgumentError(
            f"input {name!r}: its datatype is {shown(kind)}: choose from {', '.join(_DTYPES)}, {_BYTES}"
        )
    count = math.prod(shape)
    parameters = item.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return _from_json(name, item.get("data"), shape, kind), rest
    if not _is_side(size) or size > len(rest):
        raise ArgumentError(f"input {name!r}: binary_data_size is {shown(size)}, and {len(rest)} bytes are left")
    block, rest = rest[:size], rest[size:]
    if kind == _BYTES:
        return _byte_strings(name, block, count), rest
    dtype = np.dtype(_DTYPES[kind])
    if size != count * dtype.itemsize:
        raise ArgumentError(f"input {name!r}: {shown(shape)} of {kind} are {count * dtype.itemsize} bytes, not {size}")
    return np.frombuffer(block, dtype).reshape(shape).astype(dtype.newbyteorder("=")), rest


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _from_json(name: str, data: Any, shape: Sequence[int], kind: str) -> Any:
    if kind == _BYTES:
        raise ArgumentError(f"input {name!r}: pictures are sent behind the JSON, with binary_data_size")
    try:
        array = np.array(data)
        known = array.dtype.kind in "biuf" and array.size == math.prod(shape)
        return array.astype(_DTYPES[kind]).reshape(shape) if known else _refuse(name, shape)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return _refuse(name, shape)


def _refuse(name: str, shape: Sequence[int]) -> Any:
    raise ArgumentError(f"input {name!r}: its data are not numbers of shape {shown(list(shape))}")


def _byte_strings(name: str, block: memoryview, count: int) -> list[bytes]:
    """Return strings that each follow their length, 4 bytes."""
    found: list[bytes] = []
    while len(block):
        size = int.from_bytes(block[:4], "little")
        if len(block) < 4 + size:
            break
        found.append(bytes(block[4 : 4 + size]))
        block = block[4 + size :]
    if len(block) or len(found) != count:
        raise ArgumentError(f"input {name!r}: its bytes are not {count} strings behind their lengths")
    return found


def write_message(answer: dict[str, Any], outputs: Mapping[str, Array], binary: set[str]) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if tensors follow it.

    Parameters
    ----------
    answer : dict
        Everything except the outputs.
    outputs : mapping of str to ndarray
    binary : set of str
        Outputs that follow the JSON as bytes.
    """
    items, blocks = [], []
    for name, array in outputs.items():
        item: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": type_name(array.dtype)}
        if name in binary:
            block = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
            item["parameters"] = {"binary_data_size": len(block)}
            blocks.append(block)
        else:
            item["data"] = array.ravel().tolist()
        items.append(item)
    text = json.dumps({**answer, "outputs": items}).encode()
    return b"".join([text, *blocks]), len(text) if blocks else None
