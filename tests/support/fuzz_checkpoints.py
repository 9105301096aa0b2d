"""Mutated state dicts given to our reader: see `fuzzing`."""

from __future__ import annotations

import random
from pathlib import Path

from checkpoints import state_pickle, unzipped, zipped
from fuzzing import Attempt, fuzz
from mutations import flip_bytes

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


def prepare(folder: Path) -> Attempt:
    """Return what reads a mutation."""

    def attempt(seed: int, pick: random.Random) -> bool:
        _checkpoint(folder / "w.pth", pick)
        read_state_dict(folder / "w.pth")
        return True

    return attempt


if __name__ == "__main__":
    fuzz(prepare)
