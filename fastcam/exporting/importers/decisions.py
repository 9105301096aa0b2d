"""Outputs that are decisions (a label, the index of the top class), traced back to the scores behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import onnx

from ...graph import attribute, operator
from ...notes import Note

# Ops that turn scores into a decision, and those that turn decisions into labels.
_DECIDING_OPS = frozenset(["ArgMax", "TopK", "ai.onnx.ml::ZipMap", "ai.onnx.ml::ArrayFeatureExtractor"])
_LABELLING_OPS = frozenset(["ai.onnx.ml::LabelEncoder", "ai.onnx.ml::CategoryMapper", "Gather", "GatherElements"])
_PASSING_OPS = frozenset("Cast Flatten Identity Reshape Squeeze Unsqueeze".split())


class Scores(NamedTuple):
    """The outputs, with decisions replaced by their scores.

    Attributes
    ----------
    outputs : list of str
        Without repetitions.
    classes : tuple of str or None
        Names by index, where a decision holds them.
    note : Note or None
        What was replaced.
    """

    outputs: list[str]
    classes: tuple[str, ...] | None
    note: Note | None


def find_scores(nodes: Iterable[onnx.NodeProto], constants: Iterable[str], outputs: Sequence[str]) -> Scores:
    """Replace outputs that are decisions by the scores behind them.

    Parameters
    ----------
    nodes : iterable of onnx.NodeProto
    constants : iterable of str
        Names of the initializers.
    outputs : sequence of str
        The outputs to look at.
    """
    producers = {name: node for node in nodes for name in node.output if name}
    known = {*constants, *(name for name, node in producers.items() if operator(node) == "Constant")}
    found = {name: _scores_of(producers, known, name) for name in outputs}
    decided = {name: scores for name, scores in found.items() if scores != name}
    if not decided:
        return Scores(list(outputs), None, None)
    # A label next to the scores adds nothing; a ZipMap pairs the scores with names.
    maps = [name for name in decided if operator(producers[name]) == "ai.onnx.ml::ZipMap"]
    scores = list(dict.fromkeys(found[name] for name in found if name in maps or name not in decided))
    scores = scores or list(dict.fromkeys(found.values()))
    made, behind = (", ".join(map(repr, dict.fromkeys(values))) for values in (decided, decided.values()))
    text = f"The outputs {made} are decisions: the scores that they were made from, {behind}, are explained."
    return Scores(scores, _labels(producers, decided), Note("scores", text))


def _scores_of(producers: Mapping[str, onnx.NodeProto], constants: set[str], output: str) -> str:
    """Return the scores behind an output that is a decision, any other output itself."""
    value, decided = output, False
    while (node := producers.get(value)) is not None:
        op = operator(node)
        computed = [name for name in node.input if name and name not in constants]
        is_step = op in _DECIDING_OPS or op in _LABELLING_OPS or (op in _PASSING_OPS and not decided)
        if not is_step or len(computed) != 1:
            break
        decided |= op in _DECIDING_OPS
        value = computed[0]
    return value if decided else output


def _labels(producers: Mapping[str, onnx.NodeProto], outputs: Iterable[str]) -> tuple[str, ...] | None:
    """Return the class names that a ZipMap pairs with the scores."""
    for name in outputs:
        node = producers.get(name)
        labels = attribute(node, "classlabels_strings") if node is not None and node.op_type == "ZipMap" else None
        if labels:
            return tuple(label.decode() if isinstance(label, bytes) else str(label) for label in labels)
    return None
