"""Scores of an embedding network: the cosine similarity to reference embeddings, a further input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...graph import Graph, TensorType, static_dims
from ...metadata import MAXIMUM_RANK, REFERENCE
from ..scores import make_rows
from .table import Scored, ScoreRequest, ScoreTable, opened_batch

# Of a squared length: a reference that is not given is all zeros, and similar to nothing.
_SMALLEST = 1e-24


def open_embedding(graph: Graph, request: ScoreRequest) -> Scored:
    """Make the embedding the table, (N,D); see `KINDS`. Raises ModelError where the output is not (N,D)."""
    notes = opened_batch(graph)
    make_rows(graph)
    return Scored("none", ScoreTable(_no_rank, _differentiate, _describe, ("similarity",)), notes=notes)


def _no_rank(graph: Graph, table: str) -> str:
    """Return zeros: the reference is what is explained, not an entry of the embedding."""
    rows = graph.emit("Shape", table, start=0, end=1)
    shape = graph.emit("Concat", rows, graph.emit_integers(MAXIMUM_RANK), axis=0)
    return graph.emit("Expand", graph.emit_integer(0), shape, stem="target/none")


def _describe(graph: Graph, table: str, targets: str) -> Sequence[str]:
    """Add the input ``reference`` (N,K,D), and return the similarity to each, (N,K)."""
    (size,) = static_dims(graph, table, [1])
    graph.inputs[REFERENCE] = TensorType(np.dtype(np.float32), ("reference_rows", "reference_count", size))
    graph.defaults[REFERENCE] = np.zeros((1, 1, size), np.float32)
    # As many as there are targets.
    zeros = graph.emit("Mul", graph.emit("Cast", targets, to=1), graph.emit_number(0))
    spread = graph.emit("Unsqueeze", zeros, graph.emit_integers(2))
    graph.rename(graph.emit("Add", REFERENCE, spread), graph.unused_name("reference/each"))
    own, others, products = _parts(graph, table)
    lengths = graph.emit("Sqrt", graph.emit("Mul", own, others))
    return (graph.emit("Div", products, lengths),)


def _each(graph: Graph) -> str:
    (node,) = (node for node in graph.readers(REFERENCE) if node.op_type == "Add")
    return str(node.output[0])


def _parts(graph: Graph, table: str) -> tuple[str, str, str]:
    """Return |e|^2 (N,1), |r|^2 (N,K), at least the smallest number, and e . r (N,K)."""
    each, last = _each(graph), graph.emit_integers(-1)
    smallest = graph.emit_number(_SMALLEST)
    own = graph.emit("ReduceSum", graph.emit("Mul", table, table), last, keepdims=1)
    others = graph.emit("ReduceSum", graph.emit("Mul", each, each), last, keepdims=0)
    row = graph.emit("Unsqueeze", table, graph.emit_integers(1))
    products = graph.emit("ReduceSum", graph.emit("Mul", each, row), last, keepdims=0)
    return graph.emit("Max", own, smallest), graph.emit("Max", others, smallest), products


def _differentiate(graph: Graph, table: str, target: str) -> tuple[str, str]:
    """Return d cos(e, r) / de = r / (|e| |r|) - (e . r) e / (|e|^3 |r|), (K,N,D)."""
    own, others, products = _parts(graph, table)
    lengths = graph.emit("Sqrt", graph.emit("Mul", own, others))
    last = graph.emit_integers(2)
    along = graph.emit("Div", _each(graph), graph.emit("Unsqueeze", lengths, last))
    share = graph.emit("Div", products, graph.emit("Mul", lengths, own))
    back = graph.emit(
        "Mul", graph.emit("Unsqueeze", share, last), graph.emit("Unsqueeze", table, graph.emit_integers(1))
    )
    both = graph.emit("Sub", along, back, stem="gradient/similarity")
    return table, graph.emit("Transpose", both, perm=[1, 0, 2], stem="gradient/embedding")
