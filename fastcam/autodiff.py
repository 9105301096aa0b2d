"""The reverse pass: gradients of chosen logits, as nodes of the same ONNX graph.

The engine knows no op. It finds the nodes between the value and the logits, walks them backwards through the table
`vjps.VJPS`, adds up what comes from several readers, and sums over axes that were broadcast. Gradients carry a leading
axis K, the targets (see `vjps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def backpropagate(graph: Graph, gradients: Mapping[str, str], value: str) -> str:
    r"""Append the nodes of the reverse pass.

    Parameters
    ----------
    graph : Graph
        Types inferred; nodes are appended.
    gradients : mapping of str to str
        Known gradients (K, \*shape) by value.
    value : str
        The value whose gradient is wanted.

    Returns
    -------
    str
        The gradient of ``value``, shape (K, \*its shape).

    Raises
    ------
    UnsupportedOpError
        When an op between has no rule, or the values do not depend on ``value``.
    """
    if value in gradients:
        return gradients[value]
    path = _path(graph, value, gradients)
    on_path = {value} | {output for node in path for output in node.output}
    collected: dict[str, list[str]] = {name: [gradient] for name, gradient in gradients.items()}
    for node in reversed(path):
        incoming = [collected.pop(output, []) for output in node.output]
        if not any(incoming):
            continue
        step = Step(graph, node, tuple(_add_up(graph, parts) if parts else None for parts in incoming))
        for index, name in enumerate(node.input):
            if name in on_path:
                collected.setdefault(name, []).append(_input_gradient(step, index, value))
    if value not in collected:
        raise _independent(gradients, value)
    return _add_up(graph, collected[value])


def _path(graph: Graph, value: str, gradients: Mapping[str, str]) -> list[onnx.NodeProto]:
    """Return the nodes that the wanted gradient runs through, in forward order."""
    needed = {id(node) for node in needed_nodes(graph, gradients)}
    path = [
        node
        for node in dependents(graph, value)
        if id(node) in needed and any(_varies(graph, node, output) for output in node.output)
    ]
    if not path:
        raise _independent(gradients, value)
    return path


def _varies(graph: Graph, node: onnx.NodeProto, value: str) -> bool:
    """Tell whether a value can have a gradient: integers and truth values (shapes, indices, masks) change in jumps.

    Quantised numbers stand for real ones.
    """
    known = graph.types.get(value)
    return known is None or known.dtype.kind not in "iub" or operator(node) == "QuantizeLinear"


def _independent(gradients: Mapping[str, str], value: str) -> UnsupportedOpError:
    return UnsupportedOpError(f"{', '.join(gradients)} do not depend on value {value!r}: it has no gradient")


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


def _add_up(graph: Graph, gradients: list[str]) -> str:
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


def pooled_gradient(graph: Graph, gradients: Mapping[str, str], value: str) -> str:
    """Append the nodes that give the mean over the map of the gradient of ``value``.

    Grad-CAM needs no more than alpha (Selvaraju et al. 2017, eq. 1). The sum over the map is pushed forward through
    the first ops of the head as long as that is exact (`vjps.PUSHES`), and folded into the weights of a dense layer
    that reads the flattened map: for VGG16 a 512x4096 product then replaces a 25088x4096 one.

    Parameters
    ----------
    graph, gradients
        As in `backpropagate`.
    value : str
        A value (N,C,h,w).

    Returns
    -------
    str
        (K,N,C).
    """
    pixels = math.prod(static_dims(graph, value, (2, 3)))
    reached, layout = _push_sum(graph, value, gradients)
    dense = _flattened_reader(graph, reached, gradients)
    if dense is not None:
        return _through_folded_weights(graph, gradients, reached, layout, dense, pixels)
    gradient = backpropagate(graph, gradients, reached)
    spatial = [1 + layout.index(axis) for axis in "HW" if axis in layout]
    if spatial and _map_size(graph, reached, layout) != 1:
        axes = graph.emit_constant(np.array(spatial, np.int64))
        gradient = graph.emit("ReduceSum", gradient, axes, keepdims=0, stem="gradient/pooled_sum")
    elif spatial:
        axes = graph.emit_constant(np.array(spatial, np.int64))
        gradient = graph.emit("Squeeze", gradient, axes, stem="gradient/pooled_sum")
    scale = graph.emit_constant(np.asarray(1 / pixels, graph.type(value).dtype))
    return graph.emit("Mul", gradient, scale, stem="gradient/pooled")


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
    graph: Graph, gradients: Mapping[str, str], value: str, layout: Layout, dense: onnx.NodeProto, pixels: int
) -> str:
    """Return G S with S[u,k] = mean over the map of the dense layer's weights that read channel k."""
    weight = graph.constants[dense.input[1]]
    by_row = weight if not attribute(dense, "transB", 0) else weight.T
    sizes = static_dims(graph, value, range(1, len(layout)))
    spatial = tuple(layout.index(axis) - 1 for axis in "HW")
    folded = by_row.reshape(*sizes, -1).sum(axis=spatial, dtype=np.float64) / pixels
    gradient = backpropagate(graph, gradients, dense.output[0])
    matrix = graph.emit_constant(np.ascontiguousarray(folded.T.astype(weight.dtype)), stem="gradient/folded_weights")
    return graph.emit("MatMul", gradient, matrix, stem="gradient/pooled")
