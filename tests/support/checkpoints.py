"""State dicts as torch writes them, by hand: without torch, and with replaceable parts."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

VALUES = np.arange(6, dtype="<f4")

# Hand-written pickle programs: the state dict {"w": 2x3 tensor over storage "0"}, with replaceable parts.
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HEAD = b"\x80\x02}X\x01\x00\x00\x00w" + REBUILD


def integer(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def ints(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def state_pickle(
    storage: bytes = b"ctorch\nFloatStorage\n",
    numel: int = 6,
    offset: int = 0,
    *,
    size: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    legacy: bool = False,
) -> bytes:
    persistent = b"(X\x07\x00\x00\x00storage" + storage + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + integer(numel)
    persistent += (b"N" if legacy else b"") + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return HEAD + b"(" + persistent + integer(offset) + ints(*size) + ints(*stride) + b"\x89" + hooks + b"tRs."


def zipped(path: Path, index: bytes, data: bytes = VALUES.tobytes(), **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": index, "data/0": data, **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def unzipped(path: Path, state: bytes, data: bytes = VALUES.tobytes(), claimed: int = 6, **info: Any) -> Path:
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, **info})
    parts = [*(pickle.dumps(part, 2) for part in header), state, pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + struct.pack("<Q", claimed) + data)
    return path
