"""Rewrites that leave a model's function alone and its graph clean.

In this order:

1. Fold every node whose inputs are all constants, and every question about a shape whose answer is known.
2. Give Reshape and Resize a constant target where the shape is known, which frees the shape arithmetic behind it.
3. Drop nodes that do nothing at inference: Identity, Dropout, a Cast to the same type, a Transpose to the same order.
4. Join what frameworks write in single steps: LayerNormalization, products over tokens (`fusions`).
5. Sink every Transpose below the ops that work in any order of axes, until two meet that undo each other.
6. Fold the zeros that a Pad puts before a Conv into its pads.
7. Fold what follows a Conv and is affine per channel (BatchNormalization, Mul, Add) into its kernel and bias.
8. Turn what is left of Mul + Add per channel into one BatchNormalization.
9. Turn MatMul + bias into Gemm.
10. Give every Pad before a MaxPool a value that ONNX Runtime does not mistake for the MaxPool's own (`pads`).
11. Prune.

Each pass returns nothing and may be run again; a value in ``keep`` survives under its name.
"""

from __future__ import annotations

from collections.abc import Collection

from ...graph import Graph
from .constants import answer_shape_questions, fold_constants, settle_reshapes, settle_resizes
from .convolutions import fold_into_convolutions, fold_pads, join_matmul_and_bias, join_scale_and_shift
from .fusions import join_layer_normalizations, join_rows_of_tokens, join_sequences
from .no_ops import drop_no_ops
from .pads import keep_zeros_before_pools
from .transposes import sink_transposes


def simplify(graph: Graph, keep: Collection[str] = ()) -> None:
    """Clean ``graph`` in place.

    Parameters
    ----------
    graph : Graph
    keep : collection of str
        Values that must still be computed, under the same name (a layer that the user asked for).
    """
    outputs = graph.outputs
    graph.outputs = list(dict.fromkeys([*outputs, *keep]))
    fold_constants(graph)
    graph.infer_types()
    # What one round settles tells the next one further shapes.
    while settle_reshapes(graph) | settle_resizes(graph) | answer_shape_questions(graph) | join_sequences(graph):
        fold_constants(graph)
        graph.infer_types()
    drop_no_ops(graph)
    join_layer_normalizations(graph)
    join_rows_of_tokens(graph)
    graph.prune()
    sink_transposes(graph, fixed=outputs)
    # What the sunken ones left behind would still count as readers.
    graph.prune()
    graph.infer_types()
    drop_no_ops(graph)
    fold_pads(graph)
    fold_into_convolutions(graph)
    join_scale_and_shift(graph)
    join_matmul_and_bias(graph)
    keep_zeros_before_pools(graph)
    graph.outputs = outputs
    graph.prune()
    graph.infer_types()
