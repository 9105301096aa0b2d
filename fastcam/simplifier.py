"""Rewrites that leave a model's function alone and its graph clean.

In this order:

1. Fold every node whose inputs are all constants, and every question about a shape whose answer is known.
2. Give Reshape and Resize a constant target where the shape is known, which frees the shape arithmetic behind it.
3. Drop nodes that do nothing at inference: Identity, Dropout, a Cast to the same type, a Transpose to the same order.
4. Join what frameworks write in single steps: LayerNormalization, products over tokens (`fusions`).
5. Sink every Transpose below the ops that work in any order of axes, until two meet that undo each other.
6. Fold the zeros that a Pad puts before a Conv into its pads.
7. Fold what follows a Conv and is affine per channel (BatchNormalization, Mul, Add) into its kernel and bias.
8. Turn what is left of Mul + Add per channel into one BatchNormalization.
9. Turn MatMul + bias into Gemm.
10. Prune.

Each pass returns nothing and may be run again; a value in ``keep`` survives under its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper

from .errors import ModelError
from .fusions import join_layer_normalizations, join_rows_of_tokens, join_sequences
from .graph import Array, Dim, Graph, attribute, operator

# For the output of every Transpose, what it reads and its permutation.
Orders: TypeAlias = "dict[str, tuple[str, tuple[int, ...]]]"

# Elements: 2 GB of float32. A file of a kilobyte can ask for any amount.
_LARGEST_CONSTANT = 2**29


def simplify(graph: Graph, keep: Collection[str] = ()) -> None:
    """Clean ``graph`` in place.

    Parameters
    ----------
    graph : Graph
    keep : collection of str
        Values that must still be computed, under the same name (a layer that the user asked for).
    """
    outputs = graph.outputs
    graph.outputs = list(dict.fromkeys([*outputs, *keep]))
    fold_constants(graph)
    graph.infer_types()
    # What one round settles tells the next one further shapes.
    while settle_reshapes(graph) | settle_resizes(graph) | answer_shape_questions(graph) | join_sequences(graph):
        fold_constants(graph)
        graph.infer_types()
    drop_no_ops(graph)
    join_layer_normalizations(graph)
    join_rows_of_tokens(graph)
    graph.prune()
    sink_transposes(graph, fixed=outputs)
    # What the sunken ones left behind would still count as readers.
    graph.prune()
    graph.infer_types()
    drop_no_ops(graph)
    fold_pads(graph)
    fold_into_convolutions(graph)
    join_scale_and_shift(graph)
    join_matmul_and_bias(graph)
    graph.outputs = outputs
    graph.prune()
    graph.infer_types()


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


def drop_no_ops(graph: Graph) -> None:
    """Take out the nodes that hand their first input on unchanged."""
    remaining = []
    for node in graph.nodes:
        if _hands_on(node, graph) and node.output[0] not in graph.outputs:
            graph.replace_uses(node.output[0], node.input[0])
        else:
            remaining.append(node)
    graph.nodes = remaining


def sink_transposes(graph: Graph, fixed: Collection[str] = ()) -> None:
    """Move Transpose below element-wise ops and reductions, and drop pairs that undo each other.

    TensorFlow's graphs have their channels last, ONNX's convolutions first: a Transpose stands on either side of every
    Conv, and what lies between two of them is done in the order of axes that the Conv has. A value keeps its name and
    takes the new order; the values named in ``fixed`` keep their order too.
    """
    orders: Orders = {}
    for node in list(graph.nodes):
        sink = _SINKS.get(operator(node))
        order = sink(graph, node, orders) if sink and node.output[0] not in fixed else None
        if order is not None:
            _restore_order(graph, node, order, orders)
        elif operator(node) == "Transpose":
            orders[node.output[0]] = (node.input[0], _permutation(graph, node))


def _restore_order(graph: Graph, node: onnx.NodeProto, order: tuple[int, ...], orders: Orders) -> None:
    """Let the readers of a node that now works in another order of axes read a Transpose of its output."""
    if order == tuple(range(len(order))):
        return
    value = node.output[0]
    transposed = graph.unused_name(f"{value}/transposed")
    for reader in graph.nodes:
        for index, name in enumerate(reader.input):
            if name == value:
                reader.input[index] = transposed
    restoring = helper.make_node("Transpose", [value], [transposed], name=transposed, perm=order)
    graph.nodes.insert(_position(graph, node) + 1, restoring)
    orders[transposed] = (value, order)


def _sink_elementwise(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    """Work on the untransposed inputs, where all are transposed alike or constant; return the order to restore."""
    known = {orders[name][1] for name in node.input if name in orders}
    if len(known) != 1:
        return None
    (order,) = known
    constants = [name for name in node.input if name and name not in orders]
    if any(name not in graph.constants or graph.constants[name].ndim > len(order) for name in constants):
        return None
    for index, name in enumerate(node.input):
        if name in orders:
            node.input[index] = orders[name][0]
        elif name and graph.constants[name].ndim:
            array = graph.constants[name]
            full = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
            node.input[index] = graph.emit_constant(np.ascontiguousarray(full.transpose(np.argsort(order))), stem=name)
    return order


def _sink_transpose(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    """Join two in a row: the second then reads what the first read."""
    if node.input[0] not in orders:
        return None
    source, first = orders[node.input[0]]
    joined = tuple(first[axis] for axis in attribute(node, "perm") or range(len(first))[::-1])
    node.input[0] = source
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("perm", joined))
    return None


def _sink_reduction(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if node.input[0] not in orders or axes is None or not axes.size:
        return None
    source, order = orders[node.input[0]]
    reduced = sorted(order[int(axis)] for axis in axes)
    node.input[0], node.input[1] = source, graph.emit_constant(np.array(reduced, np.int64), stem="axes")
    if attribute(node, "keepdims", 1):
        return order
    left = [axis for axis in range(len(order)) if axis not in reduced]
    return tuple(left.index(axis) for axis in order if axis in left)


def _sink_pad(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    pads = graph.constants.get(node.input[1])
    if node.input[0] not in orders or pads is None or (len(node.input) > 3 and node.input[3]):
        return None
    source, order = orders[node.input[0]]
    moved = pads.reshape(2, -1)[:, np.argsort(order)].reshape(-1)
    node.input[0], node.input[1] = source, graph.emit_constant(np.ascontiguousarray(moved), stem="pads")
    return order


def _sink_slice(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    axes = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    if node.input[0] not in orders or axes is None:
        return None
    source, order = orders[node.input[0]]
    moved = np.array([order[int(axis)] for axis in axes], np.int64)
    node.input[0], node.input[3] = source, graph.emit_constant(moved, stem="axes")
    return order


def _sink_concat(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    known = {orders[name][1] for name in node.input if name in orders}
    if len(known) != 1 or not all(name in orders for name in node.input):
        return None
    (order,) = known
    for index, name in enumerate(node.input):
        node.input[index] = orders[name][0]
    axis = attribute(node, "axis")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", order[axis]))
    return order


def _sink_reshape(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    if node.input[0] in orders:
        source, order = orders[node.input[0]]
        # Known in one of the two orders: which, does not matter to the number of axes.
        moves_ones = graph.rank(source) and sum(size != 1 for size in graph.shape(source)[1:]) <= 1
        target = graph.constants.get(node.input[1])
        if moves_ones and order[0] == 0 and target is not None and target[1:].all():
            node.input[0] = source
            return None
    return _sink_gate(graph, node, orders)


def _sink_gate(graph: Graph, node: onnx.NodeProto, orders: Orders) -> tuple[int, ...] | None:
    """(N,C) or (N,C,1,1) to (N,1,1,C), as in squeeze-and-excitation: make it (N,C,1,1), to be transposed."""
    if graph.rank(node.input[0]) not in (2, 4) or graph.rank(node.output[0]) != 4:
        return None
    _, channels, *rest = graph.shape(node.input[0])
    if not isinstance(channels, int) or graph.shape(node.output[0])[1:] != (1, 1, channels) or rest not in ([], [1, 1]):
        return None
    node.input[1] = graph.emit_constant(np.array([0, channels, 1, 1], np.int64), stem="shape")
    return (0, 2, 3, 1)


_ELEMENTWISE = """
    Abs Add Cast Ceil Clip Celu Div Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log Max Min Mish Mul
    Neg Pow Reciprocal Relu Selu Sigmoid Softplus Softsign Sqrt Sub Sum Tanh Where
