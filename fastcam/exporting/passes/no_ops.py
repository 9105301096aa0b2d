"""Drop nodes that hand their input on."""

from __future__ import annotations

import onnx
from onnx import helper

from ...graph import Graph, attribute, operator


def drop_no_ops(graph: Graph) -> None:
    """Take out the nodes that hand their first input on unchanged."""
    remaining = []
    for node in graph.nodes:
        if _hands_on(node, graph) and node.output[0] not in graph.outputs:
            graph.replace_uses(node.output[0], node.input[0])
        else:
            remaining.append(node)
    graph.nodes = remaining


def _hands_on(node: onnx.NodeProto, graph: Graph) -> bool:
    op = operator(node)
    if op == "Dropout":
        return len([name for name in node.output if name]) == 1 and not _trains(node, graph)
    if op == "Cast" and graph.rank(node.input[0]) is not None:
        return bool(helper.np_dtype_to_tensor_dtype(graph.type(node.input[0]).dtype) == attribute(node, "to"))
    if op == "Transpose" and attribute(node, "perm"):
        order = attribute(node, "perm")
        return bool(order == sorted(order))
    if op == "Reshape":
        return graph.rank(node.input[0]) is not None and _is_same_shape(graph, node)
    return op == "Identity"


def _is_same_shape(graph: Graph, node: onnx.NodeProto) -> bool:
    """Equal in every axis, the open ones by name."""
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return before == after and None not in before


def _trains(node: onnx.NodeProto, graph: Graph) -> bool:
    """A Dropout whose training_mode input is, or may be, true."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    mode = graph.constants.get(node.input[2])
    return mode is None or bool(mode.any())
