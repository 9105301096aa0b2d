"""Shared by the tests of gradient rules: an op as a graph, its gradients as one, and the ops that these may use."""

from __future__ import annotations

from typing import Any

import numpy as np
from networks import Array
from onnx import helper
from op_cases import OpCase

from fastcam.exporting.gradients.autodiff import backpropagate
from fastcam.exporting.ops import Fact, ops_with
from fastcam.graph import Graph, TensorType

TARGETS = 3

CUDA_AND_TENSORRT_OPS = ops_with(Fact.EMITTED)


def drawn_values(case: OpCase, rng: np.random.Generator) -> dict[str, Array]:
    """Draw the variables: distinct values, so that there are no ties or kinks within a finite-difference step."""
    drawn = {}
    for index in case.variables:
        shape = case.inputs[index]
        assert isinstance(shape, tuple)
        size = int(np.prod(shape))
        low, high = (0.5, 2.5) if case.positive else (-2.0, 2.0)
        # The offset keeps the grid off the kinks at round numbers, and the inputs' grids off each other.
        drawn[f"x{index}"] = (rng.permutation(np.linspace(low, high, size)) + 0.00317 * (1 + index)).reshape(shape)
    return drawn


def op_graph(case: OpCase, dtype: Any) -> Graph:
    """The op alone: variables x0, x1 ..., outputs y0, y1 ..., of which the graph's outputs are those that are read."""
    graph = Graph([], {}, {}, [f"y{index}" for index in case.read], case.opset)
    for index, item in enumerate(case.inputs):
        if isinstance(item, tuple):
            batch: tuple[int | str, ...] = ("batch",) if case.batched else item[:1]
            graph.inputs[f"x{index}"] = TensorType(np.dtype(dtype), (*batch, *item[1:]))
        elif item is not None:
            array = np.asarray(item)
            graph.constants[f"x{index}"] = array.astype(dtype) if array.dtype == np.float64 else array
    names = ["" if item is None else f"x{index}" for index, item in enumerate(case.inputs)]
    outputs = [f"y{index}" for index in range(case.outputs)]
    graph.append(helper.make_node(case.op, names, outputs, name="node", **case.attributes))
    graph.infer_types()
    return graph


def gradient_graph(case: OpCase, dtype: Any) -> Graph:
    """The op's gradients by x0, x1 ..., given those of its outputs, g0, g1 ..."""
    graph = op_graph(case, dtype)
    upstream = {f"y{index}": f"g{index}" for index in case.read}
    for output, gradient in upstream.items():
        graph.inputs[gradient] = TensorType(graph.type(output).dtype, ("targets", *graph.shape(output)))
    forward_ops = list(graph.nodes)
    gradients = [backpropagate(graph, upstream, [f"x{index}"])[0] for index in case.variables]
    graph.outputs = [*upstream, *(graph.emit("Identity", name) for name in gradients)]
    graph.prune()
    assert all(node in graph.nodes for node in forward_ops)
    return graph
