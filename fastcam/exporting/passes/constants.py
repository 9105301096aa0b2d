"""Fold what depends only on constants.

A file of one kilobyte can ask for any amount of memory and time, so only ops that the table of ops lists as cheap are
run, and only within a budget that is checked before each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx

from ...arrays import Array
from ...errors import ModelError
from ...graph import Graph, attribute, operator
from ..ops import Size, op_row

# Bytes of results: what a model with few or no weights may create (light test models hold theirs as ConstantOfShape),
# and how many copies of its weights any model may.
_FREE_BYTES = 2**30
_COPIES = 4
# Work, in NumPy additions of about 1 ns each: what every model is allowed, and the extra per element of its weights.
_FREE_WORK = 2**33
_WORK_PER_WEIGHT = 16
# Multiply-accumulates of a matrix product in the time of one addition.
_PRODUCTS_PER_ADDITION = 16


@dataclass
class FoldingBudget:
    """What constant folding may still use: the sum over all nodes of a model.

    Attributes
    ----------
    bytes : int
        Bytes of results.
    work : int
        NumPy additions, about 1 ns each.
    """

    bytes: int
    work: int

    @classmethod
    def of(cls, graph: Graph) -> FoldingBudget:
        """Return the budget of a model, by the size of its weights."""
        weights = graph.constants.values()
        return cls(
            _FREE_BYTES + _COPIES * sum(array.nbytes for array in weights),
            _FREE_WORK + _WORK_PER_WEIGHT * sum(array.size for array in weights),
        )

    def spend(self, node: onnx.NodeProto, size: int, work: int) -> None:
        """Subtract a node's needs; raise ModelError, naming the node, when they exceed what is left."""
        name = f"node {node.name or node.output[0]!r} ({node.op_type})"
        if size > self.bytes:
            raise ModelError(
                f"{name} would create a constant of {size} bytes, but only {self.bytes} are left for what this model "
                "computes from constants: store the result as an initializer instead"
            )
        if work > self.work:
            raise ModelError(f"{name} computes for too long on constants: store the result as an initializer instead")
        self.bytes -= size
        self.work -= work


def fold_constants(graph: Graph, budget: FoldingBudget | None = None) -> bool:
    """op(constants) -> constant, for the ops that `ops.OPS` lists as cheap; all others stay in the graph.

    Parameters
    ----------
    graph : Graph
    budget : FoldingBudget, optional
        Shared by several calls for one model; by default a new one.

    Returns
    -------
    bool
        Whether anything was folded.

    Raises
    ------
    ModelError
        When such a node cannot be evaluated, or exceeds the budget.
    """
    budget = FoldingBudget.of(graph) if budget is None else budget
    changed = False
    for node in graph.nodes:
        results = _fold(graph, node, budget)
        if results is not None:
            graph.replace_by_constants(node, results)
            changed = True
    return changed


def _fold(graph: Graph, node: onnx.NodeProto, budget: FoldingBudget) -> list[Array] | None:
    """Return a node's outputs, or None if it should not be folded."""
    row = op_row(operator(node))
    if row.folds is None or not all(name in graph.constants for name in node.input if name):
        return None
    arrays = [graph.constants.get(name) for name in node.input]
    if any(array is not None and array.dtype.kind not in "biuf" for array in arrays):
        return None
    try:
        needs = _SIZES[row.folds](node, [array for array in arrays if array is not None])
    except (IndexError, OverflowError, ValueError):
        # The arguments contradict each other: evaluating the node will say how.
        needs = (0, 0)
    if needs is None:
        return None
    size = needs[0] * _item_size(graph, node)
    budget.spend(node, size, needs[1] * row.cost)
    results = _evaluate(graph, node)
    # The estimate is an upper bound, far above the size of a reduction's result.
    budget.bytes += size - sum(result.nbytes for result in results or ())
    return results


def _item_size(graph: Graph, node: onnx.NodeProto) -> int:
    dtype = graph.dtype(node.output[0])
    return 8 if dtype is None else dtype.itemsize


