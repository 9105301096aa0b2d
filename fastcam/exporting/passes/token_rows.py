"""Let products over tokens work on the tokens without reshaping them."""

from __future__ import annotations

import onnx

from ...graph import Graph, operator
from .each import rewrite_each


def join_rows_of_tokens(graph: Graph) -> bool:
    """Reshape(MatMul(Reshape(x, (N*T,C)), constant), (N,T,U)) -> MatMul(x, constant).

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "Reshape", _join)


def _join(graph: Graph, back: onnx.NodeProto) -> bool:
    product = graph.producer(back.input[0])
    if product is None or operator(product) != "MatMul" or len(graph.readers(product.output[0])) != 1:
        return False
    rows = graph.producer(product.input[0])
    if rows is None or operator(rows) != "Reshape":
        return False
    if not _are_rows_of_tokens(graph, rows.input[0], product, back.output[0]):
        return False
    graph.rewrite(back, "MatMul", [rows.input[0], product.input[1]])
    return True


def _are_rows_of_tokens(graph: Graph, tokens: str, product: onnx.NodeProto, result: str) -> bool:
    matrix = graph.constants.get(product.input[1])
    if matrix is None or matrix.ndim != 2 or graph.rank(tokens) is None or graph.rank(result) is None:
        return False
    (_, *before, channels), (_, *after, units) = graph.shape(tokens), graph.shape(result)
    known = all(isinstance(size, int) for size in before)
    return known and before == after and (channels, units) == matrix.shape
