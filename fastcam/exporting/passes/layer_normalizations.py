"""Merge layer normalisations that frameworks write as several ops.

A pattern is a tree of ops, written as tuples; a string that starts with "?" stands for a value, the same one wherever
it occurs.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx

from ...arrays import Array
from ...graph import Graph, attribute, operator
from .each import rewrite_each

Pattern: TypeAlias = "str | tuple[Any, ...]"
Bindings: TypeAlias = "dict[str, str]"

_COMMUTATIVE = ("Add", "Mul")

_MEAN: Pattern = ("ReduceMean", "?x", "?axes")
_CENTRED: Pattern = ("Sub", "?x", _MEAN)
_SQUARES: tuple[Pattern, ...] = (("Mul", _CENTRED, _CENTRED), ("Pow", _CENTRED, "?two"))


def _layer_normalizations() -> list[Pattern]:
    """Return how frameworks write (x - mean) / sqrt(variance + epsilon) * gamma + beta (Ba et al. 2016, eq. 4)."""
    patterns: list[Pattern] = []
    for square in _SQUARES:
        deviation = ("Sqrt", ("Add", ("ReduceMean", square, "?axes"), "?epsilon"))
        scale = ("Mul", ("Reciprocal", deviation), "?gamma")
        shift = ("Add", ("Mul", ("Neg", _MEAN), scale), "?beta")
        patterns.append(("Add", ("Mul", "?x", scale), shift))
        patterns.append(("Add", ("Mul", ("Div", _CENTRED, deviation), "?gamma"), "?beta"))
    return patterns


_LAYER_NORMALIZATIONS = _layer_normalizations()


def join_layer_normalizations(graph: Graph) -> bool:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over the last axis, as several ops -> LayerNormalization.

    The result keeps its name.

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "Add", _join)


def _join(graph: Graph, node: onnx.NodeProto) -> bool:
    found = next((b for p in _LAYER_NORMALIZATIONS if (b := _match(graph, node.output[0], p, {}))), None)
    arguments = _normalization_arguments(graph, found) if found else None
    if found is None or arguments is None:
        return False
    gamma, beta, epsilon = arguments
    names = [graph.emit_constant(array, stem=found[key]) for key, array in (("?gamma", gamma), ("?beta", beta))]
    graph.rewrite(node, "LayerNormalization", [found["?x"], *names], axis=-1, epsilon=epsilon)
    return True


def _normalization_arguments(graph: Graph, found: Bindings) -> tuple[Array, Array, float] | None:
    """Return gamma, beta and epsilon, or None if other axes are normalised, or one of them is computed."""
    constants = {key: graph.constants.get(name) for key, name in found.items() if key != "?x"}
    rank = graph.rank(found["?x"])
    if rank is None or any(array is None for array in constants.values()):
        return None
    arrays = {key: np.asarray(array) for key, array in constants.items()}
    channels = graph.shape(found["?x"])[-1]
    over_last = arrays["?axes"].size == 1 and int(arrays["?axes"].reshape(-1)[0]) % rank == rank - 1
    squared = "?two" not in arrays or np.all(arrays["?two"] == 2)
    if not over_last or not squared or arrays["?epsilon"].size != 1:
        return None
    if any(arrays[key].size != channels or arrays[key].shape[-1] != channels for key in ("?gamma", "?beta")):
        return None
    gamma, beta = (arrays[key].reshape(-1) for key in ("?gamma", "?beta"))
    return gamma, beta, float(arrays["?epsilon"].reshape(-1)[0])


def _match(graph: Graph, value: str, pattern: Pattern, bound: Bindings) -> Bindings | None:
    """Return the bindings under which ``value`` matches the pattern, or None if it does not."""
    if isinstance(pattern, str):
        return _bind(graph, value, pattern, bound)
    op, *arguments = pattern
    node = graph.producer(value)
    if node is None or operator(node) != op or len(node.input) != len(arguments) or not attribute(node, "keepdims", 1):
        return None
    orders = [arguments, arguments[::-1]] if op in _COMMUTATIVE else [arguments]
    for order in orders:
        found: Bindings | None = dict(bound)
        for name, argument in zip(node.input, order, strict=True):
            found = _match(graph, name, argument, found) if found is not None else None
        if found is not None:
            return found
    return None


def _bind(graph: Graph, value: str, variable: str, bound: Bindings) -> Bindings | None:
    known = bound.setdefault(variable, value)
    if known == value:
        return bound
    # Converters write an equal constant for every layer.
    arrays = [graph.constants[name] for name in (known, value) if name in graph.constants]
    return bound if len(arrays) == 2 and np.array_equal(arrays[0], arrays[1]) else None
