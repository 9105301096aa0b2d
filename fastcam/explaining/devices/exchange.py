"""Arrays on a device, from and to other libraries: DLPack and the CUDA array interface (version 3).

https://dmlc.github.io/dlpack/latest/python_spec.html
https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ImageError
from . import Device
from .memory import Block

_CPU, _CUDA, _CUDA_MANAGED = 1, 2, 13
_TYPE_CODES = {"i": 0, "u": 1, "f": 2}
_BFLOAT = 4
_LEGACY_STREAM = 1
_NAME, _USED = b"dltensor", b"used_dltensor"


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DLManagedTensor._fields_ = (  # how ctypes declares a structure that its own callback takes
    ("tensor", _DLTensor),
    ("context", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.restype, _set_name.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
# For a capsule that is being destroyed: it has no references left to count.
_is_named = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class HasDLPack(Protocol):
    """An array that supports DLPack."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


class HasInterface(Protocol):
    """An array with the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Foreign:
    """An array in device memory that another library owns.

    Attributes
    ----------
    pointer : int
    shape : tuple of int
    strides : tuple of int or None
        In elements; None if the array is C-contiguous.
    dtype : str
        Name of the type as in NumPy, or "bfloat16".
    owner : object
        Keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    owner: object

    def is_dense(self, order: Sequence[int] | None = None) -> bool:
        """Return whether it is dense with its axes in this order, outermost first; None means the given order."""
        if self.strides is None:
            axes = [axis for axis in order or () if self.shape[axis] != 1]
            return axes == sorted(axes)
        expected = 1
        for axis in reversed(range(len(self.shape)) if order is None else order):
            if self.shape[axis] != 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True


def is_on_device(value: Any) -> bool:
    """Return whether it is an array in the memory of a CUDA device."""
    kind = getattr(value, "__dlpack_device__", None)
    if kind is not None:
        return int(kind()[0]) in (_CUDA, _CUDA_MANAGED)
    return hasattr(value, "__cuda_array_interface__")


def device_number(value: Any) -> int:
    """Return the number of the device that holds an array, or 0 if its library does not say."""
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return int(getattr(getattr(value, "device", None), "id", 0))


def borrow(value: Any, device: Device, stream: int, *, dense: bool = True) -> Foreign:
    """Take an array from another library; work enqueued on ``stream`` from now on waits for whatever fills the array.

    Parameters
    ----------
    value, device, stream
    dense : bool
        Whether to reject an array that is not C-contiguous.

    Raises
    ------
    ImageError
        It is on another device, not dense, or its library refuses to export it.
    """
    take = _from_dlpack if hasattr(value, "__dlpack__") else _from_interface
    try:
        foreign = take(value, device, stream)
    except ImageError:
        raise
    except Exception as error:  # each library raises its own, for example for a tensor that requires gradients
        raise ImageError(f"cannot take the {type(value).__name__} on the device: {error}") from error
    if dense and not foreign.is_dense():
        raise ImageError(
            f"the array on the device has shape {foreign.shape} and strides {foreign.strides}, in elements: make it "
            "contiguous"
        )
    return foreign


