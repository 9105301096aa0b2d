"""A process of its own for what ONNX's C++ does to models that nobody has checked.

The version converter and shape inference abort or run out of memory on some malformed models, and take the whole
process with them. Here they meet a model first in a child, which is told apart from a refusal by its death. One child
serves all models of a process, and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO

import onnx
from onnx import shape_inference

from ...errors import ModelError

_SECONDS = 20.0
_MEMORY = 8 * 2**30
_HEAD = struct.Struct("<?Q")

Work = Callable[[onnx.ModelProto], onnx.ModelProto]


class Quarantine:
    """A child process that does one piece of work on models.

    Parameters
    ----------
    work : str
        Module and name of the function that takes a model and returns one:
        "fastcam.exporting.importers.opsets:converted".
    """

    def __init__(self, work: str) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __call__(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return what the work makes of a model.

        Raises
        ------
        ModelError
            When the work refused it, or the child died of it or took longer than 20 seconds.
        """
        with self._lock:
            child = self._running()
            late = threading.Timer(_SECONDS, child.kill)
            late.start()
            try:
                _write(child.stdin, True, model.SerializeToString())
                done, answer = _read(child.stdout)
            except (OSError, EOFError) as error:
                self.close()
                raise ModelError(
                    "ONNX's own converter or shape inference crashed on this model, or took over 20 seconds: it is "
                    "malformed. Check it with onnx.checker.check_model(model, full_check=True)"
                ) from error
            finally:
                late.cancel()
        if not done:
            raise ModelError(answer.decode())
        result = onnx.ModelProto()
        result.ParseFromString(answer)
        return result

    def _running(self) -> subprocess.Popen[bytes]:
        # A fork of this process must not share its child's pipes.
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._owner = os.getpid()
            module, _, name = self._work.partition(":")
            # The child finds modules where this process does, and not in the current folder, as -c would have it; its
            # crash it keeps to itself.
            path = f"import sys; sys.path[:] = {sys.path!r}"
            code = f"{path}; from {module} import {name}; from {__name__} import serve; serve({name})"
            self._child = subprocess.Popen(  # noqa: S603  # our own code, run by this interpreter
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            atexit.register(self.close)
        return self._child

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            atexit.unregister(self.close)


def serve(work: Work) -> None:
    """Do the work on every model that arrives at standard input, and see that shape inference survives the result."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    while True:
        try:
            _, data = _read(sys.stdin.buffer)
        except EOFError:
            return
        model = onnx.ModelProto()
        model.ParseFromString(data)
        try:
            result = work(model)
            with contextlib.suppress(Exception):
                # A refusal is the caller's to word; only a crash counts here.
                shape_inference.infer_shapes(result, data_prop=True)
            answer, done = result.SerializeToString(), True
        except Exception as error:  # noqa: BLE001  # onnx throws several unrelated types, and the caller gets them all
            answer, done = str(error).encode(), False
        _write(sys.stdout.buffer, done, answer)


def _write(pipe: IO[bytes] | None, flag: bool, data: bytes) -> None:
    if pipe is None:
        raise EOFError
    pipe.write(_HEAD.pack(flag, len(data)))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes] | None) -> tuple[bool, bytes]:
    head = pipe.read(_HEAD.size) if pipe is not None else b""
    if pipe is None or len(head) < _HEAD.size:
        raise EOFError
    flag, size = _HEAD.unpack(head)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return flag, data
