"""The source of the CUDA kernels on the CPU: `csrc/tests/cuda_shim.hpp` emulates blocks and threads.

With ``FASTCAM_SHIM_SANITIZE=1`` AddressSanitizer and UndefinedBehaviorSanitizer watch it; Python then has to be started
with libasan in ``LD_PRELOAD``.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from device_support import DeviceMemory, HostedKernels, numpy_type
from numpy.typing import NDArray

from fastcam.errors import KernelError
from fastcam.kernels.cuda.interface import DeviceArray, DeviceType
from fastcam.kernels.cuda.launches import Launch, LaunchedKernels

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SANITIZED = os.environ.get("FASTCAM_SHIM_SANITIZE") == "1"
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def missing() -> str | None:
    """Why the kernels cannot be emulated here; None if they can."""
    if compiler() is None:
        return "no C++ compiler"
    if sys.platform != "linux":
        return "the emulation is made for Linux"
    return None


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++")


def build(folder: Path, source: str | None = None, *, sanitized: bool = SANITIZED) -> Path:
    """Compile `cam_kernels.cuh`, or a changed text of it, and return the library."""
    command = compiler()
    assert command is not None
    tests = folder / "tests"
    tests.mkdir(parents=True)
    (folder / "cuda").mkdir()
    (folder / "cuda" / "cam_kernels.cuh").write_text(source or (CSRC / "cuda" / "cam_kernels.cuh").read_text())
    for name in ("cuda_shim.hpp", "cam_kernels_shim.cpp"):
        shutil.copy(CSRC / "tests" / name, tests / name)
    library = folder / "libcam_kernels_shim.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # No contraction: the blend is rounded as written. 16-byte loads alias other types, as CUDA allows.
    options += ["-ffp-contract=off", "-fno-strict-aliasing", *(SANITIZERS if sanitized else [])]
    subprocess.run([command, *options, tests / "cam_kernels_shim.cpp", "-o", library], check=True)
    return library


class ShimKernels(LaunchedKernels):
    """Runs the launches in one of the orders of threads."""

    def __init__(self, library: Path, order: str = "ascending") -> None:
        self._library = ctypes.CDLL(str(library))
        self._order = ORDERS[order]
        self._run = self._library.shim_launch
        self._run.restype = ctypes.c_bool
        self._run.argtypes = [
            *(ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t),
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t),
        ]
        self._library.shim_kernel_name.restype = ctypes.c_char_p
        self.launches: list[Launch] = []

    def kernel_names(self) -> list[str]:
        count = self._library.shim_kernel_count()
        return [self._library.shim_kernel_name(i).decode() for i in range(count)]

    def _launch(self, launch: Launch, stream: int) -> None:
        self.launches.append(launch)
        message = ctypes.create_string_buffer(200)
        done = self._run(
            *(launch.kernel.encode(), launch.blocks, launch.threads, launch.shared_bytes),
            *(launch.arguments, len(launch.arguments), self._order, message, len(message)),
        )
        if not done:
            raise KernelError(f"{launch.kernel}: {message.value.decode()}")


class HostMemory(DeviceMemory):
    """Heap blocks of the exact size, for AddressSanitizer; without it, between guards that must stay unchanged."""

    def __init__(self) -> None:
        self._guard = 0 if SANITIZED else 256
        self._libc = ctypes.CDLL(None)
        self._blocks: list[tuple[int, int]] = []

    def allocate(self, shape: Sequence[int], dtype: DeviceType) -> DeviceArray:
        size = math.prod(shape) * numpy_type(dtype).itemsize
        start = ctypes.c_void_p()
        assert self._libc.posix_memalign(ctypes.byref(start), 16, ctypes.c_size_t(size + 2 * self._guard)) == 0
        assert start.value is not None
        # All bits set: NaN in every type of floats.
        ctypes.memset(start, 0xFF, size + 2 * self._guard)
        self._blocks.append((start.value, size))
        return DeviceArray(start.value + self._guard, tuple(shape), dtype)

    def upload(self, array: NDArray[Any], dtype: DeviceType | None = None) -> DeviceArray:
        kind: Any = dtype or array.dtype.name
        place = self.allocate(array.shape, kind)
        dense = np.ascontiguousarray(array)
        ctypes.memmove(place.pointer, dense.ctypes.data, dense.nbytes)
        return place

    def download(self, array: DeviceArray) -> NDArray[Any]:
        result = np.empty(array.shape, numpy_type(array.dtype))
        ctypes.memmove(result.ctypes.data, array.pointer, result.nbytes)
        return result

    def release(self) -> None:
        """Free all blocks, and check that nothing was written outside them."""
        blocks, self._blocks = self._blocks, []
        intact = True
        for start, size in blocks:
            for guard in (start, start + self._guard + size):
                intact &= ctypes.string_at(guard, self._guard) == b"\xff" * self._guard
            self._libc.free(ctypes.c_void_p(start))
        assert intact, "a kernel wrote outside its arrays"


class ShimBackend(HostedKernels):
    """The emulated kernels, their memory released after each call."""

    def __init__(self, library: Path, order: str = "ascending") -> None:
        self.shim = ShimKernels(library, order)
        self.host = HostMemory()
        super().__init__("shim", self.shim, self.host)

    def _render(self, *arguments: Any) -> int | None:
        try:
            return super()._render(*arguments)
        finally:
            self.host.release()
