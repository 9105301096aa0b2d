"""Outputs that single methods need besides activations and gradients: one row for each, nodes that are appended.

In: the graph of an explained model, and what was asked about its targets. Out: outputs, by the names of
`metadata.EVIDENCE`. Imports the gradients and the ground.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...graph import Graph
from ..outputs import Asked, name_output, only_valid
from .attention import legrad_maps, rollout_maps
from .biases import bias_maps
from .curvature import curvatures
from .guided import guided_gradients

# Of the graph and what is asked: a value with the batch on axis 0 and the targets on axis 1, or 1 there.
BUILDERS: dict[str, Callable[[Graph, Asked], str]] = {
    "guided_gradients": guided_gradients,
    "bias_maps": bias_maps,
    "rollout_maps": rollout_maps,
    "legrad_maps": legrad_maps,
    "curvatures": curvatures,
}


def add_evidence(graph: Graph, names: Sequence[str], asked: Asked) -> None:
    """Add outputs to a graph that has its targets; raises ModelError where the network has nothing of the kind."""
    for name in names:
        value = BUILDERS[name](graph, asked)
        graph.infer_types()
        axes = range(2, graph.rank(value) or 0)
        name_output(graph, only_valid(graph, value, asked.valid, axes), name)
