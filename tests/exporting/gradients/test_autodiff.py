"""The reverse pass: values computed by hand, sums over several readers, and pooled against full gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier
from onnx import TensorProto

from fastcam.errors import UnsupportedOpError
from fastcam.exporting.gradients import pooling
from fastcam.exporting.gradients.autodiff import backpropagate, target_gradients
from fastcam.exporting.gradients.pooling import pooled_gradients
from fastcam.exporting.gradients.pushes import PUSHES
from fastcam.exporting.passes.simplify import simplify
from fastcam.exporting.scores import remove_score_activation
from fastcam.graph import Graph, TensorType


def _run(graph: Graph, outputs: list[str], inputs: dict[str, Array]) -> list[Array]:
    graph.outputs = outputs
    graph.infer_types()
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString())
    return [np.asarray(output) for output in session.run(outputs, inputs)]


def _with_target(graph: Graph) -> str:
    graph.inputs["target"] = TensorType(np.dtype(np.int64), ("targets", "batch"))
    return "target"


def test_gradient_of_a_network_worked_by_hand() -> None:
    """y = (1, -2) . relu(W x + b) with W = [[1,2],[3,4]] row-wise by unit, b = (0, -20), x = (2, 3).

    The units are 2*1 + 3*3 = 11 and 2*2 + 3*4 - 20 = -4, so only the first one counts: dy/dx = 1 * (1, 3).
    """
    net = NetworkBuilder(("batch", 2))
    weight = net.constant(np.array([[1, 2], [3, 4]], np.float32))
    bias = net.constant(np.array([0, -20], np.float32))
    hidden = net.add("Relu", net.add("Gemm", net.input, weight, bias))
    readout = net.constant(np.array([[1, 5], [-2, 7]], np.float32))
    logits = net.add("MatMul", hidden, readout)
    graph = net.build(logits)
    value, gradient = target_gradients(graph, logits, _with_target(graph))
    result = backpropagate(graph, {value: gradient}, [net.input])[0]
    image, target = np.array([[2, 3]], np.float32), np.array([[0], [1]], np.int64)
    (found,) = _run(graph, [result], {"image": image, "target": target})
    np.testing.assert_array_equal(found[:, 0], [[1, 3], [5, 15]])


def test_a_value_read_several_times_collects_all_gradients() -> None:
    """y = x * x + 3 x through a skip connection: dy/dx = 2 x + 3."""
    net = NetworkBuilder(("batch", 2))
    square = net.add("Mul", net.input, net.input)
    tripled = net.add("Mul", net.input, net.constant(np.float32(3)))
    graph = net.build(net.add("Add", square, tripled, name="y"))
    graph.inputs["g"] = TensorType(np.dtype(np.float32), ("targets", "batch", 2))
    result = backpropagate(graph, {"y": "g"}, [net.input])[0]
    (found,) = _run(graph, [result], {"image": np.array([[2, -5]], np.float32), "g": np.ones((1, 1, 2), np.float32)})
    np.testing.assert_array_equal(found[0, 0], [7, -7])


def test_nodes_off_the_path_need_no_rule() -> None:
    net = NetworkBuilder(("batch", 2))
    net.add("Sin", net.input, name="unused")
    graph = net.build(net.add("Relu", net.input, name="y"), "unused")
    graph.inputs["g"] = TensorType(np.dtype(np.float32), ("targets", "batch", 2))
    assert backpropagate(graph, {"y": "g"}, [net.input])[0]


def test_an_op_without_rule_is_named_with_the_way_out() -> None:
    net = NetworkBuilder(("batch", 2))
    graph = net.build(net.add("Relu", net.add("Sin", net.input, name="wave"), name="y"))
    with pytest.raises(UnsupportedOpError, match=r"'Sin' \(node 'wave_node'.*fastcam\.defvjp") as caught:
        backpropagate(graph, {"y": "g"}, [net.input])[0]
    assert isinstance(caught.value, NotImplementedError)


def test_an_input_without_rule_is_named() -> None:
    net = NetworkBuilder((1, 2, 3, 3))
    kernel = net.add("Reshape", net.input, net.constant(np.array([2, 1, 3, 3])))
    graph = net.build(net.add("Conv", net.constant(np.ones((1, 1, 3, 3), np.float32)), kernel, name="y"))
    with pytest.raises(UnsupportedOpError, match="input 1"):
        backpropagate(graph, {"y": "g"}, [net.input])[0]


def test_a_foreign_domain_has_no_rule() -> None:
    net = NetworkBuilder(("batch", 2))
    graph = net.build(net.add("Relu", net.input, name="y"))
    graph.nodes[0].domain = "com.example"
    with pytest.raises(UnsupportedOpError, match="no gradient rule"):
        backpropagate(graph, {"y": "g"}, [net.input])[0]


def test_logits_that_do_not_depend_on_the_value() -> None:
    net = NetworkBuilder(("batch", 2))
    side = net.add("Relu", net.input, name="side")
    graph = net.build(net.add("Neg", net.input, name="y"), side)
    with pytest.raises(UnsupportedOpError, match="do not depend on value 'side'"):
        backpropagate(graph, {"y": "g"}, ["side"])[0]


def test_shapes_and_masks_carry_no_gradient() -> None:
    """y = (x > 0 ? 3 x : x) * width, the width read off the shape of x: dy/dx = 2 * (3, 1)."""
    net = NetworkBuilder(("batch", 2))
    mask = net.add("Greater", net.input, net.constant(np.float32(0)))
    bent = net.add("Where", mask, net.add("Mul", net.input, net.constant(np.float32(3))), net.input)
    width = net.add("Cast", net.add("Shape", net.add("Neg", net.input), start=1), to=TensorProto.FLOAT)
    graph = net.build(net.add("Mul", bent, width, name="y"))
    graph.inputs["g"] = TensorType(np.dtype(np.float32), ("targets", "batch", 2))
    result = backpropagate(graph, {"y": "g"}, [net.input])[0]
    (found,) = _run(graph, [result], {"image": np.array([[4, -5]], np.float32), "g": np.ones((1, 1, 2), np.float32)})
    np.testing.assert_array_equal(found[0, 0], [6, 2])


@pytest.mark.parametrize("ops", [("Shape",), ("Shape", "Cast")])
def test_a_value_whose_shape_alone_counts_has_no_gradient(ops: tuple[str, ...]) -> None:
    net = NetworkBuilder(("batch", 2))
    value = net.input
    for op in ops:
        attributes: dict[str, Any] = {"to": TensorProto.FLOAT} if op == "Cast" else {}
        value = net.add(op, value, **attributes)
    graph = net.build(net.add("Neg", value, name="y"))
    with pytest.raises(UnsupportedOpError, match="do not depend on value 'image'"):
        backpropagate(graph, {"y": "g"}, [net.input])[0]


def test_a_second_output_without_a_rule_is_named() -> None:
    net = NetworkBuilder(("batch", 2))
    scale = net.constant(np.ones(2, np.float32))
    net.graph.append(onnx.helper.make_node("LayerNormalization", [net.input, scale], ["normal", "mean"]))
    graph = net.build(net.add("Neg", "mean", name="y"))
    with pytest.raises(UnsupportedOpError, match=r"LayerNormalization.*output other than"):
        backpropagate(graph, {"y": "g"}, [net.input])[0]


def test_logits_without_a_dense_layer_start_from_one_hot_rows(rng: np.random.Generator) -> None:
    """A fully convolutional classifier: 1x1 Conv to the classes, then the mean over the map."""
    net = NetworkBuilder(("batch", 4, 3, 3))
    scores = net.add("Flatten", net.add("GlobalAveragePool", net.conv(net.input, (5, 4, 1, 1))))
    graph = net.build(scores)
    weight = graph.constants[graph.nodes[0].input[1]]
    value, gradient = target_gradients(graph, scores, _with_target(graph))
    assert value == scores
    pooled = pooled_gradients(graph, {value: gradient}, [net.input])[0][0]
    image = rng.normal(size=(2, 4, 3, 3)).astype(np.float32)
    (found,) = _run(graph, [pooled], {"image": image, "target": np.array([[0, 3], [4, 1]], np.int64)})
    for k, n, chosen in ((0, 0, 0), (0, 1, 3), (1, 0, 4), (1, 1, 1)):
        np.testing.assert_allclose(found[k, n], weight[chosen, :, 0, 0] / 9, rtol=1e-6)


def _flatten_then_dense(net: NetworkBuilder) -> str:
    flat = net.add("Flatten", net.add("MaxPool", net.input, kernel_shape=[2, 2], strides=[2, 2]))
    return net.dense(net.add("Relu", net.dense(flat, (36, 8))), (8, 5))


def _flatten_four_by_four(net: NetworkBuilder) -> str:
    pooled = net.add("AveragePool", net.input, kernel_shape=[3, 3])
    return net.dense(net.add("Relu", net.dense(net.add("Flatten", pooled), (64, 8))), (8, 5))


def _keras_flatten(net: NetworkBuilder) -> str:
    """Channels last before flattening, as in Keras."""
    pooled = net.add("MaxPool", net.input, kernel_shape=[2, 2], strides=[2, 2])
    rows = net.add("Reshape", net.add("Transpose", pooled, perm=[0, 2, 3, 1]), net.constant(np.array([0, 36])))
    return net.dense(net.add("Relu", net.dense(rows, (36, 8))), (8, 5))


def _transposed_weights(net: NetworkBuilder) -> str:
    hidden = net.add("Gemm", net.add("Flatten", net.input), net.weight(8, 144, scale=0.1), transB=1)
    return net.dense(net.add("Relu", hidden), (8, 5))


def _class_activation_mapping(net: NetworkBuilder) -> str:
    return net.dense(net.add("Flatten", net.add("GlobalAveragePool", net.input)), (4, 5))


def _mean_then_dense(net: NetworkBuilder) -> str:
    return net.dense(net.add("ReduceMean", net.input, net.constant(np.array([2, 3])), keepdims=0), (4, 5))


def _kept_mean(net: NetworkBuilder) -> str:
    mean = net.add("ReduceMean", net.input, net.constant(np.array([-1, -2])), keepdims=1)
    return net.dense(
        net.add("Relu", net.dense(net.add("Squeeze", mean, net.constant(np.array([2, 3]))), (4, 8))), (8, 5)
    )


def _channels_last_mean(net: NetworkBuilder) -> str:
    last = net.add("Transpose", net.input, perm=[0, 2, 3, 1])
    return net.dense(net.add("ReduceMean", last, net.constant(np.array([1, 2])), keepdims=0), (4, 5))


def _overlapping_padded_max(net: NetworkBuilder) -> str:
    pooled = net.add("MaxPool", net.input, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return net.dense(net.add("Relu", net.dense(net.add("Flatten", pooled), (36, 8))), (8, 5))


def _overlapping_average(net: NetworkBuilder) -> str:
    pooled = net.add("AveragePool", net.input, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    return net.dense(net.add("Relu", net.dense(net.add("Flatten", pooled), (144, 8))), (8, 5))


def _average_that_counts_padding(net: NetworkBuilder) -> str:
    pooled = net.add("AveragePool", net.input, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    return net.dense(net.add("Relu", net.dense(net.add("Flatten", pooled), (144, 8))), (8, 5))


def _global_max_then_dense(net: NetworkBuilder) -> str:
    return net.dense(net.add("Flatten", net.add("GlobalMaxPool", net.input)), (4, 5))


def _relu_stops_the_push(net: NetworkBuilder) -> str:
    return net.dense(net.add("Flatten", net.add("Relu", net.input)), (144, 5))


def _convolution_stops_the_push(net: NetworkBuilder) -> str:
    value = net.add("Relu", net.conv(net.input, (6, 4, 3, 3), pads=[1, 1, 1, 1]))
    return net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (6, 5))


def _skip_connection_stops_the_push(net: NetworkBuilder) -> str:
    value = net.add("Add", net.input, net.conv(net.input, (4, 4, 3, 3), pads=[1, 1, 1, 1]))
    return net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (4, 5))


def _dropout_and_identity(net: NetworkBuilder) -> str:
    value = net.add("Identity", net.add("Dropout", net.input))
    return net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (4, 5))


_HEADS: list[Callable[[NetworkBuilder], str]] = [
    _flatten_then_dense,
    _flatten_four_by_four,
    _keras_flatten,
    _transposed_weights,
    _class_activation_mapping,
    _mean_then_dense,
    _kept_mean,
    _channels_last_mean,
    _overlapping_padded_max,
    _overlapping_average,
    _average_that_counts_padding,
    _global_max_then_dense,
    _relu_stops_the_push,
    _convolution_stops_the_push,
    _skip_connection_stops_the_push,
    _dropout_and_identity,
]


def _pooled_and_full(head: Callable[[NetworkBuilder], str]) -> tuple[Array, Array]:
    net = NetworkBuilder(("batch", 4, 6, 6))
    logits = head(net)
    graph = net.build(logits)
    value, gradient = target_gradients(graph, logits, _with_target(graph))
    pooled = pooled_gradients(graph, {value: gradient}, [net.input])[0][0]
    full = backpropagate(graph, {value: gradient}, [net.input])[0]
    image = np.random.default_rng(3).normal(size=(2, 4, 6, 6)).astype(np.float32)
    outputs = _run(graph, [pooled, full], {"image": image, "target": np.array([[0, 3], [4, 1], [2, 2]], np.int64)})
    return outputs[0], outputs[1]


@pytest.mark.parametrize("head", _HEADS, ids=lambda head: head.__name__.strip("_"))
def test_pooled_gradient_is_the_mean_of_the_full_one(head: Callable[[NetworkBuilder], str]) -> None:
    pooled, full = _pooled_and_full(head)
    assert pooled.shape == (3, 2, 4)
    assert relative_error(pooled, full.astype(np.float64).mean(axis=(3, 4))) < 1e-5


def test_a_planted_wrong_push_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUSHES, "Relu", lambda graph, node, layout: layout)
    pooled, full = _pooled_and_full(_relu_stops_the_push)
    assert relative_error(pooled, full.astype(np.float64).mean(axis=(3, 4))) > 1e-2


def test_planted_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights summed over height and channels instead of height and width: the shapes fit where C equals w."""
    original = pooling._through_folded_weights

    def wrong(graph: Graph, value: str, layout: str, dense: onnx.NodeProto, pixels: int, gradient: str) -> str:
        swapped = layout.replace("C", "?").replace("W", "C").replace("?", "W")
        return original(graph, value, swapped, dense, pixels, gradient)

    monkeypatch.setattr(pooling, "_through_folded_weights", wrong)
    pooled, full = _pooled_and_full(_flatten_four_by_four)
    assert pooled.shape == full.shape[:3]
    assert relative_error(pooled, full.astype(np.float64).mean(axis=(3, 4))) > 1e-2


def test_vgg_head_reads_folded_weights_only() -> None:
    """The head's first dense layer has 72 rows; its folded twin has 8, and nothing transposes or copies the others."""
    graph = small_classifier()
    simplify(graph)
    remove_score_activation(graph)
    before = sum(array.size for array in graph.constants.values())
    value, gradient = target_gradients(graph, graph.outputs[0], _with_target(graph))
    pooled_gradients(graph, {value: gradient}, ["block2"])[0][0]
    added = sum(array.size for array in graph.constants.values()) - before
    assert added < 8 * 16 + 20
    assert not [node for node in graph.nodes if node.op_type in ("ConvTranspose", "ReduceSum")]
