"""A child process in which C++ code handles unchecked models.

ONNX's version converter and shape inference, and ONNX Runtime, abort, hang or run out of memory on some malformed
models, and take the whole process with them. Here a child process tries each model first: if it dies, the model is
rejected. One child serves the whole process and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ...errors import ModelError

# Per request, not including the child's start.
SECONDS = 20.0
# Beyond the child's idle memory and some copies of the model.
MEMORY = 2 * 2**30
_COPIES = 6
# Limit for the whole child if the memory in use is unknown.
_WHOLE_MEMORY = 8 * 2**30
_HEAD = struct.Struct("<BdQQQ")


class _Child(NamedTuple):
    """A running child, and this process's ends of its pipes; it ends when the lifeline is closed."""

    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    answers: IO[bytes]
    lifeline: int


class CrashError(ModelError):
    """The child died while working.

    Attributes
    ----------
    late : bool
        Whether it was killed because it took too long.
    """

    def __init__(self, message: str, *, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Quarantine:
    """A child process that works on models, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __call__(self, work: str, data: bytes, *, size: int | None = None) -> bytes:
        """Return the result of ``work`` on ``data``.

        Parameters
        ----------
        work : str
            Module and name of a function from bytes to bytes: "fastcam.exporting.importers.opsets:converted_bytes".
        data : bytes
        size : int, optional
            Bytes of the model, from which the memory limit is computed; by default those of ``data``.

        Raises
        ------
        CrashError
            The child died, or took longer than `SECONDS`.
        ModelError
            The work raised an error or needs more memory than `MEMORY` plus some copies of the model, or no child can
            be started.
        """
        with self._lock:
            child = self._running()
            late = threading.Timer(SECONDS, child.process.kill)
            late.start()
            memory = MEMORY + _COPIES * (len(data) if size is None else size)
            try:
                _write(child.requests, 0, SECONDS, memory, work.encode(), data)
                failed, _, _, _, answer = _read(child.answers)
            except (OSError, EOFError) as error:
                # The timer is still running if the child was killed before it fired.
                timed_out = late.finished.is_set()
                self._end()
                raise CrashError(
                    "ONNX's converter, its shape inference or ONNX Runtime crashed on this model, or took over "
                    f"{SECONDS:.0f} seconds: it is malformed. Check it with onnx.checker.check_model(model, "
                    "full_check=True)",
                    late=timed_out,
                ) from error
            finally:
                late.cancel()
        if failed:
            raise ModelError(answer.decode(errors="replace"))
        return answer

    def _running(self) -> _Child:
        if self._child is None or self._child.process.poll() is not None:
            self._end()
            self._child = _start()
            atexit.register(self.close)
        return self._child

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.process.kill()
            child.process.wait()
            _close_pipes(child)
            atexit.unregister(self.close)

    def forget(self) -> None:
        """Start afresh in a forked process: the child, and possibly the lock, belong to threads of the parent."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            _close_pipes(child)
            # Never wait for a process that is not ours.
            child.process.returncode = 0
            atexit.unregister(self.close)


QUARANTINE = Quarantine()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=QUARANTINE.forget)


def _close_pipes(child: _Child) -> None:
    child.requests.close()
    child.answers.close()
    os.close(child.lifeline)


def _start() -> _Child:
    # The child finds modules where this process does, and not in the current folder as -c would.
    path = f"import sys; sys.path[:] = {sys.path!r}"
    interpreters = _interpreters()
    inner, lifeline = os.pipe()
    code = f"{path}; from {__name__} import serve; serve({inner})"
    try:
        for interpreter in interpreters:
            with contextlib.suppress(OSError):
                process = subprocess.Popen(  # noqa: S603  # our own code, run by this interpreter
                    [interpreter, "-c", code],
                    # A buffer has a lock: a fork would inherit one that a thread of the parent holds for ever.
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # A crash is reported by the resulting error.
                    stderr=subprocess.DEVNULL,
                    pass_fds=() if sys.platform == "win32" else (inner,),
                )
                if process.stdin is not None and process.stdout is not None:
                    return _Child(process, process.stdin, process.stdout, lifeline)
    finally:
        os.close(inner)
    os.close(lifeline)
    raise ModelError(
        f"cannot start a Python process to check the model in (tried {interpreters}): set sys.executable to the path "
        f"of a Python {sys.version_info.major}.{sys.version_info.minor} interpreter"
    )


def _interpreters() -> list[str]:
    """Return the interpreters to try: this process's own unless it is an application, then the installed one."""
    own = [] if getattr(sys, "frozen", False) or not sys.executable else [sys.executable]
    folder = sysconfig.get_config_var("BINDIR")
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [*own, *([str(Path(folder, name))] if folder else [])]


def serve(lifeline: int) -> None:
    """Handle every request that arrives on standard input, as long as the parent holds the lifeline."""
    # Other writes to standard output must not end up between the answers.
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _end_with_the_parent(lifeline)
    idle = _memory_in_use()
    while True:
        try:
            _, seconds, memory, name, data = _read(requests)
        except EOFError:
            return
        with _limits(seconds, idle, memory):
            failed, answer = _answer(name.decode(), data)
        _write(answers, failed, 0, 0, b"", answer)


def _answer(work: str, data: bytes) -> tuple[int, bytes]:
    module, _, name = work.partition(":")
    try:
        return 0, getattr(importlib.import_module(module), name)(data)
    except MemoryError:
        return 1, b"the model needs more memory than a model of its size should: it is malformed"
    except Exception as error:  # noqa: BLE001  # C++ code throws several unrelated types, and the caller gets them all
        return 1, str(error).encode()


def _end_with_the_parent(lifeline: int) -> None:
    """Make the kernel end this process when the parent's end of a pipe is closed, whatever is running here."""
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


@contextlib.contextmanager
def _limits(seconds: float, idle: int, memory: int) -> Iterator[None]:
    """Limit the time and memory of a block."""
    if sys.platform == "win32":
        yield
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = idle + memory if idle else max(_WHOLE_MEMORY, memory)
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    # The parent's own timer fires first; this one is for a parent that has died.
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _memory_in_use() -> int:
    """Return the bytes of address space in use; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _write(pipe: IO[bytes], flag: int, seconds: float, memory: int, name: bytes, data: bytes) -> None:
    for part in (_HEAD.pack(flag, seconds, memory, len(name), len(data)), name, data):
        left = memoryview(part)
        while left:
            left = left[pipe.write(left) :]


def _read(pipe: IO[bytes]) -> tuple[int, float, int, bytes, bytes]:
    flag, seconds, memory, *lengths = _HEAD.unpack(_read_exactly(pipe, _HEAD.size))
    name, data = (_read_exactly(pipe, length) for length in lengths)
    return flag, seconds, memory, name, data


def _read_exactly(pipe: IO[bytes], count: int) -> bytes:
    """Return the next bytes of an unbuffered pipe; raises EOFError if there are fewer."""
    found = bytearray()
    while len(found) < count:
        part = pipe.read(count - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)
