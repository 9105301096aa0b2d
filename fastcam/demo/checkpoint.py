"""PyTorch checkpoints (.pth) without torch: the state dict as NumPy arrays, from both file formats of `torch.save`.

A .pth file is a pickle, and a pickle is a program. Three gates keep a hostile one harmless: opcodes and memo indices
are checked before anything runs, only the globals of a plain state dict resolve, and they resolve to inert records
whose sizes are compared with the length of the file before an array is allocated.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from numpy.typing import NDArray

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Opcodes that `torch.save` writes for a state dict, as listed in torch/_weights_only_unpickler.py.
_OPCODES = """
    PROTO STOP GLOBAL REDUCE NEWOBJ BUILD MARK BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS
    SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT
"""
_ALLOWED_OPCODES = frozenset(_OPCODES.split())


class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# Callables are instances without a __dict__ and storage types are strings: a pickle can change neither.
class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *_flags: Any) -> _Tensor:
        return _Tensor(storage, offset, size, stride)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *_flags: Any) -> Any:
        return data


_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}

_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", storage): dtype for storage, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise ModelError(
                f"rejected global '{module}.{name}'. A state dict holds tensors only: "
                "save it with torch.save(model.state_dict(), path)"
            ) from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        tag, dtype, key, _location, numel, *view = pid
        if tag != "storage" or dtype not in _DTYPES.values() or any(view):
            raise ModelError(f"unknown storage {reprlib.repr(key)}. Save the state dict again with a current PyTorch")
        return _Storage(key, dtype, numel)


def read_state_dict(path: str | PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read the tensors of a PyTorch state dict without torch and without running code from the file.

    Parameters
    ----------
    path
        File of ``torch.save(model.state_dict(), path)``, in the zip format (PyTorch >= 1.6) or the legacy one.

    Returns
    -------
    dict of str to ndarray
        Name of each tensor to its values, in the file's order; dtype and shape as saved. Tensors that shared a
        storage share memory.

    Raises
    ------
    ModelError
        The file is missing, damaged or not a checkpoint, claims more data than it has, or holds anything but tensors.
    """
    try:
        with Path(path).open("rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            return read(file)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle or zip may raise nearly anything
        raise ModelError(
            f"{path}: not a PyTorch state dict, or damaged ({type(error).__name__}: {str(error)[:200]}). "
            "Save it again with torch.save(model.state_dict(), path)"
        ) from None


def _read_legacy(file: BinaryIO) -> dict[str, NDArray[Any]]:
    data = io.BytesIO(file.read())  # unlike a file's, its read(n) allocates no more than is left
    if _unpickle(data) != _LEGACY_MAGIC:
        raise ModelError("not a PyTorch checkpoint (no magic number)")
    if (protocol := _unpickle(data)) != _LEGACY_PROTOCOL:
        raise ModelError(f"checkpoint of unknown protocol {reprlib.repr(protocol)}")
    if not _unpickle(data)["little_endian"]:
        raise ModelError("written on a big-endian machine. Save it again on a little-endian one")
    tensors = _tensors(_unpickle(data))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    spans = {}
    for key in _unpickle(data):
        numel = int.from_bytes(data.read(8), "little")
        storage = storages.get(key)
        if storage is None or numel != storage.numel:
            raise ModelError(f"damaged: storage {reprlib.repr(key)} of {numel} elements belongs to no tensor")
        spans[key] = data.tell()
        data.seek(numel * np.dtype(storage.dtype).itemsize, io.SEEK_CUR)
    content = memoryview(data.getvalue())
    return _arrays(tensors, len(content), lambda storage, size: content[spans[storage.key] : spans[storage.key] + size])


def _read_zip(file: BinaryIO) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(file) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")

        def read(entry: str) -> bytes:
            if archive.getinfo(entry).compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"damaged: compressed entry {entry!r}")
            return archive.read(entry)

        byteorder = folder + "byteorder"
        if byteorder in archive.namelist() and read(byteorder) != b"little":
            raise ModelError("written on a big-endian machine. Save it again on a little-endian one")
        tensors = _tensors(_unpickle(io.BytesIO(read(index))))
        length = file.seek(0, io.SEEK_END)
        return _arrays(tensors, length, lambda storage, _size: read(f"{folder}data/{storage.key}"))


def _unpickle(stream: io.BytesIO) -> Any:
    """Load the pickle at the stream's position after checking all its opcodes."""
    start = stream.tell()
    _check_pickle(stream)
    stream.seek(start)
    return _Unpickler(stream, encoding="utf-8").load()


class _Value:
    """Describes an object of a pickle: its depth, its size when written out, and whether it is a string."""

    __slots__ = ("depth", "is_text", "name", "size")

    def __init__(self, parts: Sequence[_Value] = (), *, is_text: bool = False, name: str = "") -> None:
        self.depth, self.size, self.is_text, self.name = 0, 1, is_text, name
        self.add(parts)

    def add(self, parts: Sequence[_Value]) -> None:
        self.depth = max([self.depth, *(part.depth + 1 for part in parts)])
        self.size += sum(part.size for part in parts)
        if self.depth > _DEEPEST or self.size > _LARGEST:
            raise ModelError("rejected pickle of nested objects: a state dict is flat")


