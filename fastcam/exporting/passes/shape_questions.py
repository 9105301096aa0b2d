"""Answer questions about shapes and types whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import helper

from ...arrays import Array
from ...graph import Graph, attribute, operator


def answer_shape_questions(graph: Graph) -> bool:
    """Shape(x) or Size(x) -> constant, where the sizes are known; CastLike(x, y) -> Cast(x), where y's type is.

    Gather or Slice of Shape(x) -> constant, where the chosen sizes are known.

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


def _answer_choice(graph: Graph, node: onnx.NodeProto) -> bool:
    shape = graph.producer(node.input[0])
    if shape is None or operator(shape) != "Shape" or graph.rank(shape.input[0]) is None:
        return False
    numbers = [graph.constants.get(name) for name in node.input[1:] if name]
    sizes = graph.shape(shape.input[0])[attribute(shape, "start", 0) : attribute(shape, "end")]
    # Open sizes are -1 here.
    known = np.array([size if isinstance(size, int) else -1 for size in sizes], np.int64)
    chosen = (
        None
        if any(one is None for one in numbers)
        else _choose(node, known, [one for one in numbers if one is not None])
    )
    if chosen is None or (chosen < 0).any():
        return False
    graph.replace_by_constants(node, [chosen])
    return True


def _choose(node: onnx.NodeProto, sizes: Array, numbers: Sequence[Array]) -> Array | None:
    if operator(node) == "Gather":
        places = numbers[0].astype(np.int64)
        is_inside = (places >= -len(sizes)).all() and (places < len(sizes)).all()
        return np.asarray(sizes[places]) if is_inside else None
    start, end = (int(one.item()) for one in numbers[:2])
    step = int(numbers[3].item()) if len(numbers) > 3 else 1
    return np.asarray(sizes[start:end:step]) if step > 0 else None


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
    "Gather": _answer_choice,
    "Slice": _answer_choice,
    "CastLike": _answer_type,
}
