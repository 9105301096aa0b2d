"""NVRTC from the wheel `nvidia-cuda-nvrtc`, which compiles for every device and needs none."""

from __future__ import annotations

import ctypes
import importlib.metadata
from functools import cache
from pathlib import Path


@cache
def folder() -> Path | None:
    """The folder of the wheel's libraries; None if it is not installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).parent for file in files if file.name.startswith("libnvrtc.so")), None)


@cache
def _library() -> ctypes.CDLL:
    place = folder()
    assert place is not None
    for builtins in place.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    (path,) = (path for path in place.glob("libnvrtc.so*") if "alt" not in path.name)
    return ctypes.CDLL(str(path))


def compile_source(source: str, *options: str) -> tuple[str, str, bytes]:
    """Return NVRTC's log, the intermediate code and the binary; the binary is empty for a virtual architecture."""
    library = _library()
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"cam_kernels.cuh", 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCompileProgram(program, len(options), given)
    log = _read(library, program, "ProgramLog").decode()
    assert status == 0, log
    real = any("sm_" in option for option in options)
    binary = _read(library, program, "CUBIN") if real else b""
    code = _read(library, program, "PTX").decode()
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log, code, binary


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert getattr(library, f"nvrtcGet{what}")(program, text) == 0
    return text.raw.rstrip(b"\0")
