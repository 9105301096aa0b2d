"""Which elements of a graph's values matter: those that change with the picture, and those that affect the scores.

`varying_values` follows the picture forwards; `Demand` follows the scores backwards, element by element, through ops
that select, move and join. Both use structure only: they run no part of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from ..graph import Graph, attribute, operator
from .ops import Fact, op_row

# A mask of a value's elements, for one image if the batch is dynamic; True stands for all of them.
Mask: TypeAlias = "npt.NDArray[np.bool_] | bool"

# Largest mask: a value with more elements counts as a whole.
_LARGEST_MASK = 2**21


def varying_values(graph: Graph) -> set[str]:
    """Return the values that change with the picture.

    Sizes do not: a constant that is broadcast over the batch, or added to the picture times zero, is still a constant.
    """
    varying = set(graph.inputs)
    zeros = {name for name, array in graph.constants.items() if array.dtype.kind in "biuf" and not array.any()}
    for node in graph.nodes:
        outputs = [name for name in node.output if name]
        if _is_zero(node, zeros):
            zeros.update(outputs)
        elif not op_row(operator(node)).facts & Fact.READS_SHAPE and not varying.isdisjoint(node.input):
            varying.update(outputs)
    return varying


def _is_zero(node: onnx.NodeProto, zeros: set[str]) -> bool:
    op = operator(node)
    if op == "Mul":
        return not zeros.isdisjoint(node.input)
    if op == "ConstantOfShape":
        value = attribute(node, "value")
        return value is None or not onnx.numpy_helper.to_array(value).any()
    facts = op_row(op).facts
    if facts & Fact.KEEPS_ZERO or op == "Concat":
        return all(name in zeros for name in node.input if name)
    return bool(facts & Fact.MOVES) and node.input[0] in zeros and op != "Pad"


class Demand:
    """The elements of every value that can affect the graph's outputs: all others have gradient zero.

    Parameters
    ----------
    graph : Graph
        Types inferred. The masks are those of the graph in its current state.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._masks: dict[str, Mask] = dict.fromkeys(graph.outputs, True)
        for node in reversed(graph.nodes):
            if any(name in self._masks for name in node.output):
                self._visit(node)

    def mask(self, value: str) -> Mask:
        """Return the mask of a value, with its shape, a dynamic batch as 1; True for all elements, False for none."""
        return self._masks.get(value, False)

    def reaches(self, value: str) -> bool:
        """Return whether any element of ``value`` can affect the outputs."""
        return bool(np.any(self.mask(value)))

    def _visit(self, node: onnx.NodeProto) -> None:
        kinds = [self._graph.dtype(name) for name in node.output if name in self._masks]
        quantizes = bool(op_row(operator(node)).facts & Fact.QUANTIZES)
        if all(kind is not None and kind.kind in "iub" for kind in kinds) and not quantizes:
            return
        for index, name in enumerate(node.input):
            if name and name not in self._graph.constants:
                self._add(name, self._input_mask(node, index))

    def _add(self, name: str, mask: Mask) -> None:
        known = self._masks.get(name, False)
        joined: Mask
        if isinstance(known, np.ndarray) and isinstance(mask, np.ndarray):
            joined = np.asarray(known | mask)
        else:
            # One of them is a single truth value: all elements, or none.
            joined = True if known is True or mask is True else (known if mask is False else mask)
        if isinstance(joined, np.ndarray) and (joined.all() or not joined.any()):
            joined = bool(joined.any())
        if isinstance(joined, np.ndarray) or joined:
            self._masks[name] = joined

    def _input_mask(self, node: onnx.NodeProto, index: int) -> Mask:
        facts = op_row(operator(node)).facts
        if facts & (Fact.JUMPS | Fact.READS_SHAPE):
            return False
        shape = self.sizes(node.input[index])
        selecting = _SELECTING.get(operator(node))
        if selecting is None and self.mask(node.output[0]) is True:
            return True
        rule = selecting or _RULES.get(operator(node), _elementwise if facts & Fact.ELEMENTWISE else None)
        if rule is None or shape is None or any(self.sizes(name) is None for name in node.output if name):
            return True
        mask = rule(self, node, index)
        if isinstance(mask, np.ndarray) and mask.shape != shape:
            return True
        return mask

    def sizes(self, value: str) -> tuple[int, ...] | None:
        """Return the shape of a value, 1 for a dynamic batch; None if it is unknown or too large for a mask."""
        if self._graph.rank(value) is None:
            return None
        shape = self._graph.shape(value)
        sizes = [1 if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(shape)]
        known = tuple(size for size in sizes if isinstance(size, int))
        return known if len(known) == len(sizes) and np.prod(known, dtype=float) <= _LARGEST_MASK else None

    def full(self, value: str) -> npt.NDArray[np.bool_]:
        """Return the mask of a value as an array of the value's shape."""
        return np.broadcast_to(np.asarray(self.mask(value)), self.sizes(value) or ())

    def constant(self, node: onnx.NodeProto, index: int) -> npt.NDArray[np.generic] | None:
        """Return a constant input of a node, or None if it is computed or omitted."""
        return self._graph.constants.get(node.input[index]) if index < len(node.input) else None


MaskRule: TypeAlias = "Callable[[Demand, onnx.NodeProto, int], Mask]"


