"""Answer questions about shapes and types whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

from ...graph import Graph, attribute, operator


def answer_shape_questions(graph: Graph) -> bool:
    """Shape(x) or Size(x) -> constant, where the sizes are known; CastLike(x, y) -> Cast(x), where y's type is.

    Returns
    -------
    bool
        Whether anything changed, as for all passes.
    """
    changed = False
    for node in graph.nodes:
        answer = _ANSWERS.get(operator(node))
        if answer and graph.rank(node.input[0]) is not None:
            changed |= answer(graph, node)
    return changed


def _answer_shape(graph: Graph, node: onnx.NodeProto) -> bool:
    sizes = graph.shape(node.input[0])[attribute(node, "start", 0) : attribute(node, "end")]
    if not all(isinstance(size, int) for size in sizes):
        return False
    graph.replace_by_constants(node, [np.array(sizes, np.int64)])
    return True


def _answer_size(graph: Graph, node: onnx.NodeProto) -> bool:
    sizes = [size for size in graph.shape(node.input[0]) if isinstance(size, int)]
    if len(sizes) != len(graph.shape(node.input[0])):
        return False
    graph.replace_by_constants(node, [np.array(math.prod(sizes), np.int64)])
    return True


def _answer_type(graph: Graph, node: onnx.NodeProto) -> bool:
    dtype = graph.dtype(node.input[1])
    if dtype is None:
        return False
    graph.rewrite(node, "Cast", node.input[:1], to=helper.np_dtype_to_tensor_dtype(dtype))
    return True


_ANSWERS: dict[str, Callable[[Graph, onnx.NodeProto], bool]] = {
    "Shape": _answer_shape,
    "Size": _answer_size,
    "CastLike": _answer_type,
}
