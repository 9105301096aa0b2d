"""Run the passes that clean up a graph without changing what it computes.

In this order:

1. Fold every cheap node whose inputs are all constants, answer every question about a shape whose answer is known, and
   give Reshape and Resize a constant target where the shape is known, until nothing changes.
2. Drop the nodes that pass their input through: Identity, Dropout, a Slice of everything, a Cast to the same type;
   merge what frameworks write as several ops: LayerNormalization, products over tokens.
3. Sink every Transpose below the ops that work with any order of axes, until two meet and cancel.
4. Fold what surrounds a Conv into it (zeros before, BatchNormalization, Mul and Add after), turn what is left of
   Mul + Add per channel into one BatchNormalization, and MatMul + bias into Gemm; keep zeros
   before a MaxPool separate from its own padding; pool series as pictures of one row.
5. Prune.

Each pass returns whether it changed anything, and may be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

from ...graph import Graph
from .constants import FoldingBudget, fold_constants
from .convolutions import fold_into_convolutions
from .gemms import join_matmul_and_bias
from .layer_normalizations import join_layer_normalizations
from .merged_transposes import join_merged_transposes
from .no_ops import drop_no_ops
from .pads import fold_pads
from .pool_pads import keep_zeros_before_pools
from .reshapes import settle_reshapes
from .resizes import settle_resizes
from .scale_and_shift import join_scale_and_shift
from .sequences import join_sequences
from .series_pools import pool_series_as_rows
from .shape_questions import answer_shape_questions
from .strided_copies import read_strided_copies
from .token_rows import join_rows_of_tokens
from .transposes import sink_transposes

Rewrite: TypeAlias = "Callable[[Graph], bool]"

# Each round may make further shapes known to the next one; no known network needs more than ten rounds.
_MOST_ROUNDS = 50

_SHAPES: tuple[Rewrite, ...] = (
    settle_reshapes,
    settle_resizes,
    answer_shape_questions,
    read_strided_copies,
    join_merged_transposes,
    join_sequences,
)
_STEPS: tuple[Rewrite, ...] = (drop_no_ops, join_layer_normalizations, join_rows_of_tokens)
_PRODUCTS: tuple[Rewrite, ...] = (
    fold_pads,
    fold_into_convolutions,
    join_scale_and_shift,
    join_matmul_and_bias,
    keep_zeros_before_pools,
    pool_series_as_rows,
)


def simplify(graph: Graph, keep: Collection[str] = ()) -> None:
    """Clean ``graph`` in place.

    Parameters
    ----------
    graph : Graph
    keep : collection of str
        Values that must still be computed, under the same name (a layer that the user asked for).

    Raises
    ------
    ModelError
        When a node that depends only on constants cannot be evaluated, or needs too much time or memory.
    """
    outputs = graph.outputs
    graph.outputs = list(dict.fromkeys([*outputs, *keep]))
    budget = FoldingBudget.of(graph)

    def fold_and_infer() -> None:
        fold_constants(graph, budget)
        graph.infer_types()

    fold_and_infer()
    _run(graph, _SHAPES, between=fold_and_infer)
    _run(graph, _STEPS, between=graph.prune)
    graph.prune()
    # What no longer hides behind a no-op.
    fold_and_infer()
    _run(graph, _SHAPES, between=fold_and_infer)
    sink_transposes(graph, fixed=outputs)
    # The old Transposes that sank would still count as readers.
    graph.prune()
    graph.infer_types()
    drop_no_ops(graph)
    _run(graph, _PRODUCTS, between=graph.prune)
    graph.outputs = outputs
    graph.prune()
    graph.infer_types()


def _run(graph: Graph, passes: Collection[Rewrite], between: Callable[[], None]) -> None:
    """Run passes until a round changes nothing or the limit on rounds is reached: each round leaves a valid graph."""
    for _ in range(_MOST_ROUNDS):
        # All of them run, regardless of what the first ones return.
        changes = [rewrite(graph) for rewrite in passes]
        if not any(changes):
            return
        between()