def _elementwise(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    return _summed_to(demand.full(node.output[0]), demand.sizes(node.input[index]))


def _summed_to(mask: npt.NDArray[np.bool_], sizes: Sequence[int] | None) -> Mask:
    """Reduce a mask to the elements of a smaller value that was broadcast to the mask's shape."""
    if sizes is None or len(sizes) > mask.ndim:
        return True
    mask = np.asarray(mask.any(axis=tuple(range(mask.ndim - len(sizes)))))
    stretched = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    return np.asarray(mask.any(axis=stretched, keepdims=True))


def _mul(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    """Elements that are multiplied by zero do not count."""
    factor = demand.constant(node, 1 - index)
    if demand.mask(node.output[0]) is True and (factor is None or factor.all()):
        return True
    mask = demand.full(node.output[0])
    if factor is not None:
        mask = mask & (factor != 0)
    return _summed_to(mask, demand.sizes(node.input[index]))


def _where(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    if index == 0:
        return False
    mask, condition = demand.full(node.output[0]), demand.constant(node, 0)
    if condition is not None:
        mask = mask & (condition.astype(bool) == (index == 1))
    return _summed_to(mask, demand.sizes(node.input[index]))


def _selected(demand: Demand, node: onnx.NodeProto, numbered: Callable[[npt.NDArray[np.int64]], object]) -> Mask:
    """Return the elements that an op copies to positions that count, found by running it on their indices."""
    sizes = demand.sizes(node.input[0])
    if sizes is None:
        return True
    numbers = np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes)
    moved, mask = np.asarray(numbered(numbers)), demand.full(node.output[0])
    if moved.size != mask.size:
        return True
    chosen = np.zeros(numbers.size, bool)
    chosen[moved.reshape(-1)[mask.reshape(-1)]] = True
    return chosen.reshape(sizes)


def _reshape(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    if index > 0:
        return False
    return _selected(demand, node, lambda numbers: numbers)


def _transpose(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    return _selected(demand, node, lambda numbers: numbers.transpose(attribute(node, "perm") or None))


def _slice(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    given = [demand.constant(node, position) for position in range(1, len(node.input)) if node.input[position]]
    if index > 0 or len(given) < 2 or any(array is None for array in given):
        return index == 0
    starts, ends, *rest = ([int(number) for number in array.reshape(-1)] for array in given if array is not None)
    has_axes = len(node.input) > 3 and bool(node.input[3])
    axes = rest[0] if has_axes else list(range(len(starts)))
    steps = rest[-1] if len(rest) > has_axes else [1] * len(starts)

    def sliced(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        places = [slice(None)] * numbers.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            # With a negative step, NumPy writes an end before the first element as None.
            before_first = step < 0 and end < -numbers.shape[axis]
            places[axis] = slice(start, None if before_first else end, step)
        return numbers[tuple(places)]

    return _selected(demand, node, sliced)


def _gather(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    indices = demand.constant(node, 1)
    if index > 0 or indices is None:
        return index == 0
    axis, places = attribute(node, "axis", 0), indices.astype(np.int64)
    try:
        return _selected(demand, node, lambda numbers: np.take(numbers, places, axis=axis))
    except IndexError:
        # Another image of the batch; a mask has only one.
        return True


def _concat(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    axis = attribute(node, "axis", 0)
    sizes = [demand.sizes(name) for name in node.input]
    if any(size is None for size in sizes):
        return True
    lengths = [size[axis] for size in sizes if size is not None]
    start = sum(lengths[:index])
    return np.take(demand.full(node.output[0]), range(start, start + lengths[index]), axis=axis)


def _split(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    if index > 0:
        return False
    return np.concatenate([demand.full(name) for name in node.output if name], axis=attribute(node, "axis", 0))


def _pad(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    pads = demand.constant(node, 1)
    has_axes = len(node.input) > 3 and bool(node.input[3])
    if index > 0 or pads is None or has_axes or attribute(node, "mode", "constant") != "constant":
        return index == 0
    mask = demand.full(node.output[0])
    before, after = np.split(pads.astype(np.int64).reshape(-1), 2)
    if min(*before, *after) < 0:
        return True
    return mask[tuple(map(slice, before, np.array(mask.shape) - after))]


def _along(default: int, *, to_end: bool) -> MaskRule:
    """Return the rule of ops that mix the elements along an axis, or from it to the last."""

    def rule(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
        mask = demand.full(node.output[0])
        axis = attribute(node, "axis", default) % mask.ndim
        axes = tuple(range(axis, mask.ndim)) if to_end else (axis,)
        return index == 0 and np.broadcast_to(mask.any(axis=axes, keepdims=True), mask.shape)

    return rule


def _reduced(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    sizes, axes = demand.sizes(node.input[0]), demand.constant(node, 1)
    if index > 0 or axes is None or sizes is None:
        return index == 0
    mask = demand.full(node.output[0])
    if not attribute(node, "keepdims", 1):
        mask = np.expand_dims(mask, tuple(int(axis) % len(sizes) for axis in axes.reshape(-1)))
    return np.broadcast_to(mask, sizes)


def _matmul(demand: Demand, node: onnx.NodeProto, index: int) -> Mask:
    """A row of the product needs its own row on the left, and all of the right."""
    sizes = demand.sizes(node.input[0])
    mask = demand.full(node.output[0])
    if index > 0 or sizes is None or len(sizes) != mask.ndim or attribute(node, "transA", 0):
        return True
    return np.broadcast_to(mask.any(axis=-1, keepdims=True), (*mask.shape[:-1], sizes[-1]))


# Of these, elements of an input may not count although all the output does.
_SELECTING: dict[str, MaskRule] = {
    "Mul": _mul,
    "Where": _where,
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
}

_RULES: dict[str, MaskRule] = {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Pad": _pad,
    "Concat": _concat,
    "LayerNormalization": _along(-1, to_end=True),
    "Softmax": _along(-1, to_end=False),
    "LogSoftmax": _along(-1, to_end=False),
    "ReduceL2": _reduced,
    "ReduceMax": _reduced,
    "ReduceMean": _reduced,
    "ReduceSum": _reduced,
    "MatMul": _matmul,
    "Gemm": _matmul,
}