def _evaluate(graph: Graph, node: onnx.NodeProto) -> list[Array] | None:
    """Return a node's outputs, or None if they are not arrays."""
    # The reference implementation reads a 100 ms table of ops on import: only models with something to fold pay for it.
    from onnx.reference import ReferenceEvaluator

    inputs = {name: graph.constants[name] for name in node.input if name}
    try:
        results = list(ReferenceEvaluator(node, opsets={"": graph.opset}).run(None, inputs))
        if not all(isinstance(result, np.ndarray | np.generic) for result in results):
            return None
        return [np.asarray(result, order="C") for result in results]
    except Exception as error:  # whatever NumPy raises for the node's arguments
        raise ModelError(f"node {node.name!r} ({node.op_type}) cannot be evaluated: {error}") from error


# (Elements of the result, additions) of a node, given its constants; None if it should not be folded.
SizeRule: TypeAlias = "Callable[[onnx.NodeProto, Sequence[Array]], tuple[int, int] | None]"


def _inputs(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    size = sum(array.size for array in arrays)
    return size, size


def _as_long(elements: int) -> tuple[int, int]:
    return elements, elements


def _broadcast(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    return _as_long(math.prod(np.broadcast_shapes(*(array.shape for array in arrays))))


def _target(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    *others, target = arrays
    sides = [max(int(side), 0) for side in target.reshape(-1)]
    return _as_long(math.prod(sides) * max([1, *(_stretched(array.shape, sides) for array in others)]))


def _stretched(shape: Sequence[int], sides: Sequence[int]) -> int:
    """Return how many times larger the broadcast of a shape and ``sides`` is than ``sides`` alone."""
    lead, aligned = shape[: max(len(shape) - len(sides), 0)], shape[::-1]
    own = (side for side, other in zip(aligned, reversed(sides), strict=False) if other == 1)
    return math.prod(lead) * math.prod(own)


def _repeats(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    return _as_long(arrays[0].size * math.prod(max(int(count), 0) for count in arrays[1].reshape(-1)))


def _range(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    start, limit, step = (array.item() for array in arrays)
    return _as_long(max(math.ceil((limit - start) / step), 0) if step else 0)


def _depth(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    return _as_long(arrays[0].size * max(int(arrays[1].reshape(-1)[0]), 0))


def _pads(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    sides, ends = list(arrays[0].shape), arrays[1].reshape(2, -1)
    axes = arrays[3] if len(arrays) > 3 else range(ends.shape[1])
    for position, axis in enumerate(axes):
        sides[int(axis)] += max(int(ends[0, position]), 0) + max(int(ends[1, position]), 0)
    return _as_long(math.prod(sides))


def _gather(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    data, indices = arrays
    return _as_long(indices.size * (data.size // max(data.shape[attribute(node, "axis", 0)], 1)))


def _rank(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int]:
    return _as_long(arrays[0].size * max(arrays[0].ndim, 1))


def _product(node: onnx.NodeProto, arrays: Sequence[Array]) -> tuple[int, int] | None:
    """NumPy passes products of float32 and float64 to BLAS; everything else runs in a slow loop."""
    left, right = arrays[:2]
    if left.dtype not in (np.float32, np.float64) or min(left.ndim, right.ndim) < 2:
        return None
    summed = left.shape[-2 if attribute(node, "transA", 0) else -1]
    batches = math.prod(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    rows, columns = (math.prod(array.shape[-2:]) // max(summed, 1) for array in (left, right))
    elements = batches * rows * columns
    return elements, elements * max(summed // _PRODUCTS_PER_ADDITION, 1)


_SIZES: dict[Size, SizeRule] = {
    Size.INPUTS: _inputs,
    Size.BROADCAST: _broadcast,
    Size.TARGET: _target,
    Size.REPEATS: _repeats,
    Size.RANGE: _range,
    Size.DEPTH: _depth,
    Size.PADS: _pads,
    Size.GATHER: _gather,
    Size.RANK: _rank,
    Size.PRODUCT: _product,
}
