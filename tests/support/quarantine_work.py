"""Work for the child process, well-behaved or not."""

from __future__ import annotations

import os
import time

import numpy as np


def behave(deed: bytes) -> bytes:
    """Do the requested work, and return the id of the process that did it."""
    _DEEDS[deed]()
    return f"child {os.getpid()}".encode()


def _refuse() -> None:
    raise ValueError("this one not")


def _spin() -> None:
    # In C, with the GIL held: no Python code of this process can run.
    sum(range(10**12))


_DEEDS = {
    b"nothing": lambda: None,
    b"crash": os.abort,
    b"leave": lambda: os._exit(0),
    b"hang": lambda: time.sleep(60),
    b"spin": _spin,
    b"print": lambda: os.write(1, b"noise"),
    b"hog": lambda: np.empty(2**30),
    b"refuse": _refuse,
}
