"""The reverse pass: gradients of chosen logits, as nodes of the same ONNX graph.

The engine knows no particular op. It finds the nodes between the value and the logits, walks them backwards with the
rules of `table.VJPS`, adds up the gradients from several readers, and sums over axes that were broadcast. Gradients
have a leading axis K, the targets (see `table`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
import onnx

from ...errors import UnsupportedOpError
from ...graph import Graph, attribute, dependents, needed_nodes, operator, static_dims
from .table import VJPS, Step, Vjp


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
        The dense layer's input, (N,U); the logits themselves where no dense layer with constant weights computes them.
    gradient : str
        (K,N,U). For a dense layer it is the target's weights: K*N*U numbers are read; a product with one-hot rows
        would read the whole matrix. Where it costs nothing, weights (U,classes) become (classes,U): a class is one row.
    """
    dense = dense_layer(graph, logits)
    if dense is None:
        return logits, _one_hot(graph, logits, target)
    _store_by_class(graph, dense)
    weight = dense.input[1]
    if attribute(dense, "transB", 0):
        return dense.input[0], graph.emit("Gather", weight, target, axis=0, stem="gradient/target")
    columns = graph.emit("Gather", weight, target, axis=1, stem="gradient/target_columns")
    return dense.input[0], graph.emit("Transpose", columns, perm=[1, 2, 0], stem="gradient/target")


def _store_by_class(graph: Graph, dense: onnx.NodeProto) -> None:
    """Transpose the weights, unless they are shared, or read behind a ReLU: Explainer skips their rows of zeros."""
    weight = dense.input[1]
    before = graph.producer(dense.input[0])
    if (
        operator(dense) != "Gemm"
        or attribute(dense, "transB", 0)
        or (before is not None and operator(before) == "Relu")
    ):
        return
    if graph.readers(weight) == [dense]:
        rows = graph.emit_constant(np.ascontiguousarray(graph.constants.pop(weight).T), stem=weight)
        graph.replace_uses(weight, rows)
        graph.set_attributes(dense, transB=1)


def dense_layer(graph: Graph, logits: str) -> onnx.NodeProto | None:
    """Return the dense layer with constant weights that computes the logits, or None."""
    node = graph.producer(logits)
    if node is None or operator(node) not in ("Gemm", "MatMul") or graph.rank(node.input[0]) != 2:
        return None
    scaled = attribute(node, "alpha", 1.0) != 1 or attribute(node, "transA", 0)
    computed = [name for name in node.input[1:] if name and name not in graph.constants]
    return node if graph.rank(node.input[1]) == 2 and not computed and not scaled else None


def _one_hot(graph: Graph, logits: str, target: str) -> str:
    (classes,) = static_dims(graph, logits, [1])
    index = graph.emit("Unsqueeze", target, graph.emit_integers(-1), stem="gradient/target_index")
    chosen = graph.emit("Equal", index, graph.emit_constant(np.arange(classes, dtype=np.int64)))
    kind = onnx.helper.np_dtype_to_tensor_dtype(graph.type(logits).dtype)
    return graph.emit("Cast", chosen, to=kind, stem="gradient/target")


def backpropagate(
    graph: Graph,
    gradients: Mapping[str, str],
    values: Sequence[str],
    *,
    independent: bool = False,
    rules: Mapping[str, Vjp] = VJPS,
) -> list[str]:
    r"""Append the nodes of the reverse pass, one for all values.

    Parameters
    ----------
    graph : Graph
        Types inferred; nodes are appended.
    gradients : mapping of str to str
        Known gradients (K, \*shape) by value.
    values : sequence of str
        The values whose gradients are wanted.
    independent : bool
        Whether the values count as independent of each other: partial derivatives, without what reaches a value
        through another one.
    rules : mapping of str to Vjp
        The rules by op.

    Returns
    -------
    list of str
        The gradient of each, shape (K, \*its shape).

    Raises
    ------
    UnsupportedOpError
        When an op on the way has no rule, or the logits do not depend on a value.
    """
    found = dict(gradients)
    path = _path(graph, [value for value in values if value not in found], gradients, independent=independent)
    on_path = {output for node, _ in path for output in node.output}.union(values)
    collected: dict[str, list[str]] = {name: [gradient] for name, gradient in gradients.items()}
    for node, value in reversed(path):
        totals = [_add_up(graph, collected.pop(output, [])) for output in node.output]
        # All readers of an output have been visited: its gradient is complete.
        found.update((output, total) for output, total in zip(node.output, totals, strict=True) if total)
        if not any(totals):
            continue
        step = Step(graph, node, tuple(totals))
        for index, name in enumerate(node.input):
            if name in on_path:
                collected.setdefault(name, []).append(_input_gradient(step, index, value, rules))
    for value in values:
        if value not in found:
            found[value] = _add_up(graph, collected.get(value, [])) or _refuse_independent(gradients, value)
    return [found[value] for value in values]


def depends_on(graph: Graph, output: str, value: str) -> bool:
    """Return whether an output has a gradient in a value, other than 0 for the way it is computed."""
    needed = {id(node) for node in needed_nodes(graph, [output])}
    reached = {value}
    for node in graph.nodes:
        if id(node) in needed and reached.intersection(node.input):
            reached.update(name for name in node.output if _varies(graph, node, name))
    return output in reached


def _path(
    graph: Graph, values: Sequence[str], gradients: Mapping[str, str], *, independent: bool
) -> list[tuple[onnx.NodeProto, str]]:
    """Return the nodes that the wanted gradients run through, in forward order, each with a value that needs it."""
    needed = {id(node) for node in needed_nodes(graph, gradients)}
    if independent:
        needed -= {id(node) for node in needed_nodes(graph, values)}
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
    """Return whether a value can have a gradient: integers and truth values (shapes, indices, masks) change in jumps.

    Quantised numbers count as real ones.
    """
    known = graph.types.get(value)
    return known is None or known.dtype.kind not in "iub" or operator(node) == "QuantizeLinear"


def _refuse_independent(gradients: Mapping[str, str], value: str) -> NoReturn:
    raise UnsupportedOpError(f"{', '.join(gradients)} do not depend on value {value!r}: it has no gradient")


def _input_gradient(step: Step, index: int, value: str, rules: Mapping[str, Vjp]) -> str:
    node = step.node
    vjp = rules.get(operator(node))
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
    """Sum a gradient of the output's shape down to the shape of input ``name``, keeping the leading K."""
    before, after = step.shape(name), step.shape(step.y)
    outer = len(before) - core_axes
    missing = len(after) - len(before)
    stretched = [axis - len(before) for axis in range(outer) if before[axis] == 1 and after[missing + axis] != 1]
    if stretched:
        gradient = step.emit("ReduceSum", gradient, step.integers(*stretched), keepdims=1)
    if missing:
        gradient = step.emit("ReduceSum", gradient, step.integers(*range(1, 1 + missing)), keepdims=0)
    return gradient
