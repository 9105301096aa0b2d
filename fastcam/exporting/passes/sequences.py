"""Replace sequences of tensors by tensors."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ...graph import Graph, attribute, operator
from .each import rewrite_each


def join_sequences(graph: Graph) -> bool:
    """SequenceAt(SplitToSequence(x), constant) -> an output of Split(x); every part keeps its name.

    Returns
    -------
    bool
        Whether anything changed.
    """
    return rewrite_each(graph, "SplitToSequence", _join)


def _join(graph: Graph, node: onnx.NodeProto) -> bool:
    readers = graph.readers(node.output[0])
    sizes = _part_sizes(graph, node)
    places = [graph.constants.get(reader.input[1]) for reader in readers if operator(reader) == "SequenceAt"]
    if sizes is None or len(places) != len(readers) or any(place is None for place in places):
        return False
    parts = [graph.unused_name(f"{node.output[0]}/{index}") for index in range(len(sizes))]
    for reader, place in zip(readers, places, strict=True):
        graph.rewrite(reader, "Identity", [parts[int(np.asarray(place).item())]])
    split = graph.emit_constant(np.array(sizes, np.int64), stem="sizes")
    axis = attribute(node, "axis", 0)
    graph.replace(node, helper.make_node("Split", [node.input[0], split], parts, name=node.name, axis=axis))
    return True


def _part_sizes(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """Return the sizes of the parts, or None if they are computed or the parts lose their axis."""
    given = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if given is None or not attribute(node, "keepdims", 1) or graph.rank(node.input[0]) is None:
        return None
    if given.ndim:
        return [int(size) for size in given]
    whole, step = graph.shape(node.input[0])[attribute(node, "axis", 0)], int(given.item())
    if not isinstance(whole, int) or step < 1:
        return None
    return [min(step, whole - start) for start in range(0, whole, step)]
