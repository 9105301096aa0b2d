"""Merge matrix products and biases."""

from __future__ import annotations

import onnx

from ...graph import Graph, operator
from .affine import value_and_constant
from .each import rewrite_each


def join_matmul_and_bias(graph: Graph) -> bool:
    """Add(MatMul(matrix, constant matrix), constant row) -> Gemm.

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "Add", _join)


def _join(graph: Graph, add: onnx.NodeProto) -> bool:
    value, bias = value_and_constant(graph, add)
    matmul = graph.producer(value)
    if matmul is None or operator(matmul) != "MatMul" or graph.only_reader(value) is None:
        return False
    weight, row = graph.constants.get(matmul.input[1]), graph.constants.get(bias)
    if weight is None or weight.ndim != 2 or graph.rank(matmul.input[0]) != 2:
        return False
    if row is None or row.shape != (weight.shape[1],):
        return False
    graph.rewrite(add, "Gemm", [*matmul.input, bias])
    graph.remove(matmul)
    return True
