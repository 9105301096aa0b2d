"""Files appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import small_classifier

from fastcam import files
from fastcam.errors import WriteError
from fastcam.exporting import writer as storage
from fastcam.exporting.writer import write_model
from fastcam.protobuf import varint


def test_the_file_equals_what_onnx_would_write(tmp_path: Path) -> None:
    graph = small_classifier()
    size = write_model(graph, tmp_path / "small.onnx", {"key": "value"})
    written = onnx.load(tmp_path / "small.onnx")
    expected = graph.to_model(metadata={"key": "value"})
    assert written == expected
    assert size == (tmp_path / "small.onnx").stat().st_size


def test_arrays_of_every_kind_survive(tmp_path: Path) -> None:
    graph = small_classifier()
    graph.defaults["image"] = np.zeros((1, 3, 12, 12), np.float32)
    graph.constants |= {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.int64),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "flags": np.array([True, False]),
    }
    write_model(graph, tmp_path / "kinds.onnx", {})
    read = {
        item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "kinds.onnx").graph.initializer
    }
    for name, array in {**graph.constants, **graph.defaults}.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**40])
def test_numbers_are_encoded_as_protocol_buffers_do(number: int) -> None:
    """Field 1 of a TensorProto is a list of dims: one packed element holds exactly the encoded number."""
    packed = onnx.TensorProto(dims=[number]).SerializeToString()
    assert packed.endswith(varint(number))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.onnx"
    path.write_bytes(b"before")

    def full(file: Any, array: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "_write_array", full)
    with pytest.raises(WriteError, match=r"kept\.onnx: cannot be written: No space left"):
        write_model(small_classifier(), path, {})
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_write_array", crash)
    with pytest.raises(KeyboardInterrupt):
        write_model(small_classifier(), tmp_path / "small.onnx", {})
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the system's answer is simulated.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(WriteError, match="not writable"):
        files.check_writable(tmp_path / "small.onnx")


def test_a_failed_second_write_leaves_the_old_pair_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "INLINE_LIMIT", 4096)
    path = tmp_path / "large.onnx"
    write_model(small_classifier(seed=0), path, {})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 2

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "_write_message", full)
    with pytest.raises(WriteError, match="No space left"):
        write_model(small_classifier(seed=1), path, {})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_of_older_versions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = storage.INLINE_LIMIT
    monkeypatch.setattr(storage, "INLINE_LIMIT", 4096)
    path = tmp_path / "large.onnx"
    (tmp_path / "large.onnx.data").write_bytes(b"somebody else's")
    for seed in (0, 1, 1):
        write_model(small_classifier(seed=seed), path, {})
        weights = list(tmp_path.glob("large.onnx.????????????????.data"))
        assert len(weights) == 1
        assert onnx.load(path).graph.initializer[0].name
    monkeypatch.setattr(storage, "INLINE_LIMIT", limit)
    write_model(small_classifier(), path, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
