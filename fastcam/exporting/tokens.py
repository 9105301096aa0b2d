"""Token maps of transformers, (N,T,C): which of their values are maps, and how they lie on the picture.

A vision transformer cuts the picture into patches, row by row, and gives each a token; class and register tokens come
first (Dosovitskiy et al. 2021, section 3.1; Darcet et al. 2024). Grad-CAM takes the patches as the pixels of a map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..graph import Graph, attribute, dependents, operator, static_dims

# Class, distillation and register tokens: no known network has more.
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens of an image lie.

    Attributes
    ----------
    prefix : int
        Tokens before the patches.
    height, width : int
        Patches along each side.
    """

    prefix: int
    height: int
    width: int


def token_grid(graph: Graph, value: str, given: tuple[int, int] | None = None) -> TokenGrid | None:
    """Tell how the tokens of a value (N,T,C) lie.

    Parameters
    ----------
    graph : Graph
    value : str
    given : (int, int), optional
        Height and width of the patches; else those of the last convolution before ``value`` that fits, else a square
        behind one class token or none.

    Returns
    -------
    TokenGrid or None
        None where the value is no such map, or nothing tells.
    """
    tokens = _token_count(graph, value)
    if tokens is None:
        return None
    sides = [given] if given else [*_convolution_maps(graph, value), *_squares(tokens)]
    for height, width in sides:
        prefix = tokens - height * width
        # A single row, such as a pooled map leaves, is no picture.
        if height * width > 1 and 0 <= prefix <= (tokens if given else _MOST_PREFIX_TOKENS):
            return TokenGrid(prefix, height, width)
    return None


def _token_count(graph: Graph, value: str) -> int | None:
    if graph.rank(value) != 3:
        return None
    _, tokens, channels = graph.shape(value)
    return tokens if isinstance(tokens, int) and isinstance(channels, int) else None


def _convolution_maps(graph: Graph, value: str) -> Iterator[tuple[int, int]]:
    """Yield the maps of the convolutions before a value, from the last."""
    position = next((index for index, node in enumerate(graph.nodes) if value in node.output), 0)
    for node in reversed(graph.nodes[:position]):
        if operator(node) == "Conv" and graph.rank(node.output[0]) == 4:
            height, width = graph.shape(node.output[0])[2:]
            if isinstance(height, int) and isinstance(width, int):
                yield height, width


def _squares(tokens: int) -> Iterator[tuple[int, int]]:
    for prefix in (0, 1):
        side = math.isqrt(max(tokens - prefix, 0))
        if side * side == tokens - prefix:
            yield side, side


def is_token_block(graph: Graph, node: onnx.NodeProto) -> bool:
    """Tell the nodes whose output is the state of all tokens: a normalisation, or the sum of two states."""
    if operator(node) == "LayerNormalization":
        return True
    # What adds a constant is the bias of a dense layer, or a position.
    return operator(node) == "Add" and all(graph.rank(name) == 3 and name not in graph.constants for name in node.input)


def patches_reach_outputs(graph: Graph, value: str, grid: TokenGrid) -> bool:
    """Tell whether the patches of a token map have a way to the graph's outputs.

    In a classifier that reads its class token, the patches of the last block's output have none: no attention follows.
    """
    # Values in which every token is still its own.
    apart = {value}
    for node in dependents(graph, value):
        read = apart.intersection(node.input)
        if not read or _takes_prefix_only(graph, node, grid):
            continue
        if not _is_token_wise(graph, node):
            return True
        apart.update(node.output)
    return bool(apart.intersection(graph.outputs))


def _takes_prefix_only(graph: Graph, node: onnx.NodeProto, grid: TokenGrid) -> bool:
    """Tell a Gather or Slice along the tokens that takes none of the patches."""
    if operator(node) == "Gather" and attribute(node, "axis", 0) % 3 == 1:
        indices = graph.constants.get(node.input[1])
        return indices is not None and bool(np.all((indices >= 0) & (indices < grid.prefix)))
    if operator(node) != "Slice" or len(node.input) < 4:
        return False
    starts, ends, axes = (graph.constants.get(name) for name in node.input[1:4])
    if starts is None or ends is None or axes is None:
        return False
    return any(
        axis % 3 == 1 and start >= 0 and 0 <= end <= grid.prefix
        for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True)
    )


def _is_token_wise(graph: Graph, node: onnx.NodeProto) -> bool:
    """Tell an op that makes each token of the tokens at its place."""
    op, rank = operator(node), graph.rank(node.output[0])
    if rank != 3:
        return False
    if op == "MatMul":
        return node.input[1] in graph.constants
    if op == "ReduceMean":
        axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
        return axes is not None and all(axis % 3 == 2 for axis in axes.tolist())
    tokens = graph.shape(node.output[0])[1]
    return op in _TOKEN_WISE and all(
        name in graph.constants or (graph.rank(name) == 3 and graph.shape(name)[1] == tokens)
        for name in node.input
        if name
    )


_TOKEN_WISE = frozenset(
    """
    Add Cast Clip Div Dropout Erf Gelu Identity LayerNormalization LeakyRelu Max Min Mul Neg Pow Reciprocal Relu Sigmoid
    Softplus Sqrt Sub Tanh
    """.split()
)


def put_tokens_on_grid(graph: Graph, value: str, grid: TokenGrid) -> None:
    """Let ``value`` be the patches' map (N,C,h,w); those that read it get the tokens back, prefix included."""
    tokens, channels = static_dims(graph, value, (1, 2))
    position = next(index for index, node in enumerate(graph.nodes) if value in node.output)
    name = {part: graph.unused_name(f"{value}/{part}") for part in _PARTS}
    restored = name["restored"] if grid.prefix else name["patches_restored"]
    producer = graph.nodes[position]
    graph.replace_uses(value, restored)
    producer.output[list(producer.output).index(value)] = name["tokens"]

    def numbers(*sizes: int) -> str:
        return graph.emit_constant(np.array(sizes, np.int64), stem="shape")

    def node(op: str, output: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=output, **attributes)

    rows = numbers(0, grid.height, grid.width, channels)
    nodes = [
        node("Reshape", name["rows"], name["patches"] if grid.prefix else name["tokens"], rows),
        helper.make_node("Transpose", [name["rows"]], [value], name=name["map"], perm=[0, 3, 1, 2]),
        node("Transpose", name["rows_restored"], value, perm=[0, 2, 3, 1]),
        node(
            "Reshape", name["patches_restored"], name["rows_restored"], numbers(0, grid.height * grid.width, channels)
        ),
    ]
    if grid.prefix:
        start, first, end, axis = (numbers(number) for number in (0, grid.prefix, tokens, 1))
        nodes = [
            node("Slice", name["patches"], name["tokens"], first, end, axis),
            node("Slice", name["prefix"], name["tokens"], start, first, axis),
            *nodes,
            node("Concat", name["restored"], name["prefix"], name["patches_restored"], axis=1),
        ]
    graph.nodes[position + 1 : position + 1] = nodes
    graph.infer_types()


_PARTS = ("tokens", "map", "patches", "prefix", "rows", "rows_restored", "patches_restored", "restored")
