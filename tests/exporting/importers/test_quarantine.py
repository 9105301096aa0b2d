"""The child process that tries unknown models first: if it dies, the model is rejected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastcam.errors import ModelError
from fastcam.exporting.importers import quarantine
from fastcam.exporting.importers.quarantine import CrashError, Quarantine

_WORK = "quarantine_work:behave"
_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: limits and signals of its kernel")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quarantine]:
    monkeypatch.setattr(quarantine, "SECONDS", 3.0)
    worker = Quarantine()
    yield worker
    worker.close()


def _pid(child: Quarantine) -> int:
    return int(child(_WORK, b"nothing").split()[1])


def test_one_child_does_all_the_work(child: Quarantine) -> None:
    pids = {_pid(child) for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.parametrize("deed", ["crash", "leave", "hang", "spin"])
def test_the_death_of_the_child_is_a_refusal(child: Quarantine, deed: str) -> None:
    _pid(child)
    with pytest.raises(CrashError, match="crashed on this model, or took over 3 seconds") as caught:
        child(_WORK, deed.encode())
    assert caught.value.late == (deed in ("hang", "spin"))
    _pid(child)


def test_a_refusal_keeps_its_words_and_the_child(child: Quarantine) -> None:
    before = _pid(child)
    with pytest.raises(ModelError, match=r"^this one not$"):
        child(_WORK, b"refuse")
    assert _pid(child) == before


def test_what_the_work_prints_is_not_taken_for_an_answer(child: Quarantine) -> None:
    assert child(_WORK, b"print").startswith(b"child")


@_LINUX
def test_too_much_memory_is_a_refusal(child: Quarantine) -> None:
    before = _pid(child)
    with pytest.raises(ModelError, match="more memory than"):
        child(_WORK, b"hog")
    assert _pid(child) == before
    # A model of 2 GB may take its copies.
    assert child(_WORK, b"hog", size=2**31)


def test_modules_in_the_current_folder_are_not_taken(
    child: Quarantine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of fastcam, say, whose kernels are not built."""
    for name in ("fastcam", "onnx"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _pid(child)


def test_threads_share_the_child(child: Quarantine) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: _pid(child), range(20)))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_another_thread_works_gets_a_child_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = quarantine.QUARANTINE
    before = _pid(shared)
    monkeypatch.setattr(quarantine, "SECONDS", 3.0)

    def hang() -> None:
        with pytest.raises(CrashError):
            shared(_WORK, b"hang")

    busy = threading.Thread(target=hang)
    busy.start()
    while not shared._lock.locked():
        time.sleep(0.01)
    # The other thread waits for the answer by now, and holds whatever it takes to read.
    time.sleep(0.5)
    forked = os.fork()
    if not forked:
        # Killed by the alarm if the lock or the pipes are still the parent's.
        signal.alarm(20)
        os._exit(0 if _pid(shared) != before else 1)
    assert os.waitpid(forked, 0)[1] == 0
    busy.join()


@_LINUX
@pytest.mark.parametrize("deed", ["hang", "spin"])
def test_the_child_of_a_killed_parent_ends(deed: str, tmp_path: Path) -> None:
    code = f"""
import sys, threading
sys.path[:] = {sys.path!r}
from fastcam.exporting.importers.quarantine import QUARANTINE
print(QUARANTINE("{_WORK}", b"nothing").decode().split()[1], flush=True)
threading.Timer(0.5, lambda: print("working", flush=True)).start()
QUARANTINE("{_WORK}", b"{deed}")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "working\n"
        parent.kill()
    deadline = time.monotonic() + 15
    while _is_working(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_working(pid)


def _is_working(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("executable", ["", "/nowhere/python", os.devnull])
def test_an_application_that_embeds_python_finds_an_interpreter(
    executable: str, child: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sys.executable
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: str(Path(real).parent))
    _pid(child)


def test_no_interpreter_is_a_refusal_that_names_the_way_out(child: Quarantine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: None)
    with pytest.raises(ModelError, match=r"set sys\.executable"):
        child(_WORK, b"nothing")
