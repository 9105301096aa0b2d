"""Notes: what `export` did to a model or could not determine, for the model's owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from typing_extensions import Self

NoteKind = Literal[
    "batch", "checks", "classes", "float16", "inputs", "layer", "preprocessing", "scores", "selftest", "widened"
]

NOTE_KINDS: tuple[str, ...] = get_args(NoteKind)


class Note(str):
    """A sentence for the model's owner. It is an ordinary string, with a kind that classifies it.

    Parameters
    ----------
    kind : NoteKind
        ===============  ==========================================================================
        "batch"          the batch size is fixed, or was fixed and is dynamic now
        "checks"         a check of the exported file that was skipped, or what it found
        "classes"        the class names were completed or derived
        "float16"        constants that float16 cannot hold
        "inputs"         inputs of the source model that were dropped, replaced or converted
        "layer"          the choice of the explained layer, or what it leaves out
        "preprocessing"  how pictures become the model's input was guessed
        "scores"         how the scores relate to probabilities was guessed, or is unknown
        "selftest"       the file holds no self-test
        "widened"        a network that computes in 16 bits was exported in float32
        ===============  ==========================================================================
    text : str
        One or more complete sentences.

    Raises
    ------
    ValueError
        Unknown kind.
    """

    __slots__ = ("kind",)

    kind: NoteKind

    def __new__(cls, kind: NoteKind, text: str) -> Self:
        """Create the string and attach its kind."""
        if kind not in NOTE_KINDS:
            raise ValueError(f"unknown kind of note {kind!r}; known: {', '.join(NOTE_KINDS)}")
        note = super().__new__(cls, text)
        note.kind = kind
        return note

    def __getnewargs__(self) -> tuple[NoteKind, str]:  # type: ignore[override]  # str has one argument, a note two
        """Let copies and pickles keep the kind."""
        return self.kind, str(self)
