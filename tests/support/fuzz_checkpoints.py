"""Mutated state dicts given to our reader, in a separate process, like `fuzz_export`.

``python tests/support/fuzz_checkpoints.py FOLDER FIRST COUNT`` prints how many were read and how many refused.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

from checkpoints import state_pickle, unzipped, zipped
from fuzz_export import SECONDS_EACH, limit_memory
from mutations import flip_bytes

import fastcam
from fastcam.demo.checkpoint import read_state_dict

# Opcodes that push, repeat, store and call; some exist only in newer protocols.
_OPCODES = [
    bytes([code]) for code in b"(.012FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x94\x95"
]
_NUMBERS = (-1, 0, 1, 2, 5, 7, 2**31, 2**62)


def _checkpoint(path: Path, pick: random.Random) -> None:
    sizes = tuple(pick.choice(_NUMBERS) for _ in range(pick.randrange(4))) if pick.random() < 0.3 else (2, 3)
    strides = tuple(pick.choice(_NUMBERS) for _ in sizes) if pick.random() < 0.3 else (3, 1)[: len(sizes)]
    numel, offset = (pick.choice(_NUMBERS) if pick.random() < 0.2 else sound for sound in (6, 0))
    legacy = pick.random() < 0.5
    program = state_pickle(numel=numel, offset=offset, size=sizes, stride=strides, legacy=legacy)
    if pick.random() < 0.4:
        place = pick.randrange(len(program))
        program = (
            program[:place] + pick.choice(_OPCODES) * pick.choice([1, 1, 50]) + program[place + pick.randrange(3) :]
        )
    (unzipped if legacy else zipped)(path, program)
    if pick.random() < 0.4:
        path.write_bytes(flip_bytes(path.read_bytes(), pick))


def run(folder: Path, first: int, count: int) -> tuple[int, int]:
    """Read mutations number ``first`` and following; return how many were read and how many rejected."""
    read = refused = 0
    for seed in range(first, first + count):
        (folder / "seed").write_text(str(seed), encoding="utf-8")
        signal.alarm(SECONDS_EACH)
        _checkpoint(folder / "w.pth", random.Random(seed))
        try:
            read_state_dict(folder / "w.pth")
            read += 1
        except fastcam.FastcamError:
            refused += 1
    return read, refused


if __name__ == "__main__":
    limit_memory()
    print(*run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
