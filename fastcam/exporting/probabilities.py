"""Which function of the logits gives probabilities, if any.

A network with one score for two classes is given a second one here: class 1 keeps its score z, and class 0 gets -z.
Both are exact: sigmoid(-z) is 1 - sigmoid(z), and the gradient of -z explains class 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError
from ..graph import Graph, static_dims
from ..notes import Note
from .importers.imported import wrong_count
from .scores import ends_in_weighted_sum
from .trials import score_seeded_images

# Float32 softmax over some thousand classes is off by 1e-6; raw scores of three images do not satisfy this by chance.
_SUM_TOLERANCE = 1e-3

_RAW = (
    "The network ends in raw scores, which may belong to a softmax or to sigmoids: no probabilities are shown. Give "
    'score_activation="softmax" if exactly one class applies to an image, or "sigmoid" if several may apply.'
)
_RAW_SINGLE = (
    'The network gives one raw score: no probability is shown. Give score_activation="sigmoid" if it is a binary '
    "classifier; omit it for a regression."
)
_MIXTURE = (
    "The outputs are probabilities of several branches combined, without one row of scores behind them: they are shown "
    "as they are, and the gradients are those of the probabilities."
)
_LOOKS_LIKE = (
    "The outputs look like probabilities (they are positive and add up to 1 for seeded noise), but no softmax was "
    "found at the end of the network: they are shown as they are, and the gradients are those of the probabilities."
)
_SELECTION = (
    "The outputs are some of the classes of a softmax: the scores before it are explained, and no probabilities are "
    "shown, because those need the scores of all classes."
)
_SINGLE_SOFTMAX = "The network ends in a softmax over a single score, which is always 1: no probability is shown."
_TWO_NAMES = (
    "The network gives one raw score and has two class names: its sigmoid is shown as the probability of the second "
    'class. This is a guess; override it with score_activation="none".'
)


class Settled(NamedTuple):
    """What the file says about its scores.

    Attributes
    ----------
    activation : {"softmax", "sigmoid", "probabilities", "none"}
    names : list of str or None
        Class names, one per score.
    notes : list of Note
    """

    activation: str
    names: list[str] | None
    notes: list[Note]


def settle_scores(graph: Graph, removed: str, wanted: str | None, names: Sequence[str] | None) -> Settled:
    """Decide which function of the logits gives probabilities, and add the second class to a binary score.

    Parameters
    ----------
    graph : Graph
        Its output is rows of scores; changed in place.
    removed : str
        What `scores.remove_score_activation` returned.
    wanted : str or None
        The caller's ``score_activation``.
    names : sequence of str or None
        Class names; a binary score takes two, or one for class 1.

    Raises
    ------
    ArgumentError
        ``wanted`` contradicts the network, or the number of names does not fit it.
    """
    (count,) = static_dims(graph, graph.outputs[0], [1])
    activation, sentence = _activation(graph, removed, wanted, count, names)
    notes = [Note("scores", sentence)] if sentence else []
    if count == 1 and activation in ("sigmoid", "probabilities"):
        _add_opposite_class(graph, activation)
        return Settled(activation, _binary_names(names), notes)
    if names is not None and len(names) != count:
        raise ArgumentError(wrong_count(len(names), count))
    return Settled(activation, None if names is None else list(names), notes)


def settle_names(activation: str, names: Sequence[str] | None, count: int) -> Settled:
    """Return what is settled for scores that are no classes; raises ArgumentError for a wrong number of names."""
    if names is not None and len(names) != count:
        raise ArgumentError(wrong_count(len(names), count))
    return Settled(activation, None if names is None else list(names), [])


def _activation(
    graph: Graph, removed: str, wanted: str | None, count: int, names: Sequence[str] | None
) -> tuple[str, str | None]:
    """Return the activation and a note on it for the model's owner."""
    problem = _contradiction(removed, wanted, count)
    if problem is not None:
        raise ArgumentError(f"score_activation={wanted!r}: {problem}")
    if removed == "softmax" and count == 1:
        return "none", _SINGLE_SOFTMAX
    if wanted is not None:
        return wanted, None
    if removed in ("softmax", "sigmoid"):
        return removed, None
    if removed == "selection":
        return "none", _SELECTION
    return _of_bare_outputs(graph, removed == "mixture", count, names)


def _contradiction(removed: str, wanted: str | None, count: int) -> str | None:
    if wanted in (None, "none", removed):
        return None
    if removed in ("softmax", "sigmoid"):
        return f"the model ends in a {removed}, which was found and removed; omit score_activation"
    if removed == "selection":
        return "the outputs are some of the classes of a softmax, whose probabilities need the scores of all"
    return "the model gives one score, whose softmax is always 1" if wanted == "softmax" and count == 1 else None


def _of_bare_outputs(graph: Graph, is_mixture: bool, count: int, names: Sequence[str] | None) -> tuple[str, str | None]:
    """Return what the outputs are if no activation was removed."""
    if is_mixture:
        return ("probabilities", _MIXTURE) if _are_shares(graph) else ("none", _RAW)
    bounded = not ends_in_weighted_sum(graph)
    if bounded and count > 1 and _are_shares(graph, total=1):
        return "probabilities", _LOOKS_LIKE
    if not bounded and count == 1 and names is not None and len(names) == 2:
        return "sigmoid", _TWO_NAMES
    return "none", _raw(count)


def _raw(count: int) -> str:
    return _RAW if count > 1 else _RAW_SINGLE


def _are_shares(graph: Graph, total: float | None = None) -> bool:
    """Return whether all scores for seeded noise are within 0..1 and sum to ``total`` for each image."""
    scores = score_seeded_images(graph)
    if scores is None or not ((scores > -_SUM_TOLERANCE) & (scores < 1 + _SUM_TOLERANCE)).all():
        return False
    return total is None or bool((np.abs(scores.sum(axis=1) - total) < _SUM_TOLERANCE).all())


def _add_opposite_class(graph: Graph, activation: str) -> None:
    """Turn (N,1) into (N,2): scores z into (-z, z), probabilities p into (1 - p, p)."""
    scores = graph.outputs[0]
    signs = graph.emit_constant(np.array([[-1, 1]], np.float32), stem="both_classes")
    if activation == "sigmoid":
        both = graph.emit("MatMul", scores, signs, stem=f"{scores}/both_classes")
    else:
        offset = graph.emit_constant(np.array([1, 0], np.float32))
        both = graph.emit("Gemm", scores, signs, offset, stem=f"{scores}/both_classes")
    graph.outputs = [both]
    graph.infer_types()


def _binary_names(names: Sequence[str] | None) -> list[str] | None:
    if names is None or len(names) == 2:
        return None if names is None else list(names)
    if len(names) == 1:
        return [f"not {names[0]}", names[0]]
    raise ArgumentError(wrong_count(len(names), 1))
