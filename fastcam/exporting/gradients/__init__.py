"""Gradients of chosen logits, as nodes of the same graph.

In: a classifier's graph, the logits and the target. Out: names of gradient values. `table` holds one rule per op,
`rules` fill it, `autodiff` walks the graph backwards, and `pooling` finds the mean over the map without the full
gradient. Imports `graph`, `errors` and `ops`.
"""

from . import rules

__all__ = ["rules"]
