"""ONNX Runtime runs that can be stopped: by a time limit, and when the interpreter shuts down.

Until Python 3.14, a daemon thread that requests the interpreter's lock during shutdown is terminated in the middle of
ONNX Runtime's C++ code, which aborts the whole process. So runs in progress are stopped and waited for before that,
and later ones never start.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import ArgumentError, TimeLimitError

if TYPE_CHECKING:
    import onnxruntime

_Result = TypeVar("_Result")

LONGEST_TIMEOUT = threading.TIMEOUT_MAX
"""In seconds: the longest wait that the system's clocks support."""


class TimeLimit:
    """The end of the time that one call may take.

    Parameters
    ----------
    seconds : float or None
        From now on; None for no limit.

    Raises
    ------
    ArgumentError
        Not a positive number of seconds.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not _is_duration(seconds):
            raise ArgumentError(f"timeout={seconds!r}: give a positive number of seconds, or None for no limit")
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds left; None without a limit.

        Raises
        ------
        TimeLimitError
            No time is left.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> TimeLimitError:
        """Return the error for a call that took too long."""
        return TimeLimitError(
            f"the call was stopped after its timeout of {self._seconds:g} s: give it more time, or fewer images"
        )


NO_LIMIT = TimeLimit(None)


_Call: TypeAlias = "Callable[[onnxruntime.RunOptions], _Result]"


def run(call: _Call[_Result], limit: TimeLimit = NO_LIMIT, options: onnxruntime.RunOptions | None = None) -> _Result:
    """Return ``call(options)``, which runs a session.

    Parameters
    ----------
    call : callable
    limit : TimeLimit
    options : onnxruntime.RunOptions, optional
        Options that the call needs; no other run may use them at the same time.

    Raises
    ------
    TimeLimitError
        The time limit was exceeded. ONNX Runtime checks its options between two nodes of the model.
    """
    options = options or _options_of_thread()
    left = limit.left
    _under_way.enter(options)
    try:
        return call(options) if left is None else _run_within(left, call, options, limit)
    finally:
        _under_way.leave(options)


def wait_for(call: Callable[[], _Result]) -> _Result:
    """Return ``call()``, which calls ONNX Runtime and cannot be stopped."""
    _under_way.enter(None)
    try:
        return call()
    finally:
        _under_way.leave(None)


_of_thread = threading.local()


def _options_of_thread() -> onnxruntime.RunOptions:
    try:
        options: onnxruntime.RunOptions = _of_thread.options
    except AttributeError:
        import onnxruntime

        options = _of_thread.options = onnxruntime.RunOptions()
        # Log only fatal events: errors are raised.
        options.log_severity_level = 4
    return options


def _run_within(left: float, call: _Call[_Result], options: onnxruntime.RunOptions, limit: TimeLimit) -> _Result:
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        options.terminate = True

    timer = threading.Timer(left, stop)
    timer.daemon = True
    timer.start()
    try:
        return call(options)
    except Exception:
        if expired.is_set():
            raise limit.error() from None
        raise
    finally:
        timer.cancel()
        timer.join()
        if _under_way.are_wanted:
            options.terminate = False


def _is_duration(seconds: object) -> bool:
    return (
        isinstance(seconds, int | float)
        and not isinstance(seconds, bool)
        # The comparison excludes NaN, and integers too large for a float.
        and 0 < seconds <= LONGEST_TIMEOUT
    )


class _UnderWay:
    """The runs in progress in this process.

    Without a lock: adding to a list and removing from it are atomic. A run is recorded before shutdown is checked,
    and shutdown is recorded before the runs are listed, so that none slips through.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start afresh in a forked child, where other threads and their runs do not exist."""
        self._options: list[Any] = []
        self._closer: int | None = None

    def enter(self, options: Any) -> None:
        """Record a run; during interpreter shutdown, this never returns in any thread except the one shutting down."""
        self._options.append(options)
        if self._closer is not None and self._closer != threading.get_ident():
            self._options.remove(options)
            _sleep_until_the_process_ends()

    def leave(self, options: Any) -> None:
        """Remove a finished run."""
        self._options.remove(options)
        if self._closer is not None and self._closer != threading.get_ident():
            # The run was stopped: its result or error is no longer needed.
            _sleep_until_the_process_ends()

    @property
    def are_wanted(self) -> bool:
        """Whether the interpreter is not shutting down yet."""
        return self._closer is None

    def close(self) -> None:
        """Stop all runs and wait until they have ended."""
        self._closer = threading.get_ident()
        while self._options:
            for options in list(self._options):
                if options is not None:
                    options.terminate = True
            time.sleep(0.001)


def _sleep_until_the_process_ends() -> None:
    forever = threading.Lock()
    forever.acquire()
    forever.acquire()


_under_way = _UnderWay()
atexit.register(_under_way.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_under_way.reset)
