"""What the attention of a transformer tells: rollout, and LeGrad.

Both read the attention weights A (N,heads,T,T) of every block, the softmax over the T tokens that a token attends to,
and end on the patches among the tokens, as a map.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from ...arrays import Floats
from ...batch_sizes import factored
from ...errors import ModelError
from ...graph import Graph, needed_nodes, nodes_between, operator
from ..gradients.autodiff import backpropagate
from ..outputs import Asked
from ..paths import Demand
from ..tokens import TokenGrid, TokenGrids


class _Block(NamedTuple):
    """The attention weights of a block, and the tokens' state (N,T,D) after the block."""

    weights: str
    state: str


class _Transformer(NamedTuple):
    blocks: list[_Block]
    tokens: int
    grid: TokenGrid


def rollout_maps(graph: Graph, asked: Asked) -> str:
    """Return attention rollout, (N,K,h,w), the same for every target (Abnar and Zuidema 2020, eq. 1).

    The rows of the product of (mean over heads of A + identity) / 2 over all blocks that belong to the tokens that the
    head reads: the class token, or the mean of all that it reads.
    """
    network = _read_transformer(graph, asked, "rollout_maps")
    row = graph.emit_constant(_read_tokens(graph, asked.logits, network)[None, None], stem="rollout/read")
    half = graph.emit_number(0.5)
    for block in reversed(network.blocks):
        mean = graph.emit("ReduceMean", _by_head(graph, block.weights), graph.emit_integers(1), keepdims=0)
        onward = graph.emit("MatMul", row, mean, stem="rollout/onward")
        row = graph.emit("Mul", graph.emit("Add", row, onward), half, stem="rollout/row")
    count = graph.emit("Shape", asked.targets, start=1, end=2)
    one = graph.emit_integers(1)
    shape = graph.emit("Concat", one, count, one, one, axis=0, stem="rollout/shape")
    return graph.emit("Expand", _on_grid(graph, row, network), shape, stem="rollout/maps")


def legrad_maps(graph: Graph, asked: Asked) -> str:
    """Return LeGrad, (N,K,h,w) (Bousselham et al. 2025, eq. 5 to 8).

    For every block the network's head scores the tokens' state after it; the positive part of that score's gradient in
    the block's attention weights is averaged over heads and over the attending tokens, and added up over blocks.
    """
    network = _read_transformer(graph, asked, "legrad_maps")
    last = network.blocks[-1].state
    head = nodes_between(graph, last, [asked.logits])
    scores = [_score_state(graph, head, last, block.state, asked.logits) for block in network.blocks]
    graph.infer_types()
    total = ""
    for block, score in zip(network.blocks, scores, strict=True):
        value, gradient = asked.differentiate(graph, score)
        (found,) = backpropagate(graph, {value: gradient}, [block.weights])
        # (K,N,heads,T,T), or (K,N*heads,T,T).
        by_head = _by_head(graph, found, leading=1, like=block.weights)
        positive = graph.emit("Relu", by_head, stem="legrad/positive")
        mean = graph.emit("ReduceMean", positive, graph.emit_integers(2, 3), keepdims=0, stem="legrad/block")
        total = graph.emit("Add", total, mean, stem="legrad/sum") if total else mean
    return _on_grid(graph, graph.emit("Transpose", total, perm=[1, 0, 2]), network)


def _score_state(graph: Graph, head: Sequence[onnx.NodeProto], last: str, state: str, logits: str) -> str:
    """Return the scores of a state: a copy of the head that reads it instead of the last one."""
    if state == last:
        return logits
    return graph.append_copies(head, {last: state}, "legrad")[logits]


def _read_transformer(graph: Graph, asked: Asked, name: str) -> _Transformer:
    """Find the blocks of a transformer whose tokens all attend to each other.

    Raises
    ------
    ModelError
        The network is none: convolutional, with attention within windows, or with tokens that are no patches.
    """
    weights = _attention_weights(graph, asked.logits)
    sizes = {graph.shape(value)[-1] for value in weights}
    tokens = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(tokens, int):
        found = "attention over different numbers of tokens" if weights else "no attention"
        raise ModelError(
            f"evidence={name!r} is for transformers whose tokens all attend to each other: the network has {found}. "
            "Omit it"
        )
    states = _states(graph, asked.logits, weights)
    grid = TokenGrids(graph).find(states[-1], asked.grid)
    if grid is None or graph.shape(states[-1])[1] != tokens:
        raise ModelError(
            f"evidence={name!r}: it is not known how the {tokens} tokens are arranged: pass "
            "token_grid=(rows, columns), or omit it"
        )
    return _Transformer([_Block(*pair) for pair in zip(weights, states, strict=True)], tokens, grid)


