"""Fold pads into convolutions."""

from __future__ import annotations

import numpy as np
import onnx

from ...graph import Graph, attribute, operator


def fold_pads(graph: Graph) -> bool:
    """Conv(Pad(x, zeros around the map)) -> Conv(x) with larger pads.

    Returns
    -------
    bool
        Whether anything changed.
    """
    changed = False
    for conv in graph.nodes:
        pad = graph.producer(conv.input[0]) if operator(conv) == "Conv" else None
        pads = _zeros_around(graph, pad) if pad is not None and operator(pad) == "Pad" else None
        if pad is None or pads is None or attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        own = attribute(conv, "pads", [0] * len(pads))
        graph.set_attributes(conv, auto_pad=None, pads=[a + b for a, b in zip(own, pads, strict=True)])
        graph.set_input(conv, 0, pad.input[0])
        changed = True
    return changed


def _zeros_around(graph: Graph, pad: onnx.NodeProto) -> list[int] | None:
    """Return the pads of the spatial axes in Conv's format, or None if other axes or values are padded."""
    pads = graph.constants.get(pad.input[1])
    value = graph.constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    axes_given = len(pad.input) > 3 and pad.input[3]
    if attribute(pad, "mode", "constant") != "constant" or axes_given or pads is None or value is None or value.any():
        return None
    ends = pads.reshape(2, -1)
    return [int(size) for size in ends[:, 2:].reshape(-1)] if not ends[:, :2].any() and (ends >= 0).all() else None
