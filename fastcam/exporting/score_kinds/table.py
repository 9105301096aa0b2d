"""The table of scores (N,M), from which a target picks one entry per heatmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from onnx import helper

from ...graph import Graph, static_dims
from ...metadata import MAXIMUM_RANK
from ...notes import Note
from ..gradients.autodiff import target_gradients
from ..passes.open_batch import open_batch
from ..scores import make_rows, remove_score_activation


def top_scores(graph: Graph, scores: str) -> str:
    """Return the entries of every row, best first, (N,R) int64."""
    (count,) = static_dims(graph, scores, [1])
    ranks = graph.emit_integers(min(count, MAXIMUM_RANK))
    best = graph.unused_name("target/best")
    graph.append(helper.make_node("TopK", [scores, ranks], [f"{best}/logits", best], name=best, axis=1))
    return best


def _nothing(graph: Graph, scores: str, targets: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class ScoreTable:
    """How the entries of a table of scores are ranked, differentiated and described. The functions append nodes.

    Attributes
    ----------
    rank : callable
        Of the graph and the table: the entries by rank, (N,R) int64, R at most `MAXIMUM_RANK`; -1 where there are
        fewer.
    differentiate : callable
        Of the graph, the table and the targets (K,N): a value, and the gradient of the targets' scores in it.
    describe : callable
        Of the graph, the table and the targets (N,K): values that become further outputs, called as `outputs`.
    outputs : sequence of str
    localize : callable
        Of the graph, the targets (N,K) and the explained maps: the full gradient in each map, (N,K,C,h,w), where it
        is cheaper than by ``differentiate``; else None.
    """

    rank: Callable[[Graph, str], str] = top_scores
    differentiate: Callable[[Graph, str, str], tuple[str, str]] = target_gradients
    describe: Callable[[Graph, str, str], Sequence[str]] = _nothing
    outputs: Sequence[str] = ()
    localize: Callable[[Graph, str, Sequence[str]], list[str] | None] = lambda graph, targets, layers: None


CLASSES = ScoreTable()


class ScoreRequest(NamedTuple):
    """What the caller says of the scores.

    Attributes
    ----------
    kind : str
        A row of `KINDS`.
    activation : str or None
        What turns the model's outputs into probabilities.
    names : int or None
        Number of class names, the caller's or the model's own.
    are_given : bool
        Whether they are the caller's.
    """

    kind: str = "classes"
    activation: str | None = None
    names: int | None = None
    are_given: bool = False


@dataclass
class Scored:
    """A graph whose output is a table of scores.

    Attributes
    ----------
    removed : str
        What was removed after the scores, as `scores.remove_score_activation` returns it.
    table : ScoreTable
    layers : callable
        Of the graph and the candidates: the layers that are explained by default; none for the last candidate.
    notes : list of Note
    class_count : int or None
        Number of classes, where the entries are not one each.
    mask_size : (int, int) or None
        Height and width of regions that callers may give.
    end : str or None
        The last value of the network itself: it and what was appended behind it are not explained.
    context : callable or None
        As ``layers``, for the layer called "context".
    """

    removed: str
    table: ScoreTable = CLASSES
    layers: Callable[[Graph, Sequence[str]], list[str]] = lambda graph, candidates: []
    notes: list[Note] = field(default_factory=list)
    class_count: int | None = None
    mask_size: tuple[int, int] | None = None
    end: str | None = None
    context: Callable[[Graph, Sequence[str]], list[str]] | None = None


def open_classes(graph: Graph, request: ScoreRequest) -> Scored:
    """Make the scores before the final softmax or sigmoid the table; raises ModelError."""
    notes = opened_batch(graph)
    return Scored(remove_score_activation(graph), notes=notes)


def open_values(graph: Graph, request: ScoreRequest) -> Scored:
    """Make the outputs the table as they are, as for a regression; raises ModelError."""
    notes = opened_batch(graph)
    make_rows(graph)
    return Scored("none", notes=notes)


def opened_batch(graph: Graph) -> list[Note]:
    """Make a fixed batch dynamic where that is sound; return the notes on it."""
    note = open_batch(graph)
    return [note] if note else []
