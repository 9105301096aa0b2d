"""The child process that meets unknown models first: its death is a refusal, and the next model gets a new one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

from fastcam.errors import ModelError
from fastcam.exporting.importers import quarantine
from fastcam.exporting.importers.quarantine import Quarantine


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quarantine]:
    monkeypatch.setattr(quarantine, "_SECONDS", 3.0)
    worker = Quarantine("quarantine_work:behave")
    yield worker
    worker.close()


def _asked_to(deed: str) -> onnx.ModelProto:
    return onnx.ModelProto(doc_string=deed)


def test_a_model_comes_back_as_the_child_made_it(child: Quarantine) -> None:
    assert [child(_asked_to("nothing")).producer_name for _ in range(3)] == ["child"] * 3


@pytest.mark.parametrize("deed", ["crash", "leave", "hang"])
def test_the_death_of_the_child_is_a_refusal(child: Quarantine, deed: str) -> None:
    child(_asked_to("nothing"))
    with pytest.raises(ModelError, match="crashed on this model, or took over"):
        child(_asked_to(deed))
    assert child(_asked_to("nothing")).producer_name == "child"


def test_a_refusal_keeps_its_words_and_the_child(child: Quarantine) -> None:
    child(_asked_to("nothing"))
    before = child._child
    with pytest.raises(ModelError, match=r"^this one not$"):
        child(_asked_to("refuse"))
    assert child(_asked_to("nothing")).producer_name == "child"
    assert child._child is before


def test_memory_is_bounded(child: Quarantine) -> None:
    with pytest.raises(ModelError):
        child(_asked_to("hog"))
    assert child(_asked_to("nothing")).producer_name == "child"


def test_modules_in_the_current_folder_are_not_taken(
    child: Quarantine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of fastcam, say, whose kernels are not built."""
    for name in ("fastcam", "onnx"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert child(_asked_to("nothing")).producer_name == "child"


def test_threads_share_the_child(child: Quarantine) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: child(_asked_to("nothing")).producer_name, range(20)))
    assert results == ["child"] * 20