def _from_dlpack(value: Any, device: Device, stream: int) -> Foreign:
    _check_place(int(value.__dlpack_device__()[1]), device)
    capsule = value.__dlpack__(stream=stream)
    managed = _Managed(capsule)
    tensor = managed.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    dtype = _name_of(tensor.dtype)
    return Foreign((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, managed)


def _name_of(dtype: Any) -> str:
    kind = next((kind for kind, code in _TYPE_CODES.items() if code == dtype.code), None)
    if dtype.lanes == 1 and (dtype.code, dtype.bits) == (_BFLOAT, 16):
        return "bfloat16"
    if dtype.lanes != 1 or kind is None:
        raise ImageError("the array on the device holds neither integers nor floats: convert it to float32 or uint8")
    return np.dtype(f"{kind}{dtype.bits // 8}").name


def _from_interface(value: Any, device: Device, stream: int) -> Foreign:
    interface = value.__cuda_array_interface__
    _check_place(int(getattr(getattr(value, "device", None), "id", device.index)), device)
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        strides = tuple(step // dtype.itemsize for step in strides)
    producer = interface.get("stream")
    # Version 2 has no stream: it leaves synchronisation to the default stream.
    if interface.get("version", 0) < 3:
        producer = _LEGACY_STREAM
    if producer is not None:
        event = device.event_create()
        device.event_record(event, producer)
        device.stream_wait_event(stream, event)
        device.event_destroy(event)
    return Foreign(int(interface["data"][0]), shape, strides, dtype.name, value)


def _check_place(index: int, device: Device) -> None:
    if index != device.index:
        raise ImageError(
            f"the array is on device {index}, the model on device {device.index}: "
            f'copy it, or open Explainer(..., device="cuda:{index}")'
        )


class _Managed:
    """A tensor taken out of its capsule; it is released with this object."""

    _pointer: Any = None

    def __init__(self, capsule: object) -> None:
        self._pointer = ctypes.cast(_pointer_of(capsule, _NAME), ctypes.POINTER(_DLManagedTensor))
        _set_name(capsule, _USED)
        self.tensor: Any = self._pointer.contents.tensor

    def __del__(self) -> None:
        # The capsule may not have held a tensor.
        deleter = self._pointer.contents.deleter if self._pointer else None
        if deleter:
            deleter(self._pointer)


# Tensors exported to consumers and not yet released, by number.
_handed_out: dict[int, tuple[object, ...]] = {}
_numbers = itertools.count(1)


def _give_back(managed: Any) -> None:
    _handed_out.pop(managed.contents.context, None)


def _destroy(capsule: Any) -> None:
    """Release a tensor that no consumer has taken."""
    if _is_named(capsule, _NAME):
        managed = ctypes.cast(_pointer_in(capsule, _NAME), ctypes.POINTER(_DLManagedTensor))
        _give_back(managed)


# Callbacks live as long as the process: a consumer may call them at any time.
_deleter, _destructor = _Deleter(_give_back), _Destructor(_destroy)


class DeviceTensor:
    """A dense, complete array in device memory: nothing on the device still writes to it.

    Other libraries take it without a copy: ``torch.from_dlpack(tensor)``, ``cupy.from_dlpack(tensor)``,
    ``jax.dlpack.from_dlpack(tensor)``, or any library that reads the CUDA array interface. The memory is freed
    with the last array that uses it.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._device = device
        self._block = Block(device, max(1, self.nbytes))

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def pointer(self) -> int:
        """Address of the first element."""
        return self._block.pointer

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceTensor(shape={self.shape}, dtype={self.dtype}, device={self._device.index})"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The array in version 3 of the interface; there is no stream to wait for."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Type and number of the device."""
        return self._device.dlpack_type, self._device.index

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """Return a DLPack capsule; the array is complete, so every stream may read it at once."""
        number = next(_numbers)
        sides = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed = _DLManagedTensor(
            _DLTensor(
                self.pointer,
                _DLDevice(*self.__dlpack_device__()),
                len(self.shape),
                _DLDataType(_TYPE_CODES[self.dtype.kind], self.dtype.itemsize * 8, 1),
                sides,
                None,
                0,
            ),
            number,
            _deleter,
        )
        _handed_out[number] = (managed, sides, self._block)
        return _new_capsule(ctypes.addressof(managed), _NAME, _destructor)

    @classmethod
    def upload(cls, device: Device, values: NDArray[Any], stream: int) -> DeviceTensor:
        """Copy an array to the device and wait for the copy."""
        tensor = cls(device, values.shape, values.dtype)
        if values.size:
            pinned = Block(device, tensor.nbytes, pinned=True)
            place = device.view(pinned.pointer, tensor.nbytes, writes=True)
            place[...] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            device.copy_in(tensor.pointer, pinned.pointer, tensor.nbytes, stream)
            device.stream_synchronize(stream)
        return tensor

    def numpy(self) -> NDArray[Any]:
        """Copy to the host and wait for the copy."""
        self._device.activate()
        pinned = Block(self._device, max(1, self.nbytes), pinned=True)
        stream = self._device.stream_create()
        try:
            self._device.copy_out(pinned.pointer, self.pointer, self.nbytes, stream)
            self._device.stream_synchronize(stream)
        finally:
            self._device.stream_destroy(stream)
        data = self._device.view(pinned.pointer, self.nbytes, writes=False)
        return np.array(data.view(self.dtype).reshape(self.shape))
