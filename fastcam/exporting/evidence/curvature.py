"""The second-order term of Shapley-CAM (Cai 2025, arXiv 2501.06261): reverse passes through a reverse pass."""

from __future__ import annotations

from ...graph import Graph, nodes_between, static_dims
from ...metadata import layer_outputs
from ..gradients.autodiff import backpropagate, depends_on
from ..outputs import Asked


def curvatures(graph: Graph, asked: Asked) -> str:
    """Return the mean over the map of H A, (N,K,C): H is the Hessian of the target's score in the activations A.

    Of the first layer. H A is the gradient of the sum of A' times the score's gradient, for A' = A. So that targets
    stay apart, the head runs on a copy of the activations for each.
    """
    layer, weights = layer_outputs(0)[:2]
    batch, count = (graph.emit("Shape", asked.targets, start=axis, end=axis + 1) for axis in (0, 1))
    sides = static_dims(graph, layer, [1, 2, 3])
    one = graph.emit_integers(1)
    repeated = graph.emit("Concat", one, count, graph.emit_integers(1, 1, 1), axis=0)
    copies = graph.emit(
        "Reshape",
        graph.emit("Expand", graph.emit("Unsqueeze", layer, one), repeated),
        graph.emit_integers(-1, *sides),
        stem="curvature/activations",
    )
    scores = _score(graph, asked.logits, layer, copies)
    graph.infer_types()
    rows = asked._replace(targets=graph.emit("Reshape", asked.targets, graph.emit_integers(-1, 1)))
    value, seed = rows.differentiate(graph, scores)
    (gradient,) = backpropagate(graph, {value: seed}, [copies])
    graph.infer_types()
    if not depends_on(graph, gradient, copies):
        # A head of ReLUs and dense layers: its gradient is the same all around, so that Shapley-CAM is Grad-CAM.
        return graph.emit("Mul", weights, graph.emit_number(0), stem="curvature/none")
    # (1,1,N*K,C,h,w): of one sum, in one gradient.
    product = graph.emit("Unsqueeze", copies, graph.emit_integers(0, 1))
    (second,) = backpropagate(graph, {gradient: product}, [copies])
    mean = graph.emit("ReduceMean", second, graph.emit_integers(0, 3, 4), keepdims=0)
    shape = graph.emit("Concat", batch, count, graph.emit_integers(sides[0]), axis=0)
    return graph.emit("Reshape", mean, shape, stem="curvature/mean")


def _score(graph: Graph, logits: str, layer: str, activations: str) -> str:
    """Return the scores of other activations: a copy of the layer's head."""
    head = nodes_between(graph, layer, [logits])
    return graph.append_copies(head, {layer: activations}, "curvature")[logits]
