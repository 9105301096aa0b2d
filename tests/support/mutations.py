"""Ways to break a small model, shared by the tests of importer and Explainer."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from networks import NetworkBuilder


def residual() -> onnx.ModelProto:
    net = NetworkBuilder(("batch", 8, 8, 3))
    first = net.add("Transpose", net.input, perm=[0, 3, 1, 2])
    stem = net.add("Relu", net.conv(first, (4, 3, 3, 3), pads=[1, 1, 1, 1]))
    inner = net.add("Mul", stem, net.constant(np.linspace(1, 2, 4, dtype=np.float32).reshape(1, 4, 1, 1)))
    padded = net.add("Pad", inner, net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    pooled = net.add("MaxPool", padded, kernel_shape=[3, 3])
    joined = net.add("Add", stem, pooled)
    rows = net.add("Reshape", net.add("Transpose", joined, perm=[0, 2, 3, 1]), net.constant(np.array([0, -1])))
    hidden = net.add("MatMul", rows, net.weight(256, 5))
    scores = net.add("Add", hidden, net.constant(np.zeros(5, np.float32)))
    return net.build(net.add("Softmax", scores, axis=-1)).to_model()


def drop_node(model: onnx.ModelProto, pick: random.Random) -> None:
    del model.graph.node[pick.randrange(len(model.graph.node))]


def drop_weights(model: onnx.ModelProto, pick: random.Random) -> None:
    del model.graph.initializer[pick.randrange(len(model.graph.initializer))]


def _swap_inputs(model: onnx.ModelProto, pick: random.Random) -> None:
    first, second = pick.sample(list(model.graph.node), 2)
    first.input[0], second.input[0] = second.input[0], first.input[0]


def _change_op(model: onnx.ModelProto, pick: random.Random) -> None:
    ops = ["Relu", "Conv", "Gemm", "MaxPool", "Transpose", "Reshape", "Softmax", "Nonsense", "Concat", "Shape", "Clip"]
    pick.choice(list(model.graph.node)).op_type = pick.choice(ops)


def drop_input(model: onnx.ModelProto, pick: random.Random) -> None:
    node = pick.choice(list(model.graph.node))
    del node.input[pick.randrange(len(node.input)) :]


def _change_attribute(model: onnx.ModelProto, pick: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    attribute = pick.choice(list(pick.choice(nodes).attribute))
    numbers = [pick.choice([-(2**40), -1, 0, 1, 3, 2**31, 2**62]) for _ in range(pick.randrange(5))]
    attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, numbers or 7))


def change_input_shape(model: onnx.ModelProto, pick: random.Random) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[pick.randrange(len(dims))].dim_value = pick.choice([-1, 0, 1, 2, 7, 2**31, 2**62])


def _change_weights_shape(model: onnx.ModelProto, pick: random.Random) -> None:
    weights = pick.choice(list(model.graph.initializer))
    if weights.dims:
        weights.dims[pick.randrange(len(weights.dims))] = pick.choice([-1, 0, 1, 2**31, 2**62])


def _change_weights_type(model: onnx.ModelProto, pick: random.Random) -> None:
    pick.choice(list(model.graph.initializer)).data_type = pick.choice([1, 6, 7, 8, 9, 10, 11, 16, 99])


def rename_output(model: onnx.ModelProto, pick: random.Random) -> None:
    model.graph.output[pick.randrange(len(model.graph.output))].name = pick.choice(["", "ghost", "logits", "image"])


STRUCTURAL: list[Callable[[onnx.ModelProto, random.Random], None]] = [
    drop_node,
    drop_weights,
    _swap_inputs,
    _change_op,
    drop_input,
    _change_attribute,
    change_input_shape,
    _change_weights_shape,
    _change_weights_type,
    rename_output,
]


def flip_bytes(data: bytes, pick: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(pick.choice([1, 1, 4, 16])):
        changed[pick.randrange(len(changed))] = pick.randrange(256)
    return bytes(changed[: pick.randrange(len(changed))] if pick.random() < 0.2 else changed)