""".split()

_SINKS: dict[str, Callable[[Graph, onnx.NodeProto, Orders], tuple[int, ...] | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _sink_elementwise),
    "Transpose": _sink_transpose,
    "ReduceMean": _sink_reduction,
    "ReduceSum": _sink_reduction,
    "ReduceMax": _sink_reduction,
    "Pad": _sink_pad,
    "Slice": _sink_slice,
    "Concat": _sink_concat,
    "Reshape": _sink_reshape,
}


def _permutation(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    given = attribute(node, "perm")
    return tuple(given) if given else tuple(range(len(graph.shape(node.input[0]))))[::-1]


def fold_into_convolutions(graph: Graph) -> None:
    """Fold per-channel affine ops that follow a Conv, and nothing else follows it, into the Conv's weights."""
    for node in list(graph.nodes):
        affine = _AFFINE.get(operator(node))
        # Each round may append constants and retire a node, so the view of the graph is taken anew.
        folded = affine and affine(graph, node)
        if folded:
            _absorb(graph, *folded, follower=node)


def fold_pads(graph: Graph) -> None:
    """Let every Conv that reads a picture padded with zeros pad it itself."""
    producers = graph.producers()
    for conv in graph.nodes:
        pad = producers.get(conv.input[0]) if operator(conv) == "Conv" else None
        pads = _zeros_around(graph, pad) if pad is not None and operator(pad) == "Pad" else None
        if pad is None or pads is None or attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        own = attribute(conv, "pads", [0] * len(pads))
        kept = [item for item in conv.attribute if item.name not in ("pads", "auto_pad")]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute("pads", [a + b for a, b in zip(own, pads, strict=True)])])
        conv.input[0] = pad.input[0]