def _attention_weights(graph: Graph, logits: str) -> list[str]:
    """Return the softmaxes over tokens that weigh the values of as many tokens, in forward order."""
    needed = {id(node) for node in needed_nodes(graph, [logits])}
    softmaxes = [node.output[0] for node in graph.nodes if id(node) in needed and operator(node) == "Softmax"]
    found = [_weighing(graph, value, needed) for value in softmaxes if graph.rank(value) in (3, 4)]
    return [value for value in found if value and graph.shape(value)[-1] == graph.shape(value)[-2]]


def _weighing(graph: Graph, value: str, needed: Collection[int]) -> str | None:
    """Return what a product reads of a softmax, behind ops that leave its shape, such as masks; None if none does.

    ``needed``: the ids of the network's own nodes.
    """
    while True:
        readers = [node for node in graph.readers(value) if id(node) in needed]
        if len(readers) != 1:
            return None
        if operator(readers[0]) in ("MatMul", "Einsum"):
            return value
        following = readers[0].output[0]
        if graph.rank(following) is None or graph.shape(following) != graph.shape(value):
            return None
        value = following


def _states(graph: Graph, logits: str, weights: Sequence[str]) -> list[str]:
    """Return the tokens' state after each block: the last value before the next block that all its effects pass."""
    nodes = graph.nodes
    positions = {output: number for number, node in enumerate(nodes) for output in node.output}
    states = []
    for value, following in zip(weights, [*weights[1:], None], strict=True):
        limit = len(nodes) if following is None else positions[following]
        path = nodes_between(graph, value, [logits])
        passed = [
            name for name in _bottlenecks(graph, path, value) if positions[name] < limit and _is_state(graph, name)
        ]
        if not passed:
            raise ModelError(f"the block of attention weights {value!r} does not end in a state of all tokens")
        states.append(passed[-1])
    return states


def _bottlenecks(graph: Graph, path: Sequence[onnx.NodeProto], start: str) -> list[str]:
    """Return the values that everything passes that depends on ``start``, in forward order."""
    on_path = {id(node) for node in path}
    readers = {start: sum(id(reader) in on_path for reader in graph.readers(start))}
    found: list[str] = []
    for node in path:
        for name in dict.fromkeys(node.input):
            if name in readers:
                readers[name] -= 1
                if not readers[name]:
                    del readers[name]
        readers.update({name: sum(id(one) in on_path for one in graph.readers(name)) for name in node.output if name})
        if len(readers) == 1:
            found.extend(readers)
    return found


def _is_state(graph: Graph, value: str) -> bool:
    """Return whether a value is a sum of two states (N,T,D), not of a state and a bias."""
    node = graph.producer(value)
    if node is None or operator(node) != "Add" or graph.rank(value) != 3:
        return False
    return not any(name in graph.constants for name in node.input)


def _read_tokens(graph: Graph, logits: str, network: _Transformer) -> Floats:
    """Return the share (T,) of each token in what the head reads."""
    alone = graph.copy(outputs=[logits])
    alone.prune()
    mask = Demand(alone).mask(network.blocks[-1].state)
    read = mask[0].any(axis=-1) if isinstance(mask, np.ndarray) else np.ones(network.tokens, bool)
    return np.asarray(read / read.sum(), np.float32)


def _by_head(graph: Graph, value: str, leading: int = 0, like: str | None = None) -> str:
    """Return attention weights (N*heads,T,T), or their gradients, with an axis of their own for the heads."""
    rows, *tokens = graph.shape(like or value)
    if len(tokens) == 3:
        return value
    heads = factored(rows)[0] if isinstance(rows, str) else 1
    sizes = graph.emit_integers(*[0] * leading, -1, heads, *(int(size or 0) for size in tokens))
    return graph.emit("Reshape", value, sizes, stem="attention/heads")


def _on_grid(graph: Graph, rows: str, network: _Transformer) -> str:
    """Return the patches of rows (N,.,T) as maps (N,.,h,w)."""
    grid = network.grid
    patches = grid.height * grid.width
    start, end, axis = (graph.emit_integers(number) for number in (grid.prefix, grid.prefix + patches, 2))
    kept = graph.emit("Slice", rows, start, end, axis, stem="attention/patches")
    return graph.emit("Reshape", kept, graph.emit_integers(0, 0, grid.height, grid.width), stem="attention/maps")
