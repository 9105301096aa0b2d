"""The reverse pass: gradients of chosen logits, as nodes of the same ONNX graph.

The engine knows no op. It finds the nodes between the value and the logits, walks them backwards through the table
`vjps.VJPS`, adds up what comes from several readers, and sums over axes that were broadcast. Gradients carry a leading
axis K, the targets (see `vjps`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
import onnx

from .errors import UnsupportedOpError
from .graph import Dim, Graph, attribute, dependents, needed_nodes, operator, static_dims
from .vjps import PUSHES, VJPS, Layout, Step


def target_gradients(graph: Graph, logits: str, target: str) -> tuple[str, str]:
    """Return the gradient of the target logits in the value that the last dense layer reads.

    Parameters
    ----------
    graph : Graph
        Nodes are appended.
    logits : str
        Value (N,classes).
    target : str
        Value (K,N) int64: the class of every map.

    Returns
    -------
    value : str
        The dense layer's input, (N,U); the logits themselves where no dense layer with constant weights makes them.
    gradient : str
        (K,N,U). For a dense layer it is the target's column of the weights: K*N*U numbers are read where a product with
        one-hot rows would read the whole matrix.
    """
    dense = _dense_layer(graph, logits)
    if dense is None:
        return logits, _one_hot(graph, logits, target)
    weight = dense.input[1]
    if attribute(dense, "transB", 0):
        return dense.input[0], graph.emit("Gather", weight, target, axis=0, stem="gradient/target")
    columns = graph.emit("Gather", weight, target, axis=1, stem="gradient/target_columns")
    return dense.input[0], graph.emit("Transpose", columns, perm=[1, 2, 0], stem="gradient/target")


def _dense_layer(graph: Graph, logits: str) -> onnx.NodeProto | None:
    node = graph.producer(logits)
    if node is None or operator(node) not in ("Gemm", "MatMul") or graph.rank(node.input[0]) != 2:
        return None
    scaled = attribute(node, "alpha", 1.0) != 1 or attribute(node, "transA", 0)
    computed = [name for name in node.input[1:] if name and name not in graph.constants]
    return node if graph.rank(node.input[1]) == 2 and not computed and not scaled else None


def _one_hot(graph: Graph, logits: str, target: str) -> str:
    (classes,) = static_dims(graph, logits, [1])
    index = graph.emit("Unsqueeze", target, graph.emit_constant(np.array([-1], np.int64)), stem="gradient/target_index")
    chosen = graph.emit("Equal", index, graph.emit_constant(np.arange(classes, dtype=np.int64)))
    kind = onnx.helper.np_dtype_to_tensor_dtype(graph.type(logits).dtype)
    return graph.emit("Cast", chosen, to=kind, stem="gradient/target")


def backpropagate(graph: Graph, gradients: Mapping[str, str], values: Sequence[str]) -> list[str]:
    r"""Append the nodes of the reverse pass, one for all values.

    Parameters
    ----------
    graph : Graph
        Types inferred; nodes are appended.
    gradients : mapping of str to str
        Known gradients (K, \*shape) by value.
    values : sequence of str
        The values whose gradients are wanted.

    Returns
    -------
    list of str
        The gradient of each, shape (K, \*its shape).

    Raises
    ------
    UnsupportedOpError
        When an op between has no rule, or nothing depends on a value.
    """
    found = dict(gradients)
    path = _path(graph, [value for value in values if value not in found], gradients)
    on_path = {output for node, _ in path for output in node.output}.union(values)
    collected: dict[str, list[str]] = {name: [gradient] for name, gradient in gradients.items()}
    for node, value in reversed(path):
        totals = [_add_up(graph, collected.pop(output, [])) for output in node.output]
        # All that reads an output has been passed: its gradient is complete.
        found.update((output, total) for output, total in zip(node.output, totals, strict=True) if total)
        if not any(totals):
            continue
        step = Step(graph, node, tuple(totals))
        for index, name in enumerate(node.input):
            if name in on_path:
                collected.setdefault(name, []).append(_input_gradient(step, index, value))
    for value in values:
        if value not in found:
            found[value] = _add_up(graph, collected.get(value, [])) or _refuse_independent(gradients, value)
    return [found[value] for value in values]


def _path(graph: Graph, values: Sequence[str], gradients: Mapping[str, str]) -> list[tuple[onnx.NodeProto, str]]:
    """Return the nodes that the wanted gradients run through, in forward order, each with a value that needs it."""
    needed = {id(node) for node in needed_nodes(graph, gradients)}
    reason: dict[int, str] = {}
    for value in values:
        path = [
            node
            for node in dependents(graph, value)
            if id(node) in needed and any(_varies(graph, node, output) for output in node.output)
        ]
        if not path:
            _refuse_independent(gradients, value)
        reason.update((id(node), value) for node in path)
    return [(node, reason[id(node)]) for node in graph.nodes if id(node) in reason]


def _varies(graph: Graph, node: onnx.NodeProto, value: str) -> bool:
    """Tell whether a value can have a gradient: integers and truth values (shapes, indices, masks) change in jumps.

    Quantised numbers stand for real ones.
    """
    known = graph.types.get(value)
    return known is None or known.dtype.kind not in "iub" or operator(node) == "QuantizeLinear"


def _refuse_independent(gradients: Mapping[str, str], value: str) -> NoReturn:
    raise UnsupportedOpError(f"{', '.join(gradients)} do not depend on value {value!r}: it has no gradient")


def _input_gradient(step: Step, index: int, value: str) -> str:
    node = step.node
    vjp = VJPS.get(operator(node))
    if vjp is None:
        raise UnsupportedOpError(_message(node, "there is no gradient rule for it", value))
    rule = vjp.rule(index)
    if rule is None:
        raise UnsupportedOpError(_message(node, f"there is no gradient rule for its input {index}", value))
    gradient = rule(step)
    if not vjp.broadcasts:
        return gradient
    return _sum_broadcast_axes(step, gradient, node.input[index], vjp.core_axes)


def _message(node: onnx.NodeProto, reason: str, value: str) -> str:
    return (
        f"op {node.op_type!r} (node {node.name or node.output[0]!r}, between value {value!r} and the logits): "
        f"{reason}. Explain a later layer, or register a rule with fastcam.defvjp."
    )


def _add_up(graph: Graph, gradients: Sequence[str]) -> str | None:
    if not gradients:
        return None
    total = gradients[0]
    for gradient in gradients[1:]:
        total = graph.emit("Add", total, gradient, stem="gradient/sum")
    return total


def _sum_broadcast_axes(step: Step, gradient: str, name: str, core_axes: int) -> str:
    """Sum a gradient of the output's shape down to the shape of input ``name``, the leading K kept."""
    before, after = step.shape(name), step.shape(step.y)
    outer = len(before) - core_axes
    missing = len(after) - len(before)
    stretched = [axis - len(before) for axis in range(outer) if before[axis] == 1 and after[missing + axis] != 1]
    if stretched:
        gradient = step.emit("ReduceSum", gradient, step.integers(*stretched), keepdims=1)
    if missing:
        gradient = step.emit("ReduceSum", gradient, step.integers(*range(1, 1 + missing)), keepdims=0)
    return gradient