def _zeros_around(graph: Graph, pad: onnx.NodeProto) -> list[int] | None:
    """Return the pads of the spatial axes as a Conv has them; None where anything else is padded, or not with zeros."""
    pads = graph.constants.get(pad.input[1])
    value = graph.constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    axes_given = len(pad.input) > 3 and pad.input[3]
    if attribute(pad, "mode", "constant") != "constant" or axes_given or pads is None or value is None or value.any():
        return None
    ends = pads.reshape(2, -1)
    return [int(size) for size in ends[:, 2:].reshape(-1)] if not ends[:, :2].any() and (ends >= 0).all() else None


def join_scale_and_shift(graph: Graph) -> None:
    """Turn Mul and Add of one number a channel, as a BatchNormalization before its block leaves them, into that again.

    Runtimes do it in one pass over the map, with the activation that follows.
    """
    producers, consumers = graph.producers(), graph.consumers()
    for add in [node for node in graph.nodes if operator(node) == "Add"]:
        scaled, _ = _value_and_constant(graph, add)
        mul = producers.get(scaled)
        if mul is None or operator(mul) != "Mul" or scaled in graph.outputs or len(consumers[scaled]) != 1:
            continue
        shift, scale = _addition(graph, add), _multiplication(graph, mul)
        if shift is None or scale is None or not _has_channels_first(scale[0], producers):
            continue
        # The variance and the epsilon that is added to it make 1.
        row = np.ones_like(scale[1].scale)
        parameters = [scale[1].scale, shift[1].shift, 0 * row, row - _EPSILON]
        dtype, stem = graph.type(scaled).dtype, f"{add.output[0]}/normalization"
        names = [graph.emit_constant(array.astype(dtype), stem=stem) for array in parameters]
        normalization = helper.make_node(
            "BatchNormalization", [scale[0], *names], list(add.output), name=add.name, epsilon=_EPSILON
        )
        graph.nodes[_position(graph, add)] = normalization
        del graph.nodes[_position(graph, mul)]
        producers[add.output[0]] = normalization


_EPSILON = 1e-5


