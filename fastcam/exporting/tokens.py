"""Token maps of transformers, (N,T,C): which values are token maps, and how the tokens are arranged on the picture.

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

from ..batch_sizes import is_multiple
from ..graph import Graph, operator, static_dims
from .paths import Demand

# Class, distillation and register tokens: no known network has more.
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens of an image are arranged.

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


class TokenGrids:
    """How the tokens of a graph's values (N,T,C) are arranged.

    Parameters
    ----------
    graph : Graph
        Types inferred. The grids are those of the graph in its current state.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._batch = next(iter(graph.inputs.values())).shape[0] if graph.inputs else None
        # Per value of rank 3: the map of the last convolution before it that fits its number of tokens.
        self._maps: dict[str, tuple[int, int]] = {}
        self._collect()

    def _collect(self) -> None:
        last: dict[int, tuple[int, int, int]] = {}
        for position, node in enumerate(self._graph.nodes):
            size = _convolution_map(self._graph, node)
            if size is not None:
                last[size[0] * size[1]] = (position, *size)
            for value in node.output:
                tokens = self._tokens(value)
                fits = (
                    [last[tokens - p] for p in range(_MOST_PREFIX_TOKENS + 1) if tokens - p in last] if tokens else []
                )
                if fits:
                    self._maps[value] = max(fits)[1:]

    def _tokens(self, value: str) -> int | None:
        """Return the number of tokens of a value (N,T,C), or None if it is not a token map."""
        if self._graph.rank(value) != 3:
            return None
        batch, tokens, channels = self._graph.shape(value)
        # Tokens of windows, or of pixels within patches, do not have the batch on axis 0.
        own_rows = is_multiple(batch) or (isinstance(batch, int) and batch not in (1, self._batch))
        return tokens if isinstance(tokens, int) and isinstance(channels, int) and not own_rows else None

    def find(self, value: str, given: tuple[int, int] | None = None) -> TokenGrid | None:
        """Return how the tokens of a value are arranged.

        Parameters
        ----------
        value : str
        given : (int, int), optional
            Height and width of the patches; else those of the last convolution before ``value`` that fits, else a
            square behind one class token or none.

        Returns
        -------
        TokenGrid or None
            None if the value does not hold tokens, or nothing determines their grid.
        """
        tokens = self._tokens(value)
        if tokens is None:
            return None
        sides = [given] if given else [*([self._maps[value]] if value in self._maps else []), *_squares(tokens)]
        for height, width in sides:
            prefix = tokens - height * width
            # A single row, such as a pooled map leaves, is not a picture.
            if height * width > 1 and 0 <= prefix <= (tokens if given else _MOST_PREFIX_TOKENS):
                return TokenGrid(prefix, height, width)
        return None


def _convolution_map(graph: Graph, node: onnx.NodeProto) -> tuple[int, int] | None:
    """Return height and width of a convolution's output if they are fixed and there is more than one pixel."""
    if operator(node) != "Conv" or graph.rank(node.output[0]) != 4:
        return None
    height, width = graph.shape(node.output[0])[2:]
    if isinstance(height, int) and isinstance(width, int) and height * width > 1:
        return height, width
    return None


def _squares(tokens: int) -> Iterator[tuple[int, int]]:
    for prefix in (0, 1):
        side = math.isqrt(max(tokens - prefix, 0))
        if side * side == tokens - prefix:
            yield side, side


def is_token_block(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node's output is the state of all tokens: a normalisation, or the sum of two states."""
    if operator(node) == "LayerNormalization":
        return True
    # An Add of a constant is the bias of a dense layer, or a position.
    return operator(node) == "Add" and all(graph.rank(name) == 3 and name not in graph.constants for name in node.input)


def patches_count(demand: Demand, value: str, grid: TokenGrid) -> bool:
    """Return whether the patches of a token map can affect the scores.

    In a classifier that reads its class token, the patches of the last block's output cannot: no attention follows.
    """
    mask = demand.mask(value)
    return bool(mask[:, grid.prefix :].any()) if isinstance(mask, np.ndarray) else mask


def put_tokens_on_grid(graph: Graph, value: str, grid: TokenGrid) -> None:
    """Turn ``value`` into the patches' map (N,C,h,w); its readers get the tokens back, including the prefix."""
    tokens, channels = static_dims(graph, value, (1, 2))
    name = {part: graph.unused_name(f"{value}/{part}") for part in _PARTS}
    restored = name["restored"] if grid.prefix else name["patches_restored"]
    producer = graph.detach(value, made=name["tokens"], read=restored)

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
    graph.insert_after(producer, *nodes)
    graph.infer_types()


_PARTS = ("tokens", "map", "patches", "prefix", "rows", "rows_restored", "patches_restored", "restored")
