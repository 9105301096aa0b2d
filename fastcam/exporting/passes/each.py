"""What most passes do: try a rewrite on every node of an op."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from ...graph import Graph, operator


def rewrite_each(graph: Graph, op: str, rewrite: Callable[[Graph, onnx.NodeProto], bool]) -> bool:
    """Call ``rewrite``, which returns whether it changed the graph, for every node of an op; return whether any did."""
    # A list: all nodes are tried, whatever the first ones return.
    changes = [rewrite(graph, node) for node in graph.nodes if operator(node) == op]
    return any(changes)
