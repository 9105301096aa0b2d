"""Notes: strings with a kind."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from fastcam.metadata import Metadata
from fastcam.notes import NOTE_KINDS, Note


def test_a_note_reads_as_its_sentence_and_is_told_apart_by_its_kind() -> None:
    note = Note("widened", "The model computes in float16: it is exported in float32.")
    assert note == "The model computes in float16: it is exported in float32."
    assert "float16" in note
    assert f"{note}" == json.loads(json.dumps(note))
    assert note.kind == "widened"
    assert {note.kind for note in (note, Note("widened", "in other words"))} == {"widened"}


def test_copies_keep_the_kind() -> None:
    note = Note("scores", "ö")
    for copied in (copy.deepcopy(note), pickle.loads(pickle.dumps(note))):
        assert (copied, copied.kind) == ("ö", "scores")


def test_the_kinds_are_a_closed_set() -> None:
    kind: Any = "chatter"
    with pytest.raises(ValueError, match="unknown kind of note 'chatter'; known: batch, "):
        Note(kind, "text")


def test_the_file_keeps_notes_and_their_kinds() -> None:
    kinds: Any = NOTE_KINDS
    notes = tuple(Note(kind, f"ü {kind}") for kind in kinds)
    written = Metadata(("a",), ("a",), None, "NHWC", None, "none", "onnx", notes=notes).to_properties()
    read = Metadata.from_properties(written, "m.onnx").notes
    assert [(note.kind, str(note)) for note in read] == [(note.kind, str(note)) for note in notes]
    del written["fastcam.notes"]
    assert Metadata.from_properties(written, "older.onnx").notes == ()
