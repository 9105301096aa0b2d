"""Give every Resize constant sizes."""

from __future__ import annotations

import numpy as np
import onnx

from ...graph import Graph, attribute
from .each import rewrite_each


def settle_resizes(graph: Graph) -> bool:
    """Resize(x, sizes of all axes) -> Resize(x, constant sizes of the axes that change).

    An open axis is the batch, which image networks do not resize.

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "Resize", _settle)


def _settle(graph: Graph, node: onnx.NodeProto) -> bool:
    if len(node.input) < 4 or attribute(node, "axes"):
        return False
    before, after = (graph.shape(name) if graph.rank(name) else () for name in (node.input[0], node.output[0]))
    axes = [axis for axis, size in enumerate(before) if isinstance(size, int)]
    if not axes or not all(isinstance(after[axis], int) for axis in axes):
        return False
    sizes = {axis: after[axis] for axis in axes if after[axis] != before[axis]} or {axes[-1]: after[axes[-1]]}
    graph.set_input(node, 3, graph.emit_constant(np.array(list(sizes.values()), np.int64), stem="sizes"))
    graph.set_attributes(node, axes=list(sizes))
    return True
