"""Transpose without merging the axes before: torch's exporter merges images and heads of an attention for it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from ...graph import Dim, Graph, attribute, operator
from .each import rewrite_each


def join_merged_transposes(graph: Graph) -> bool:
    """Reshape (N,A,...) to (N A,...), Transpose, Reshape to (N,A,...) -> Transpose, which keeps the size N known.

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "Reshape", _join)


def _join(graph: Graph, split: onnx.NodeProto) -> bool:
    moved = graph.producer(split.input[0])
    merged = graph.producer(moved.input[0]) if moved is not None and operator(moved) == "Transpose" else None
    if moved is None or merged is None or operator(merged) != "Reshape":
        return False
    source = merged.input[0]
    if any(graph.rank(name) is None for name in (source, merged.output[0], split.output[0])):
        return False
    shape, order = graph.shape(source), list(attribute(moved, "perm", ()))
    if order[:1] != [0] or len(shape) != len(order) + 1:
        return False
    whole = [0, 1, *(axis + 1 for axis in order[1:])]
    target = [shape[axis] for axis in whole]
    if not _matches(graph.shape(merged.output[0])[1:], shape[2:]):
        return False
    if not _matches(graph.shape(split.output[0])[1:], target[1:]):
        return False
    graph.rewrite(split, "Transpose", [source], perm=whole)
    return True


def _matches(sizes: Sequence[Dim], wanted: Sequence[Dim]) -> bool:
    """Return whether all sizes are known and equal."""
    return list(sizes) == list(wanted) and all(isinstance(size, int) for size in sizes)
