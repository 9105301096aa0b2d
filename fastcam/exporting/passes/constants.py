"""Fold what does not depend on the image: constants, shape arithmetic, targets of Reshape and Resize."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper

from ...errors import ModelError
from ...graph import Array, Dim, Graph, attribute, operator

# Elements: 2 GB of float32. A file of a kilobyte can ask for any amount.
_LARGEST_CONSTANT = 2**29


def fold_constants(graph: Graph) -> None:
    """Evaluate the nodes that depend on constants alone.

    Raises
    ------
    ModelError
        When such a node cannot be evaluated, or its result would be larger than any network's weights.
    """
    remaining = []
    for node in graph.nodes:
        results = _evaluate(node, graph) if _is_pure(node) and _reads_constants(node, graph) else None
        if results is None:
            remaining.append(node)
        else:
            graph.constants.update({name: array for name, array in zip(node.output, results, strict=True) if name})
    graph.nodes = remaining


def answer_shape_questions(graph: Graph) -> bool:
    """Replace Shape and Size by constants, and CastLike by Cast, where shapes and types are known; tell if any was."""
    answered = []
    for node in graph.nodes:
        answer = _ANSWERS.get(operator(node))
        # Of a constant, evaluation tells.
        if answer and graph.rank(node.input[0]) is not None and answer(graph, node):
            answered.append(node)
    gone = {id(node) for node in answered if node.output[0] in graph.constants}
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    return bool(answered)


def _answer_shape(graph: Graph, node: onnx.NodeProto) -> bool:
    sizes = graph.shape(node.input[0])[attribute(node, "start", 0) : attribute(node, "end")]
    known = all(isinstance(size, int) for size in sizes)
    if known:
        graph.constants[node.output[0]] = np.array(sizes, np.int64)
    return known


def _answer_size(graph: Graph, node: onnx.NodeProto) -> bool:
    sizes = [size for size in graph.shape(node.input[0]) if isinstance(size, int)]
    known = len(sizes) == len(graph.shape(node.input[0]))
    if known:
        graph.constants[node.output[0]] = np.array(math.prod(sizes), np.int64)
    return known


def _answer_type(graph: Graph, node: onnx.NodeProto) -> bool:
    if graph.rank(node.input[1]) is None:
        return False
    kind = helper.np_dtype_to_tensor_dtype(graph.type(node.input[1]).dtype)
    node.CopyFrom(helper.make_node("Cast", node.input[:1], node.output, name=node.name, to=kind))
    return True


_ANSWERS: dict[str, Callable[[Graph, onnx.NodeProto], bool]] = {
    "Shape": _answer_shape,
    "Size": _answer_size,
    "CastLike": _answer_type,
}


def settle_reshapes(graph: Graph) -> bool:
    """Give every Reshape a constant target that keeps the batch open, wherever at most one dimension is open.

    Tells whether any got one that was computed before.
    """
    settled = False
    producers = graph.producers()
    for node in graph.nodes:
        if operator(node) != "Reshape" or graph.rank(node.input[0]) is None or graph.rank(node.output[0]) is None:
            continue
        target = _reshape_target(graph.shape(node.input[0]), graph.shape(node.output[0]))
        target = _target_behind_batch(graph, node, producers) if target is None else target
        if target is not None:
            settled |= node.input[1] not in graph.constants
            node.input[1] = graph.emit_constant(target, stem="shape")
            # It would turn the 0 that keeps the batch into a size of 0.
            del node.attribute[:]
    return settled


def settle_resizes(graph: Graph) -> bool:
    """Give every Resize that has a size for every axis constant ones for those that change; tell if any got them.

    An open axis is the batch, which no image network resizes.
    """
    settled = False
    for node in graph.nodes:
        if operator(node) != "Resize" or len(node.input) < 4 or attribute(node, "axes"):
            continue
        before, after = (graph.shape(name) if graph.rank(name) else () for name in (node.input[0], node.output[0]))
        axes = [axis for axis, size in enumerate(before) if isinstance(size, int)]
        if not axes or not all(isinstance(after[axis], int) for axis in axes):
            continue
        sizes = {axis: after[axis] for axis in axes if after[axis] != before[axis]} or {axes[-1]: after[axes[-1]]}
        node.input[3] = graph.emit_constant(np.array(list(sizes.values()), np.int64), stem="sizes")
        node.attribute.append(helper.make_attribute("axes", list(sizes)))
        settled = True
    return settled


def _reshape_target(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> Array | None:
    """Return a constant target of Reshape: 0 keeps the batch where all else stays in the row, -1 is the open rest."""
    rows = [_row_size(shape) for shape in (before, after)]
    if rows[0] is not None and rows[0] == rows[1]:
        return np.array([0, *after[1:]], np.int64)
    if sum(not isinstance(size, int) for size in after) <= 1:
        return np.array([size if isinstance(size, int) else -1 for size in after], np.int64)
    return None


def _target_behind_batch(graph: Graph, node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> Array | None:
    """Return a constant target for Concat(batch, constants), one of which may be -1: as `x.view(len(x), 8, -1)` is."""
    before = graph.shape(node.input[0])
    row, joined = _row_size(before), producers.get(node.input[1])
    if row is None or joined is None or operator(joined) != "Concat":
        return None
    constants = [graph.constants.get(name) for name in joined.input[1:]]
    if any(array is None for array in constants) or not _is_length(graph, producers, joined.input[0], before[0]):
        return None
    sizes = [int(size) for array in constants for size in np.asarray(array).reshape(-1)]
    known = math.prod(size for size in sizes if size > 0)
    if known and sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = row // known
    return np.array([0, *sizes], np.int64) if min(sizes, default=0) > 0 and math.prod(sizes) == row else None


def _is_length(graph: Graph, producers: Mapping[str, onnx.NodeProto], value: str, size: Dim) -> bool:
    """Tell whether a value is the first size of a shape, and that size the open one given."""
    node = producers.get(value)
    while node is not None and operator(node) in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        node = producers.get(node.input[0])
    is_first = node is not None and attribute(node, "end") == 1
    if node is not None and operator(node) == "Gather":
        index = graph.constants.get(node.input[1])
        is_first = index is not None and index.size == 1 and index.item() == 0
        node = producers.get(node.input[0])
    if node is None or not is_first or operator(node) != "Shape" or attribute(node, "start", 0) != 0:
        return False
    return isinstance(size, str) and bool(graph.rank(node.input[0])) and graph.shape(node.input[0])[0] == size


def _row_size(shape: tuple[Dim, ...]) -> int | None:
    """Return the number of elements behind the first axis; None where that is open, or there is no axis."""
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    return math.prod(sizes) if shape and len(sizes) == len(shape) - 1 else None


def _reads_constants(node: onnx.NodeProto, graph: Graph) -> bool:
    return all(name in graph.constants for name in node.input if name)


def _evaluate(node: onnx.NodeProto, graph: Graph) -> list[Array] | None:
    """Return a node's outputs; None where they are no arrays."""
    # The reference implementation reads a 100 ms table of ops on import: only models with something to fold pay it.
    from onnx.reference import ReferenceEvaluator

    inputs = {name: graph.constants[name] for name in node.input if name}
    for name in node.output:
        sizes = [size for size in graph.shape(name) if isinstance(size, int)] if graph.rank(name) else []
        count = (
            _range_length(*(graph.constants[name] for name in node.input))
            if operator(node) == "Range"
            else math.prod(sizes)
        )
        if count > _LARGEST_CONSTANT:
            raise ModelError(f"node {node.name!r} ({node.op_type}) makes a constant of {count} elements")
    try:
        results = list(ReferenceEvaluator(node, opsets={"": graph.opset}).run(None, inputs))
        if not all(isinstance(result, np.ndarray | np.generic) for result in results):
            return None
        return [np.asarray(result, order="C") for result in results]
    except Exception as error:  # whatever NumPy makes of the node's arguments
        raise ModelError(f"node {node.name!r} ({node.op_type}) cannot be evaluated: {error}") from error


def _range_length(start: Array, limit: Array, step: Array) -> int:
    return math.ceil((limit.item() - start.item()) / step.item()) if step.item() else 0


def _is_pure(node: onnx.NodeProto) -> bool:
    """A node of ONNX's own that gives the same output each time, and one that is worth keeping as numbers.

    Weights that are stored as integers stay that: runtimes compute with them, and they take a quarter of the room.
    """
    kept = ("Random", "Bernoulli", "Multinomial", "DequantizeLinear")
    return "::" not in operator(node) and not operator(node).startswith(kept)
