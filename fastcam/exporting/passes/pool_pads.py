"""Keep pads separate from the pooling that reads them."""

from __future__ import annotations

import numpy as np

from ...graph import Graph, attribute, operator


def keep_zeros_before_pools(graph: Graph) -> bool:
    """MaxPool(Pad(x, 0)) -> MaxPool(Pad(x, -0.0)): the same result, and correct in every version of ONNX Runtime.

    Versions before 1.32 merge such a Pad into the MaxPool, whose own padding counts as minus infinity: wrong where
    all other values of a window are negative, as in ResNet50V2. They do so only where every byte of the padded value
    is zero, and -0.0 has one that is not.

    Returns
    -------
    bool
        Whether anything changed.
    """
    changed = False
    for pool in graph.nodes:
        pad = graph.producer(pool.input[0]) if operator(pool) == "MaxPool" else None
        if pad is None or operator(pad) != "Pad" or attribute(pad, "mode", "constant") != "constant":
            continue
        given = len(pad.input) > 2 and pad.input[2]
        value = graph.constants.get(pad.input[2]) if given else np.zeros((), graph.type(pad.input[0]).dtype)
        if value is None or value.any() or value.dtype.kind != "f" or np.signbit(value).all():
            continue
        negative = graph.emit_constant(np.copysign(value, -1), stem="negative_zero")
        graph.set_inputs(pad, [*pad.input[:2], negative, *pad.input[3:]])
        changed = True
    return changed
