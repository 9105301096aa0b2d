"""Several nodes that one op of ONNX says, made that op: frameworks write layers in single steps.

A pattern is a tree of ops, written as tuples; a text that starts with "?" stands for a value, the same one wherever it
occurs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper

from ...graph import Array, Graph, attribute, operator

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


def join_layer_normalizations(graph: Graph) -> None:
    """Turn a normalisation over the last axis into LayerNormalization; it keeps its name."""
    producers = graph.producers()
    for node in graph.nodes:
        found = next((b for p in _LAYER_NORMALIZATIONS if (b := _match(graph, producers, node.output[0], p, {}))), None)
        arguments = _normalization_arguments(graph, found) if found and operator(node) == "Add" else None
        if found and arguments is not None:
            gamma, beta, epsilon = arguments
            names = [graph.emit_constant(array, stem=found[key]) for key, array in (("?gamma", gamma), ("?beta", beta))]
            joined = helper.make_node(
                "LayerNormalization", [found["?x"], *names], node.output, name=node.name, axis=-1, epsilon=epsilon
            )
            node.CopyFrom(joined)


def _normalization_arguments(graph: Graph, found: Bindings) -> tuple[Array, Array, float] | None:
    """Return gamma, beta and epsilon; None where the last axis is not what is normalised, or one is computed."""
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


def _match(
    graph: Graph, producers: Mapping[str, onnx.NodeProto], value: str, pattern: Pattern, bound: Bindings
) -> Bindings | None:
    """Return the bindings with which ``value`` is made as the pattern says; None where it is not."""
    if isinstance(pattern, str):
        return _bind(graph, value, pattern, bound)
    op, *arguments = pattern
    node = producers.get(value)
    if node is None or operator(node) != op or len(node.input) != len(arguments) or not attribute(node, "keepdims", 1):
        return None
    orders = [arguments, arguments[::-1]] if op in _COMMUTATIVE else [arguments]
    for order in orders:
        found: Bindings | None = dict(bound)
        for name, argument in zip(node.input, order, strict=True):
            found = _match(graph, producers, name, argument, found) if found is not None else None
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


def join_rows_of_tokens(graph: Graph) -> None:
    """Let a product with a constant matrix work on (N,T,C) where it stood between two Reshapes, to (N*T,C) and back."""
    producers, consumers = graph.producers(), graph.consumers()
    for back in [node for node in graph.nodes if operator(node) == "Reshape"]:
        product = producers.get(back.input[0])
        rows = producers.get(product.input[0]) if product is not None and operator(product) == "MatMul" else None
        if product is None or rows is None or operator(rows) != "Reshape" or len(consumers[product.output[0]]) != 1:
            continue
        if _are_rows_of_tokens(graph, rows.input[0], product, back.output[0]):
            back.CopyFrom(helper.make_node("MatMul", [rows.input[0], product.input[1]], back.output, name=back.name))


def _are_rows_of_tokens(graph: Graph, tokens: str, product: onnx.NodeProto, result: str) -> bool:
    matrix = graph.constants.get(product.input[1])
    if matrix is None or matrix.ndim != 2 or graph.rank(tokens) is None or graph.rank(result) is None:
        return False
    (_, *before, channels), (_, *after, units) = graph.shape(tokens), graph.shape(result)
    known = all(isinstance(size, int) for size in before)
    return known and before == after and (channels, units) == matrix.shape


def join_sequences(graph: Graph) -> bool:
    """Turn SplitToSequence, read by SequenceAt at constant places, into Split; every part keeps its name.

    Tells whether any was turned.
    """
    consumers, joined = graph.consumers(), False
    for node in [node for node in graph.nodes if operator(node) == "SplitToSequence"]:
        readers = consumers.get(node.output[0], [])
        sizes = _part_sizes(graph, node)
        places = [graph.constants.get(reader.input[1]) for reader in readers if operator(reader) == "SequenceAt"]
        if sizes is None or len(places) != len(readers) or any(place is None for place in places):
            continue
        parts = [graph.unused_name(f"{node.output[0]}/{index}") for index in range(len(sizes))]
        for reader, place in zip(readers, places, strict=True):
            index = int(np.asarray(place).item())
            reader.CopyFrom(helper.make_node("Identity", [parts[index]], reader.output, name=reader.name))
        split = graph.emit_constant(np.array(sizes, np.int64), stem="sizes")
        axis = attribute(node, "axis", 0)
        node.CopyFrom(helper.make_node("Split", [node.input[0], split], parts, name=node.name, axis=axis))
        joined = True
    return joined


def _part_sizes(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """Return the sizes of the parts; None where they are computed, or the parts lose their axis."""
    given = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if given is None or not attribute(node, "keepdims", 1) or graph.rank(node.input[0]) is None:
        return None
    if given.ndim:
        return [int(size) for size in given]
    whole, step = graph.shape(node.input[0])[attribute(node, "axis", 0)], int(given.item())
    if not isinstance(whole, int) or step < 1:
        return None
    return [min(step, whole - start) for start in range(0, whole, step)]