def _has_channels_first(value: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Tell that ``value`` comes, past ops that leave the axes alone, from one whose map has its channels on axis 1."""
    node = producers.get(value)
    while node is not None and operator(node) in (*_ELEMENTWISE, "Concat", "Pad"):
        node = next((producers[name] for name in node.input if name in producers), None)
    return node is not None and operator(node) in ("Conv", "MaxPool", "AveragePool", "BatchNormalization")


def join_matmul_and_bias(graph: Graph) -> None:
    """Turn MatMul of a matrix and a constant matrix, followed by the addition of a constant row, into one Gemm."""
    producers, consumers = graph.producers(), graph.consumers()
    for add in [node for node in graph.nodes if operator(node) == "Add"]:
        value, bias = _value_and_constant(graph, add)
        matmul = producers.get(value)
        if matmul is None or operator(matmul) != "MatMul" or value in graph.outputs or len(consumers[value]) != 1:
            continue
        weight = graph.constants.get(matmul.input[1])
        row = graph.constants.get(bias)
        if weight is None or weight.ndim != 2 or graph.rank(matmul.input[0]) != 2:
            continue
        if row is not None and row.shape == (weight.shape[1],):
            gemm = helper.make_node("Gemm", [matmul.input[0], matmul.input[1], bias], [add.output[0]], name=add.name)
            graph.nodes[_position(graph, add)] = gemm
            del graph.nodes[_position(graph, matmul)]


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


def _hands_on(node: onnx.NodeProto, graph: Graph) -> bool:
    op = operator(node)
    if op == "Dropout":
        return len([name for name in node.output if name]) == 1 and not _trains(node, graph)
    if op == "Cast" and graph.rank(node.input[0]) is not None:
        return bool(helper.np_dtype_to_tensor_dtype(graph.type(node.input[0]).dtype) == attribute(node, "to"))
    if op == "Transpose" and attribute(node, "perm"):
        order = attribute(node, "perm")
        return bool(order == sorted(order))
    if op == "Reshape":
        return graph.rank(node.input[0]) is not None and _is_same_shape(graph, node)
    return op == "Identity"


def _is_same_shape(graph: Graph, node: onnx.NodeProto) -> bool:
    """Equal in every axis, the open ones by name."""
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return before == after and None not in before


def _trains(node: onnx.NodeProto, graph: Graph) -> bool:
    """A Dropout whose training_mode input is, or may be, true."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    mode = graph.constants.get(node.input[2])
    return mode is None or bool(mode.any())


@dataclasses.dataclass(frozen=True)
class _Affine:
    """y = scale * x + shift, one number per channel."""

    scale: Array
    shift: Array


def _batch_normalization(graph: Graph, node: onnx.NodeProto) -> tuple[str, _Affine] | None:
    parameters = [graph.constants.get(name) for name in node.input[1:5]]
    if attribute(node, "training_mode", 0) or any(item is None for item in parameters):
        return None
    gamma, beta, mean, variance = (np.asarray(item, np.float64) for item in parameters)
    if np.any(variance + attribute(node, "epsilon", 1e-5) <= 0):
        return None
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return node.input[0], _Affine(scale, beta - mean * scale)


def _multiplication(graph: Graph, node: onnx.NodeProto) -> tuple[str, _Affine] | None:
    value, constant = _value_and_constant(graph, node)
    scale = _per_channel(graph, value, constant)
    return None if scale is None else (value, _Affine(scale, np.zeros_like(scale)))


def _addition(graph: Graph, node: onnx.NodeProto) -> tuple[str, _Affine] | None:
    value, constant = _value_and_constant(graph, node)
    shift = _per_channel(graph, value, constant)
    return None if shift is None else (value, _Affine(np.ones_like(shift), shift))


_AFFINE: dict[str, Callable[[Graph, onnx.NodeProto], tuple[str, _Affine] | None]] = {
    "BatchNormalization": _batch_normalization,
    "Mul": _multiplication,
    "Add": _addition,
}


def _value_and_constant(graph: Graph, node: onnx.NodeProto) -> tuple[str, str]:
    """Return a commutative node's inputs, the constant one last."""
    left, right = node.input
    return (right, left) if left in graph.constants else (left, right)


def _per_channel(graph: Graph, value: str, constant: str) -> Array | None:
    """Return a constant as one float64 number per channel of the rank-4 ``value``; None where it is not that."""
    array = graph.constants.get(constant)
    if array is None or array.ndim > 4 or graph.rank(value) != 4:
        return None
    channels = graph.shape(value)[1]
    full = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if not isinstance(channels, int) or full.shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    return np.broadcast_to(full.astype(np.float64).reshape(-1), (channels,))


def _absorb(graph: Graph, value: str, affine: _Affine, *, follower: onnx.NodeProto) -> None:
    """Fold ``follower``, which applies ``affine`` to ``value``, into the Conv that makes ``value``, if one does."""
    conv = graph.producer(value)
    if conv is None or operator(conv) != "Conv" or value in graph.outputs or len(graph.consumers()[value]) != 1:
        return
    weights = [graph.constants.get(name) for name in conv.input[1:] if name]
    if any(item is None for item in weights):
        return
    kernel = np.asarray(weights[0])
    bias = np.asarray(weights[1], np.float64) if len(weights) > 1 else np.zeros(kernel.shape[0])
    scale = affine.scale.reshape(-1, *[1] * (kernel.ndim - 1))
    folded = [(kernel * scale).astype(kernel.dtype), (bias * affine.scale + affine.shift).astype(kernel.dtype)]
    names = [graph.unused_name(f"{follower.output[0]}/{part}") for part in ("kernel", "bias")]
    graph.constants.update(zip(names, folded, strict=True))
    del conv.input[1:]
    conv.input.extend(names)
    del graph.nodes[_position(graph, follower)]
    conv.output[0] = follower.output[0]


def _position(graph: Graph, node: onnx.NodeProto) -> int:
    return next(index for index, other in enumerate(graph.nodes) if other is node)
