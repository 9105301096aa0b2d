"""The loop of the fuzz targets: each runs in a process of its own; if it crashes or hangs, the seed is known.

``python tests/support/fuzz_export.py FOLDER FIRST COUNT`` tries mutations number FIRST and following, and prints how
many were used and how many refused.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import fastcam

_SECONDS_EACH = 60
_MEMORY = 12 * 2**30

# Of a seed and its random numbers: tries a mutation, and returns whether there was one.
Attempt: TypeAlias = "Callable[[int, random.Random], bool]"


def fuzz(prepare: Callable[[Path], Attempt]) -> None:
    """Run a target, given what makes its attempts, of the folder to work in."""
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # A file that asks for everything is rejected before it exhausts the machine.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    attempt = prepare(folder)
    used = refused = 0
    for seed in range(first, first + count):
        (folder / "seed").write_text(str(seed), encoding="utf-8")
        # Ends the process, and says where it hung.
        faulthandler.dump_traceback_later(_SECONDS_EACH, exit=True)
        try:
            used += attempt(seed, random.Random(seed))
        except fastcam.FastcamError:
            refused += 1
    print(used, refused)
