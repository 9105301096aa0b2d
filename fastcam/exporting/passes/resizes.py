"""Give every Resize constant sizes."""

from __future__ import annotations

import numpy as np
import onnx

from ...graph import Graph, attribute, operator


def settle_resizes(graph: Graph) -> bool:
    """Resize(x, sizes of all axes) -> Resize(x, constant sizes of the axes that change).

    An open axis is the batch, which image networks do not resize.

    Returns
    -------
    bool
        Whether anything changed.
    """
    changed = False
    for node in graph.nodes:
        if operator(node) == "Resize" and len(node.input) >= 4 and not attribute(node, "axes"):
            changed |= _settle(graph, node)
    return changed


def _settle(graph: Graph, node: onnx.NodeProto) -> bool:
    before, after = (graph.shape(name) if graph.rank(name) else () for name in (node.input[0], node.output[0]))
    axes = [axis for axis, size in enumerate(before) if isinstance(size, int)]
    if not axes or not all(isinstance(after[axis], int) for axis in axes):
        return False
    sizes = {axis: after[axis] for axis in axes if after[axis] != before[axis]} or {axes[-1]: after[axes[-1]]}
    graph.set_input(node, 3, graph.emit_constant(np.array(list(sizes.values()), np.int64), stem="sizes"))
    graph.set_attributes(node, axes=list(sizes))
    return True