@dataclass(frozen=True)
class Pooling:
    """How the mean over the map of a value's gradient comes about.

    Attributes
    ----------
    source : str
        The value whose gradient is needed for it.
    finish : callable
        From the gradient of ``source`` to the mean, (K,N,C); appends nodes.
    """

    source: str
    finish: Callable[[str], str]


def plan_pooling(graph: Graph, gradients: Mapping[str, str], value: str) -> Pooling:
    """Find the shortest way to the mean over the map of the gradient of ``value``.

    Grad-CAM needs no more than alpha (Selvaraju et al. 2017, eq. 1). The sum over the map is pushed forward through
    the first ops of the head as long as that is exact (`vjps.PUSHES`), and folded into the weights of a dense layer
    that reads the flattened map: for VGG16 a 512x4096 product then replaces a 25088x4096 one.

    Parameters
    ----------
    graph, gradients
        As in `backpropagate`.
    value : str
        A value (N,C,h,w).
    """
    pixels = math.prod(static_dims(graph, value, (2, 3)))
    reached, layout = _push_sum(graph, value, gradients)
    dense = _flattened_reader(graph, reached, gradients)
    if dense is not None:
        return Pooling(dense.output[0], partial(_through_folded_weights, graph, reached, layout, dense, pixels))
    dtype = graph.type(value).dtype
    return Pooling(reached, partial(_mean_over_map, graph, reached, layout, pixels, dtype))


