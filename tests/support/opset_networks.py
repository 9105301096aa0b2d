"""A classifier for every opset, with everything that changed over the years: attributes that became inputs, new ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = range(7, 24)
# In the oldest files, weights had to be among the inputs.
_IR_VERSIONS = {7: 3, 8: 3}

# The map that is explained, and its size.
LAYER, LAYER_SIZE = "explained", (14, 12)


class _Writer:
    """Writes nodes of one opset: arguments that later became inputs are given by name."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def weight(self, array: npt.ArrayLike) -> str:
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int) -> str:
        spread = np.sqrt(2 / np.prod(shape[1:]))
        return self.weight(self._rng.normal(0, spread, shape).astype(np.float32))

    def add(self, op: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        names = outputs or (f"{op.lower()}{len(self.nodes)}",)
        self.nodes.append(helper.make_node(op, list(inputs), list(names), name=f"{names[0]}_node", **attributes))
        return names[0]

    def moved(
        self, since: int, op: str, value: str, outputs: tuple[str, ...] = (), **arguments: npt.NDArray[Any]
    ) -> str:
        """Write an op whose ``arguments`` are attributes before opset ``since``, and inputs from then on."""
        if self.opset < since:
            return self.add(op, value, outputs=outputs, **{key: array.tolist() for key, array in arguments.items()})
        return self.add(op, value, *(self.weight(array) for array in arguments.values()), outputs=outputs)


def classifier(opset: int, softmax: str = "Softmax") -> onnx.ModelProto:
    """(batch,3,16,12) -> (batch,5); ends in a softmax."""
    net = _Writer(opset)
    value = net.add("Conv", "image", net.normal(6, 3, 3, 3), net.weight(np.linspace(-0.1, 0.1, 6, dtype=np.float32)))
    value = _batch_normalization(net, value)
    value = net.moved(11, "Clip", value, min=np.array(-0.5, np.float32), max=np.array(6, np.float32))
    value = _pad(net, value)
    value = net.add("LeakyRelu", net.add("Conv", value, net.normal(6, 6, 3, 3)), alpha=0.1)
    value = _enlarge(net, value)
    value = _slice(net, value)
    # The following pooling should not see equal neighbours, where gradients jump.
    gate = net.add("Conv", value, net.normal(6, 6, 3, 3), pads=[1, 1, 1, 1])
    value = net.add("Add", value, net.add("Sigmoid", gate), outputs=(LAYER,))
    value = _pool(net, value)
    value = _dropout(net, value)
    value = _split_and_swap(net, value)
    value = _gate(net, value)
    value = _NEWEST[opset](net, value) if opset in _NEWEST else value
    value = _mean(net, value)
    bias = net.weight(np.linspace(-1, 1, 5, dtype=np.float32))
    value = net.add("Gemm", value, net.normal(6, 5), bias, outputs=("raw",))
    value = net.add(softmax, value, axis=1, outputs=("scores",))
    graph = helper.make_graph(
        net.nodes,
        f"opset{opset}",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 12])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", 5])],
        net.weights,
        # Shape inference stops at GroupNormalization.
        value_info=[helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["batch", 5])],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSIONS.get(opset, 10))
    if model.ir_version < 4:
        graph_inputs = [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in net.weights]
        model.graph.input.extend(graph_inputs)
    if opset not in (18, 19):
        # GroupNormalization of opset 18 has been withdrawn; files with it remain.
        onnx.checker.check_model(model, full_check=True)
    return model


def _batch_normalization(net: _Writer, value: str) -> str:
    parameters = [net.weight(np.linspace(low, low + 1, 6, dtype=np.float32)) for low in (0.5, -0.5, -0.2, 0.6)]
    attributes: dict[str, Any] = {"spatial": 1} if net.opset < 9 else {}
    return net.add("BatchNormalization", value, *parameters, **attributes)


def _pad(net: _Writer, value: str) -> str:
    pads = [0, 0, 1, 1, 0, 0, 1, 1]
    if net.opset < 11:
        return net.add("Pad", value, pads=pads, value=0.25)
    return net.add("Pad", value, net.weight(np.array(pads)), net.weight(np.float32(0.25)))


