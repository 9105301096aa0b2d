"""The source distribution: tracked files, and nothing else from the work tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest

_ROOT = Path(__file__).parents[1]
_PACKED = {"bench", "csrc", "docs", "examples", "fastcam", "tests"}
_DIRT = (
    ".venv/lib/python3.11/site-packages/other/tests/test_other.py",
    ".venv/lib/python3.11/site-packages/other/csrc/other.cpp",
    "build/cp311/csrc/cam_cpu.o",
    "private/bench/notes.txt",
    "notes.txt",
    ".env",
    "fastcam/kernels/_cpu.cpython-311-x86_64-linux-gnu.so",
    "fastcam/__pycache__/cli.cpython-311.pyc",
    "bench/results/peers.json",
)


def test_the_sdist_of_a_dirty_tree_contains_what_is_tracked(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core: pip install fastcam[test]")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    tracked = [name for name in listed.stdout.split("\0") if name and (_ROOT / name).is_file()]
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / name, tmp_path / "tree" / name)
    for name in _DIRT:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"private")
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path / "dist")],
        cwd=tmp_path / "tree",
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
        check=True,
    )
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in opened.getnames()}
    expected = {
        name
        for name in tracked
        if PurePosixPath(name).parts[0] in _PACKED or (name.count("/") == 0 and not name.startswith("."))
    }
    assert packed - {"PKG-INFO"} == expected