def pooled_gradients(
    graph: Graph, gradients: Mapping[str, str], values: Sequence[str], full: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Append the nodes that give the mean over the map of the gradients of ``values``, in one reverse pass.

    Parameters
    ----------
    graph, gradients
        As in `backpropagate`.
    values : sequence of str
        Values (N,C,h,w).
    full : sequence of str, optional
        Values whose whole gradients are wanted too.

    Returns
    -------
    pooled : list of str
        (K,N,C) for each of ``values``.
    whole : list of str
        (K,N,C,h,w) for each of ``full``.
    """
    plans = [plan_pooling(graph, gradients, value) for value in values]
    found = backpropagate(graph, gradients, [*(plan.source for plan in plans), *full])
    pooled = [plan.finish(gradient) for plan, gradient in zip(plans, found, strict=False)]
    return pooled, found[len(plans) :]


def _mean_over_map(graph: Graph, value: str, layout: Layout, pixels: int, dtype: np.dtype[Any], gradient: str) -> str:
    """Return the sum over what is left of the map, divided by the pixels that there were."""
    spatial = [1 + layout.index(axis) for axis in "HW" if axis in layout]
    if spatial:
        op = "Squeeze" if _map_size(graph, value, layout) == 1 else "ReduceSum"
        attributes = {} if op == "Squeeze" else {"keepdims": 0}
        axes = graph.emit_constant(np.array(spatial, np.int64))
        gradient = graph.emit(op, gradient, axes, stem="gradient/pooled_sum", **attributes)
    return graph.emit("Mul", gradient, graph.emit_constant(np.asarray(1 / pixels, dtype)), stem="gradient/pooled")


def _push_sum(graph: Graph, value: str, gradients: Mapping[str, str]) -> tuple[str, Layout]:
    """Return the last value whose gradient has the same sum over the map as that of ``value``, and its axes."""
    layout: Layout = "NCHW"
    consumers = graph.consumers()
    while value not in gradients and len(consumers.get(value, [])) == 1:
        node = consumers[value][0]
        push = PUSHES.get(operator(node))
        pushed = push(graph, node, layout) if push else None
        # Rows have to stay images for the sums to be theirs.
        if pushed is None or not pushed.startswith("N"):
            break
        value, layout = node.output[0], pushed
    return value, layout


def _map_size(graph: Graph, value: str, layout: Layout) -> int:
    return math.prod(static_dims(graph, value, [layout.index("H"), layout.index("W")]))


def _flattened_reader(graph: Graph, value: str, gradients: Mapping[str, str]) -> onnx.NodeProto | None:
    """Return the dense layer that alone reads ``value`` flattened to one row an image, if that is what follows."""
    consumers = graph.consumers()
    flatten = _only_reader(consumers, value, gradients)
    if flatten is None or operator(flatten) not in ("Flatten", "Reshape") or not _flattens(graph, flatten):
        return None
    dense = _only_reader(consumers, flatten.output[0], gradients)
    if dense is None or _dense_layer(graph, dense.output[0]) is None or dense.input[0] != flatten.output[0]:
        return None
    return dense


def _only_reader(
    consumers: Mapping[str, list[onnx.NodeProto]], value: str, gradients: Mapping[str, str]
) -> onnx.NodeProto | None:
    readers = consumers.get(value, [])
    return readers[0] if len(readers) == 1 and value not in gradients else None


def _flattens(graph: Graph, node: onnx.NodeProto) -> bool:
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return len(after) == 2 and _row_size(before) is not None and _row_size(before) == _row_size(after)


def _row_size(shape: tuple[Dim, ...]) -> int | None:
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(shape) - 1 else None


def _through_folded_weights(
    graph: Graph, value: str, layout: Layout, dense: onnx.NodeProto, pixels: int, gradient: str
) -> str:
    """Return G S with S[u,k] = mean over the map of the dense layer's weights that read channel k."""
    weight = graph.constants[dense.input[1]]
    by_row = weight if not attribute(dense, "transB", 0) else weight.T
    sizes = static_dims(graph, value, range(1, len(layout)))
    spatial = tuple(layout.index(axis) - 1 for axis in "HW")
    folded = by_row.reshape(*sizes, -1).sum(axis=spatial, dtype=np.float64) / pixels
    matrix = graph.emit_constant(np.ascontiguousarray(folded.T.astype(weight.dtype)), stem="gradient/folded_weights")
    return graph.emit("MatMul", gradient, matrix, stem="gradient/pooled")
