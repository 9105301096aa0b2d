"""Pool series as pictures of one row: TensorRT pools two or three axes."""

from __future__ import annotations

import onnx
from onnx import helper

from ...graph import Graph, attribute, operator

_POOLS = ("AveragePool", "MaxPool")
# Attributes with one number per axis, and what they are along the row's height; pads have two per axis.
_ROW = {"kernel_shape": 1, "strides": 1, "dilations": 1}


def pool_series_as_rows(graph: Graph) -> bool:
    """Pool(x) of (N,C,T) -> Squeeze(Pool(Unsqueeze(x))) with windows of one row; returns whether anything changed."""
    pools = [node for node in graph.nodes if operator(node) in _POOLS and graph.rank(node.input[0]) == 3]
    for pool in pools:
        _pool_rows(graph, pool)
    graph.infer_types()
    return bool(pools)


def _pool_rows(graph: Graph, pool: onnx.NodeProto) -> None:
    height = graph.emit_integers(2)
    (series, *_), (pooled, *_) = pool.input, pool.output
    row, made = graph.unused_name(f"{pooled}/row"), graph.unused_name(f"{pooled}/pooled_row")
    attributes = {item.name: helper.get_attribute_value(item) for item in pool.attribute}
    attributes |= {name: [one, *attributes[name]] for name, one in _ROW.items() if name in attributes}
    pads = attribute(pool, "pads", None)
    if pads is not None:
        attributes["pads"] = [0, pads[0], 0, pads[1]]
    graph.insert_before(pool, helper.make_node("Unsqueeze", [series, height], [row], name=row))
    graph.detach(pooled, made=made, read=pooled)
    graph.set_inputs(pool, [row])
    graph.set_attributes(pool, **attributes)
    graph.insert_after(pool, helper.make_node("Squeeze", [made, height], [pooled], name=f"{pooled}/series"))
