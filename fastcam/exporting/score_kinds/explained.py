"""The layers of a detector that are explained by default.

A box is explained where the heads begin, once per size of map: the last maps from which both the scores and the boxes
are computed (P3, P4 and P5 of a YOLO). Behind them, the gradient of one box reaches a few cells only. "context" is the
end of the backbone, which all of these depend on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...graph import Graph, needed_nodes, operator
from ..layers import map_sizes
from ..ops import Fact, op_row
from ..paths import Demand


def head_inputs(graph: Graph, candidates: Sequence[str], boxes: str, scores: str) -> list[str]:
    """Return the last maps on every way to the scores that the boxes also depend on, the largest first.

    Parameters
    ----------
    graph : Graph
    candidates : sequence of str
        From the last to the first.
    boxes : str
        The boxes of all anchors.
    scores : str
        Their scores.
    """
    sizes = map_sizes(graph, candidates)
    # Element by element: outputs are often joined, and cut again.
    demand = Demand(graph.copy(outputs=[boxes]))
    found = _last_before_products(graph, scores, {name for name in sizes if demand.reaches(name)})
    # Of maps of one size, the first feeds the others: the stem of a head with branches.
    first = [
        name
        for name in found
        if not any(sizes[other] == sizes[name] for other in found & _behind(graph, name) - {name})
    ]
    order = {name: position for position, name in enumerate(reversed(candidates))}
    return sorted(first, key=lambda name: (-math.prod(sizes[name]), order[name]))


def _behind(graph: Graph, value: str) -> set[str]:
    """Return the values that ``value`` depends on, itself included."""
    return {output for node in needed_nodes(graph, [value]) for output in node.output}


def _last_before_products(graph: Graph, scores: str, wanted: set[str]) -> set[str]:
    """Return the wanted values that come first on each way back from the scores, behind a product with weights."""
    found: set[str] = set()
    seen: set[tuple[str, bool]] = set()
    stack = [(scores, False)]
    while stack:
        value, weighted = stack.pop()
        node = graph.producer(value)
        if node is None or (value, weighted) in seen:
            continue
        seen.add((value, weighted))
        if weighted and value in wanted:
            found.add(value)
            continue
        weighted = weighted or bool(op_row(operator(node)).facts & Fact.PRODUCT)
        stack.extend((name, weighted) for name in node.input if name)
    return found


def context_layer(graph: Graph, candidates: Sequence[str], boxes: str) -> list[str]:
    """Return the last of the smallest maps that all inputs of the heads depend on."""
    heads = head_inputs(graph, candidates, boxes, graph.outputs[0])
    behind = [_behind(graph, name) - {name} for name in heads]
    common = set.intersection(*behind) if behind else set()
    sizes = map_sizes(graph, [name for name in candidates if name in common])
    return [min(sizes, key=lambda name: math.prod(sizes[name]))] if sizes else []