def _enlarge(net: _Writer, value: str) -> str:
    scales = np.array([1, 1, 2, 2], np.float32)
    if net.opset < 9:
        return net.add("Upsample", value, scales=scales.tolist(), mode="nearest")
    if net.opset == 9:
        return net.add("Upsample", value, net.weight(scales), mode="nearest")
    if net.opset == 10:
        return net.add("Resize", value, net.weight(scales), mode="nearest")
    rounding: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    roi = net.weight(np.zeros(0, np.float32)) if net.opset < 13 else ""
    return net.add("Resize", value, roi, net.weight(scales), mode="nearest", **rounding)


def _slice(net: _Writer, value: str) -> str:
    ranges: dict[str, Any] = {"starts": np.array([0, 0]), "ends": np.array([14, 12]), "axes": np.array([2, 3])}
    return net.moved(10, "Slice", value, **ranges)


def _pool(net: _Writer, value: str) -> str:
    ceil_mode: dict[str, Any] = {"ceil_mode": 1} if net.opset >= 10 else {}
    pooled = net.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], **ceil_mode)
    return net.add("AveragePool", pooled, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)


def _dropout(net: _Writer, value: str) -> str:
    outputs = (f"dropped{net.opset}", "mask")
    if net.opset < 12:
        return net.add("Dropout", value, outputs=outputs, ratio=0.4)
    return net.add("Dropout", value, net.weight(np.float32(0.4)), net.weight(np.array(False)), outputs=outputs)


def _split_and_swap(net: _Writer, value: str) -> str:
    sizes, parts = np.array([2, 4]), ("front", "back")
    if net.opset < 13:
        net.add("Split", value, split=sizes.tolist(), axis=1, outputs=parts)
    else:
        net.add("Split", value, net.weight(sizes), axis=1, outputs=parts)
    return net.add("Concat", "back", "front", axis=1)


def _gate(net: _Writer, value: str) -> str:
    """Hand-written squeeze-and-excitation: (N,6,h,w) -> (N,6) -> (N,6,1,1)."""
    squeezed = net.moved(13, "Squeeze", net.add("GlobalAveragePool", value), axes=np.array([2, 3]))
    hidden = net.add("HardSigmoid", net.add("MatMul", squeezed, net.normal(6, 6)), alpha=0.2, beta=0.5)
    gate = net.moved(13, "Unsqueeze", hidden, axes=np.array([2, 3]))
    return net.add("Mul", value, gate)


def _mean(net: _Writer, value: str) -> str:
    if net.opset < 18:
        return net.add("ReduceMean", value, axes=[2, 3], keepdims=0)
    return net.add("ReduceMean", value, net.weight(np.array([2, 3])), keepdims=0)


def _hard_swish(net: _Writer, value: str) -> str:
    return net.add("HardSwish", value)


def _layer_normalization(net: _Writer, value: str) -> str:
    last = net.add("Transpose", value, perm=[0, 2, 3, 1])
    scale, shift = (net.weight(np.linspace(low, 1, 6, dtype=np.float32)) for low in (0.5, -1))
    return net.add("Transpose", net.add("LayerNormalization", last, scale, shift, axis=-1), perm=[0, 3, 1, 2])


def _group_normalization(net: _Writer, value: str) -> str:
    # One number per group before opset 21, one per channel since.
    size = 2 if net.opset < 21 else 6
    scale, shift = (net.weight(np.linspace(low, 1, size, dtype=np.float32)) for low in (0.5, -1))
    return net.add("GroupNormalization", value, scale, shift, num_groups=2)


def _gelu(net: _Writer, value: str) -> str:
    return net.add("Gelu", value, approximate="tanh")


def _attention(net: _Writer, value: str) -> str:
    """Tokens that attend to each other, in the op of opset 23."""
    flat = net.add("Reshape", value, net.weight(np.array([0, 2, 3, -1])))
    tokens = net.add("Transpose", flat, perm=[0, 1, 3, 2])
    mixed = net.add("Attention", tokens, tokens, tokens)
    scale = net.weight(np.linspace(0.5, 2, 3, dtype=np.float32))
    normed = net.add("RMSNormalization", mixed, scale, axis=-1)
    joined = net.add("Transpose", net.add("Add", normed, tokens), perm=[0, 1, 3, 2])
    return net.add("Reshape", joined, net.weight(np.array([0, 6, 8, 7])))


_NEWEST = {
    14: _hard_swish,
    17: _layer_normalization,
    18: _group_normalization,
    19: _group_normalization,
    20: _gelu,
    21: _group_normalization,
    22: _hard_swish,
    23: _attention,
}
