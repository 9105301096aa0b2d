"""The CUDA backend without nvcc: CuPy compiles the same source with NVRTC if the module `_cuda` is missing.

A kernel is compiled when it is first launched, with all others for its activation type, which takes a few seconds.
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DeviceError, KernelError, MissingExtraError
from .launches import PARTS, Launch, LaunchedKernels

OPTIONS = ("-std=c++17",)


class NvrtcKernels(LaunchedKernels):
    """Passes launches to CuPy, on the current device.

    Raises
    ------
    MissingExtraError
        CuPy is not installed.
    DeviceError
        There is no CUDA device, or NVRTC does not compile for it.
    """

    def __init__(self) -> None:
        self._cupy = _import_cupy()
        self._modules: dict[tuple[int, str], Any] = {}

    def _launch(self, launch: Launch, stream: int) -> None:
        kernel = self._module(_part_of(launch.kernel)).get_function(launch.kernel)
        # CuPy passes the bytes of a NumPy array unchanged: a structure by value.
        arguments = np.frombuffer(launch.arguments, np.uint8)
        try:
            with self._cupy.cuda.ExternalStream(stream):
                kernel((launch.blocks,), (launch.threads,), (arguments,), shared_mem=launch.shared_bytes)
        except self._cupy.cuda.driver.CUDADriverError as error:
            raise KernelError(f"{launch.kernel}: {error}") from error

    def _module(self, part: str) -> Any:
        """Return a part of the kernels, compiled for the current device."""
        cupy = self._cupy
        try:
            device = cupy.cuda.runtime.getDevice()
            if (device, part) not in self._modules:
                self._modules[device, part] = _load(cupy, part)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"the CUDA kernels find no device: {error}") from error
        return self._modules[device, part]


def source() -> str:
    """Return the text of `cam_kernels.cuh`, which is installed next to this file.

    Raises
    ------
    DeviceError
        It is missing.
    """
    try:
        return (files(__package__) / "cam_kernels.cuh").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DeviceError(f"fastcam is installed without its CUDA source, {error.filename}: reinstall it") from error


def compile_part(part: str, capability: int) -> bytes:
    """Compile the kernels for one type of activations, or those for all types ("any"); needs no device.

    `cupy.RawModule` is not used: it adds ``-ftz=true``, which would turn subnormal maps into zeros.

    Parameters
    ----------
    part
        A key of `launches.PARTS`.
    capability
        Compute capability, 80 for 8.0.

    Returns
    -------
    bytes
        Binary code, or intermediate code if NVRTC is older than the device.

    Raises
    ------
    DeviceError
        The source does not compile; NVRTC's log follows.
    """
    nvrtc = _import_cupy().cuda.nvrtc
    exact = capability in nvrtc.getSupportedArchs()
    newest = max((known for known in nvrtc.getSupportedArchs() if known <= capability), default=capability)
    architecture = f"-arch=sm_{capability}" if exact else f"-arch=compute_{newest}"
    program = nvrtc.createProgram(source(), "cam_kernels.cuh", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, architecture, f"-DCAM_PART={PARTS[part]}"))
        return bytes(nvrtc.getCUBIN(program) if exact else nvrtc.getPTX(program))
    except nvrtc.NVRTCError as error:
        raise DeviceError(f"NVRTC does not compile with {architecture}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _load(cupy: Any, part: str) -> Any:
    binary = compile_part(part, int(cupy.cuda.Device().compute_capability))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / part
        path.write_bytes(binary)
        module = cupy.RawModule(path=str(path))
        module.compile()
    return module


def _part_of(kernel: str) -> str:
    return next((part for part in PARTS if f"_{part}_" in kernel), "any")


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise MissingExtraError(
            "the CUDA kernels need the module fastcam.kernels.cuda._cuda, which is built if nvcc is installed, "
            "or CuPy: pip install 'fastcam[gpu]'"
        ) from error
    return cupy