_DEEPEST, _LARGEST = 16, 10**7
_COUNTS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _check_pickle(stream: io.BytesIO) -> None:  # noqa: C901, PLR0912  # one case per kind of opcode
    """Run a pickle on descriptions of its objects: hashing or printing its result must terminate.

    A tuple that holds another twice, and so on, has 2**n leaves in n opcodes, and is hashed that often if it is a key;
    number keys can be chosen to collide.
    """
    stack: list[_Value | None] = []
    memo: list[_Value] = []
    for opcode, argument, _position in pickletools.genops(stream):
        if opcode.name not in _ALLOWED_OPCODES:
            raise ModelError(f"rejected pickle opcode {opcode.name}: no state dict has it")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            # The unpickler allocates its memo up to the largest index: 5 bytes could ask for 64 GB.
            if argument is None or argument > len(memo):
                raise ModelError(f"rejected pickle memo index {argument}: no state dict skips one")
            memo[argument : argument + 1] = [_top(stack)]
        elif opcode.name in ("BINGET", "LONG_BINGET") and argument is not None:
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            stack.append(None)
        elif opcode.name == "TUPLE":
            stack.append(_Value(_pop_to_mark(stack)))
        elif opcode.name in _COUNTS:
            parts = [_pop(stack) for _ in range(_COUNTS[opcode.name])]
            stack.append(_Value(parts))
        elif opcode.name in ("REDUCE", "NEWOBJ"):
            arguments, function = _pop(stack), _pop(stack)
            if function.name.endswith("OrderedDict") and arguments.size > 1:
                raise ModelError("rejected an OrderedDict built from pairs: no state dict has one")
            stack.append(_Value([arguments]))
        elif opcode.name in ("APPEND", "BUILD"):
            value = _pop(stack)
            _top(stack).add([value])
        elif opcode.name in ("APPENDS", "SETITEMS", "SETITEM"):
            items = [_pop(stack), _pop(stack)][::-1] if opcode.name == "SETITEM" else _pop_to_mark(stack)
            keys = [] if opcode.name == "APPENDS" else items[::2]
            if not all(key.is_text for key in keys):
                raise ModelError("rejected a dict whose keys are not strings: no state dict has one")
            _top(stack).add(items)
        elif opcode.name == "BINPERSID":
            _pop(stack)
            stack.append(_Value())
        elif opcode.name not in ("PROTO", "STOP"):
            is_text = opcode.name in ("BINUNICODE", "SHORT_BINSTRING")
            stack.append(_Value(is_text=is_text, name=str(argument) if opcode.name == "GLOBAL" else ""))


def _top(stack: list[_Value | None]) -> _Value:
    value = stack[-1] if stack else None
    if value is None:
        raise ModelError("damaged pickle: an opcode finds no object")
    return value


def _pop(stack: list[_Value | None]) -> _Value:
    value = _top(stack)
    stack.pop()
    return value


def _pop_to_mark(stack: list[_Value | None]) -> list[_Value]:
    values = []
    while stack and (value := stack.pop()) is not None:
        values.append(value)
    return values[::-1]


def _tensors(state: Any) -> dict[str, _Tensor]:
    if not isinstance(state, dict):
        raise ModelError(f"holds a {type(state).__name__}, not a state dict. Save model.state_dict()")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ModelError(
                f"entry {reprlib.repr(name)} is a {type(value).__name__}, not a tensor. Save model.state_dict() and "
                "nothing else"
            )
    return dict(state)


def _arrays(
    tensors: dict[str, _Tensor], length: int, read: Callable[[_Storage, int], bytes | memoryview]
) -> dict[str, NDArray[Any]]:
    """Check every claim against the file's `length` in bytes, then read each storage once."""
    storages = {tensor.storage for tensor in tensors.values()}
    sizes = {storage: storage.numel * np.dtype(storage.dtype).itemsize for storage in storages}
    if (claimed := sum(sizes.values())) > length or min(sizes.values(), default=0) < 0:
        raise ModelError(f"damaged: the storages claim {claimed} bytes in a file of {length}")
    for name, tensor in tensors.items():
        _check_bounds(name, tensor)
    flat = {storage: np.frombuffer(bytearray(read(storage, size)), storage.dtype) for storage, size in sizes.items()}
    if short := [storage.key for storage in storages if flat[storage].size != storage.numel]:
        raise ModelError(f"damaged: storage {short[0]!r} is truncated")
    return {name: _view(flat[tensor.storage], tensor) for name, tensor in tensors.items()}


def _check_bounds(name: str, tensor: _Tensor) -> None:
    storage, offset, size, stride = tensor
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = min(offset, *size, *stride, 0) == 0 and prod(size) <= storage.numel and last < storage.numel
    if not (inside or 0 in size):
        raise ModelError(
            f"damaged: tensor {name!r} of size {size} reaches outside its storage of {storage.numel} elements"
        )


def _view(flat: NDArray[Any], tensor: _Tensor) -> NDArray[Any]:
    strides = tuple(step * flat.itemsize for step in tensor.stride)
    return np.ndarray(tensor.size, flat.dtype, flat, tensor.offset * flat.itemsize, strides)
