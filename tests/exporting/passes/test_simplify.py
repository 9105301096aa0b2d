"""Rewrites that must not change what the network computes, and the expected ops after them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error

from fastcam.errors import ModelError
from fastcam.exporting.passes.simplify import simplify
from fastcam.graph import Graph


def _run(graph: Graph, image: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString(), options)
    return np.asarray(session.run(None, {"image": image})[0])


def _check(graph: Graph, rng: np.random.Generator, expected_ops: dict[str, int]) -> None:
    """Simplify, and compare outputs and ops."""
    shape = [3 if not isinstance(size, int) else size for size in graph.inputs["image"].shape]
    image = rng.normal(size=shape).astype(np.float32)
    before = _run(graph, image)
    simplify(graph)
    assert relative_error(_run(graph, image), before) < 1e-6
    assert Counter(node.op_type for node in graph.nodes) == expected_ops


def _affine(net: NetworkBuilder, value: str, channels: int) -> str:
    """Batch normalisation as converters write it: (x - mean) * scale + shift, in three nodes."""
    shape = (1, channels, 1, 1)
    value = net.add("Mul", value, net.constant(np.linspace(0.5, 2, channels, dtype=np.float32).reshape(shape)))
    return net.add("Add", net.constant(np.linspace(-1, 1, channels, dtype=np.float32).reshape(shape)), value)


def test_batch_normalisation_folds_into_the_convolution(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.conv(net.input, (4, 3, 3, 3))
    parameters = [net.constant(rng.uniform(0.5, 1.5, 4).astype(np.float32)) for _ in range(4)]
    graph = net.build(net.add("Relu", net.add("BatchNormalization", value, *parameters, epsilon=1e-3)))
    _check(graph, rng, {"Conv": 1, "Relu": 1})


def test_unfolded_normalisation_folds_into_a_convolution_without_bias(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.add("Conv", net.input, net.weight(4, 3, 3, 3))
    graph = net.build(net.add("Relu", _affine(net, value, 4)))
    _check(graph, rng, {"Conv": 1, "Relu": 1})


def test_a_depthwise_convolution_folds_too(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.add("Conv", net.input, net.weight(3, 1, 3, 3), group=3)
    graph = net.build(_affine(net, value, 3))
    _check(graph, rng, {"Conv": 1})


def test_a_convolution_with_two_readers_stays(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.conv(net.input, (4, 3, 1, 1))
    graph = net.build(net.add("Sub", _affine(net, value, 4), value))
    _check(graph, rng, {"Conv": 1, "BatchNormalization": 1, "Sub": 1})


def test_normalisation_before_a_block_becomes_one_node(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 8, 8))
    value = net.add("MaxPool", net.conv(net.input, (4, 3, 3, 3)), kernel_shape=[2, 2])
    graph = net.build(net.add("Relu", _affine(net, net.add("Relu", _affine(net, value, 4)), 4)))
    _check(graph, rng, {"Conv": 1, "MaxPool": 1, "BatchNormalization": 2, "Relu": 2})


@pytest.mark.parametrize("scale", [(1, 4, 1, 1), (4, 4), (1, 1, 1, 4)])
def test_scale_and_shift_of_what_may_be_no_channels_stay(scale: tuple[int, ...], rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 4, 4, 4))
    value = net.add("Mul", net.input, net.constant(rng.normal(size=scale).astype(np.float32)))
    graph = net.build(net.add("Add", value, net.constant(rng.normal(size=(1, 4, 1, 1)).astype(np.float32))))
    _check(graph, rng, {"Mul": 1, "Add": 1})


def test_a_scale_with_two_readers_stays(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    scaled = net.add("Mul", net.add("MaxPool", net.input, kernel_shape=[2, 2]), net.weight(1, 3, 1, 1))
    graph = net.build(net.add("Sub", net.add("Add", scaled, net.weight(1, 3, 1, 1)), scaled))
    _check(graph, rng, {"MaxPool": 1, "Mul": 1, "Add": 1, "Sub": 1})


def test_a_convolution_pads_with_zeros_itself(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 7))
    padded = net.add("Pad", net.input, net.constant(np.array([0, 0, 1, 2, 0, 0, 3, 0])))
    bare = net.conv(padded, (4, 3, 3, 3), auto_pad="VALID", strides=[2, 2])
    more = net.conv(padded, (4, 3, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2])
    graph = net.build(net.add("Concat", net.add("Flatten", bare), net.add("Flatten", more), axis=1))
    _check(graph, rng, {"Conv": 2, "Flatten": 2, "Concat": 1})


@pytest.mark.parametrize(
    ("pads", "value", "options"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.5, {}),
        ([0, 1, 1, 1, 0, 0, 1, 1], 0.0, {}),
        ([0, 0, 1, -1, 0, 0, 1, 1], 0.0, {}),
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.0, {"mode": "edge"}),
    ],
    ids=["no zeros", "channels", "crop", "edge"],
)
def test_other_padding_stays(pads: list[int], value: float, options: dict[str, str], rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    padded = net.add("Pad", net.input, net.constant(np.array(pads)), net.constant(np.float32(value)), **options)
    graph = net.build(net.conv(padded, (4, 3 + pads[1], 3, 3)))
    _check(graph, rng, {"Pad": 1, "Conv": 1})


def test_padding_before_a_convolution_that_pads_by_a_rule_stays(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    padded = net.add("Pad", net.input, net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    graph = net.build(net.conv(padded, (4, 3, 3, 3), auto_pad="SAME_UPPER"))
    _check(graph, rng, {"Pad": 1, "Conv": 1})


def test_a_factor_per_pixel_does_not_fold(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 4, 4))
    value = net.conv(net.input, (4, 3, 1, 1))
    graph = net.build(net.add("Mul", value, net.constant(rng.normal(size=(4, 4)).astype(np.float32))))
    _check(graph, rng, {"Conv": 1, "Mul": 1})


def test_a_kept_value_is_still_computed(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    value = net.conv(net.input, (4, 3, 3, 3), name="before_normalisation")
    graph = net.build(net.add("Relu", _affine(net, value, 4)))
    image = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    before = _run(graph, image)
    simplify(graph, keep=["before_normalisation"])
    assert graph.producer("before_normalisation") is not None
    assert relative_error(_run(graph, image), before) < 1e-6


def test_arithmetic_on_weights_is_folded(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 6, 6))
    kernel = net.add("Transpose", net.weight(3, 3, 3, 4), perm=[3, 2, 0, 1])
    variance = net.add("Sqrt", net.constant(np.float32(4)))
    kernel = net.add("Mul", kernel, net.add("Reciprocal", variance))
    graph = net.build(net.add("Conv", net.input, kernel))
    _check(graph, rng, {"Conv": 1})


def test_weights_of_a_random_op_are_not_frozen() -> None:
    net = NetworkBuilder(("batch", 3))
    noise = net.add("RandomNormalLike", net.constant(np.zeros(3, np.float32)))
    graph = net.build(net.add("Add", net.input, noise))
    simplify(graph)
    assert [node.op_type for node in graph.nodes] == ["RandomNormalLike", "Add"]


def test_constants_that_cannot_be_evaluated_name_the_node() -> None:
    net = NetworkBuilder(("batch", 3))
    left, right = (net.constant(np.ones(size, np.float32)) for size in (2, 3))
    broken = net.add("Add", left, right, name="broken")
    graph = net.graph
    graph.outputs = [net.add("Mul", net.input, broken)]
    with pytest.raises(ModelError, match=r"'broken_node' \(Add\)"):
        simplify(graph)


def _keras_flatten(net: NetworkBuilder, value: str) -> str:
    """Keras' Flatten as the converter writes it."""
    shape = net.add("Cast", net.add("Shape", value), to=6)
    one = net.constant(np.array([1]))
    batch = net.add("Slice", shape, net.constant(np.array([0])), one, net.constant(np.array([0])))
    target = net.add("Concat", batch, net.constant(np.array([48], np.int32)), axis=0)
    return net.add("Reshape", value, net.add("Cast", target, to=7))


def test_shape_arithmetic_becomes_one_constant(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 4, 4))
    graph = net.build(_keras_flatten(net, net.add("Relu", net.input)))
    _check(graph, rng, {"Relu": 1, "Reshape": 1})
    assert graph.shape(graph.outputs[0]) == ("batch", 48)


def test_a_reshape_that_merges_the_batch_keeps_it_open(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 4))
    rows = net.add("Concat", net.constant(np.array([-1])), net.constant(np.array([4])), axis=0)
    graph = net.build(net.add("Reshape", net.input, rows))
    _check(graph, rng, {"Reshape": 1})
    assert graph.shape(graph.outputs[0])[1] == 4


def test_no_ops_disappear(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3))
    value = net.add("Identity", net.add("Dropout", net.add("Cast", net.input, to=1)))
    graph = net.build(net.add("Identity", net.add("Relu", value), name="scores"))
    _check(graph, rng, {"Relu": 1, "Identity": 1})


def test_dropout_in_training_mode_stays() -> None:
    net = NetworkBuilder(("batch", 3))
    graph = net.build(
        net.add("Relu", net.add("Dropout", net.input, net.constant(np.float32(0.5)), net.constant(np.array(True))))
    )
    simplify(graph)
    assert [node.op_type for node in graph.nodes] == ["Dropout", "Relu"]


def test_a_dense_layer_becomes_one_gemm(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 6))
    product = net.add("MatMul", net.input, net.weight(6, 4))
    graph = net.build(net.add("Add", product, net.constant(np.arange(4, dtype=np.float32))))
    _check(graph, rng, {"Gemm": 1})


def test_matrix_products_that_are_no_dense_layer_stay(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 5, 6))
    product = net.add("MatMul", net.input, net.weight(6, 4))
    graph = net.build(net.add("Add", product, net.constant(np.arange(4, dtype=np.float32))))
    _check(graph, rng, {"MatMul": 1, "Add": 1})


def test_a_bias_that_is_a_matrix_does_not_become_gemm(rng: np.random.Generator) -> None:
    net = NetworkBuilder((3, 6))
    product = net.add("MatMul", net.input, net.weight(6, 4))
    graph = net.build(net.add("Add", product, net.constant(rng.normal(size=(3, 4)).astype(np.float32))))
    _check(graph, rng, {"MatMul": 1, "Add": 1})


def _channels_last_conv(net: NetworkBuilder, value: str, filters: tuple[int, int, int, int]) -> str:
    """A convolution as converters write TensorFlow's: a Transpose on either side."""
    first = net.add("Transpose", value, perm=[0, 3, 1, 2])
    return net.add("Transpose", net.conv(first, filters), perm=[0, 2, 3, 1])


def test_channels_last_arithmetic_is_done_in_the_order_of_the_convolutions(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 9, 8, 3))
    value = _channels_last_conv(net, net.input, (4, 3, 3, 3))
    value = net.add("Mul", value, net.constant(rng.normal(size=4).astype(np.float32)))
    value = net.add("Add", net.constant(rng.normal(size=(1, 1, 1, 4)).astype(np.float32)), value)
    value = net.add("Clip", value, net.constant(np.float32(0)), net.constant(np.float32(6)), name="activation")
    value = net.add("Pad", value, net.constant(np.array([0, 1, 0, 0, 0, 2, 3, 0])), mode="reflect")
    value = _channels_last_conv(net, value, (5, 4, 3, 3))
    mean = net.add("ReduceMean", value, net.constant(np.array([1, 2])), keepdims=0)
    graph = net.build(net.dense(mean, (5, 2)))
    _check(graph, rng, {"Transpose": 1, "Conv": 2, "Clip": 1, "Pad": 1, "ReduceMean": 1, "Gemm": 1})
    assert graph.shape("activation") == ("batch", 4, 7, 6)


def test_a_crop_sinks(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 9, 8, 3))
    value = _channels_last_conv(net, net.input, (4, 3, 1, 1))
    bounds = [net.constant(np.array(items)) for items in ([0, 1, 2], [2**31, 2**31, -1], [0, -3, 2], [1, 2, 1])]
    value = _channels_last_conv(net, net.add("Slice", value, *bounds), (2, 4, 3, 1))
    graph = net.build(net.dense(net.add("ReduceMean", value, net.constant(np.array([1, 2])), keepdims=0), (2, 2)))
    _check(graph, rng, {"Transpose": 1, "Conv": 2, "Slice": 1, "ReduceMean": 1, "Gemm": 1})


def test_a_reshape_of_single_pixels_needs_no_transpose(rng: np.random.Generator) -> None:
    """Squeeze-and-excitation by convolutions: (N,1,1,C) is reshaped to (N,C,1,1)."""
    net = NetworkBuilder(("batch", 6, 6, 3))
    value = _channels_last_conv(net, net.input, (4, 3, 1, 1))
    pixel = net.add("ReduceMean", value, net.constant(np.array([1, 2])), keepdims=1)
    pixel = net.add("Reshape", pixel, net.constant(np.array([-1, 4, 1, 1])))
    gate = net.add("Transpose", net.conv(pixel, (4, 4, 1, 1)), perm=[0, 2, 3, 1])
    value = net.add("Mul", value, gate)
    graph = net.build(net.dense(net.add("ReduceMean", value, net.constant(np.array([1, 2])), keepdims=0), (4, 2)))
    _check(graph, rng, {"Transpose": 1, "Conv": 2, "Mul": 1, "ReduceMean": 2, "Gemm": 1})


def test_a_reshape_of_a_map_keeps_its_transpose(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 6, 6, 3))
    value = _channels_last_conv(net, net.input, (4, 3, 1, 1))
    value = net.add("ReduceMean", value, net.constant(np.array([1])), keepdims=1)
    graph = net.build(net.dense(net.add("Reshape", value, net.constant(np.array([-1, 24]))), (24, 2)))
    _check(graph, rng, {"Transpose": 2, "Conv": 1, "ReduceMean": 1, "Reshape": 1, "Gemm": 1})


def test_gates_branches_and_skip_connections_sink(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 6, 6, 3))
    value = _channels_last_conv(net, net.input, (4, 3, 1, 1))
    gate = net.add("Sigmoid", net.add("ReduceMean", value, net.constant(np.array([-3, -2])), keepdims=1))
    value = net.add("Add", net.add("Mul", value, gate), value)
    other = _channels_last_conv(net, value, (2, 4, 1, 1))
    both = net.add("Concat", value, other, axis=3)
    top = net.add("ReduceMax", both, net.constant(np.array([1, 2])), keepdims=0)
    graph = net.build(net.dense(top, (6, 2)))
    ops = ["Transpose", "ReduceMean", "Sigmoid", "Mul", "Add", "Concat", "ReduceMax", "Gemm"]
    _check(graph, rng, {**dict.fromkeys(ops, 1), "Conv": 2})


def test_an_output_keeps_its_order_of_axes(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 6, 6, 3))
    graph = net.build(net.add("Relu", _channels_last_conv(net, net.input, (4, 3, 1, 1))))
    _check(graph, rng, {"Transpose": 2, "Conv": 1, "Relu": 1})
    assert graph.shape(graph.outputs[0]) == ("batch", 6, 6, 4)


def test_what_cannot_sink_stays_where_it_is(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 4, 4, 3))
    turned = net.add("Transpose", net.input, perm=[0, 2, 1, 3])
    last = net.add("Transpose", net.input, perm=[0, 1, 2, 3])
    mixed = net.add("Add", turned, net.add("Relu", last))
    both = net.add("Concat", mixed, net.add("Neg", net.input), axis=3)
    joined = net.add(
        "Add", net.add("Transpose", both, perm=[0, 3, 1, 2]), net.add("Transpose", both, perm=[0, 3, 2, 1])
    )
    mean = net.add("ReduceMean", joined, keepdims=1)
    graph = net.build(net.add("Sub", joined, mean))
    _check(graph, rng, {"Transpose": 3, "Relu": 1, "Neg": 1, "Concat": 1, "Add": 2, "ReduceMean": 1, "Sub": 1})


def test_a_reshape_that_reads_zero_literally(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 4, 4))
    value = net.add("Reshape", net.input, net.constant(np.array([-1, 48])), allowzero=1)
    graph = net.build(net.dense(value, (48, 2)))
    _check(graph, rng, {"Reshape": 1, "Gemm": 1})


def test_reshapes_from_and_to_a_scalar(rng: np.random.Generator) -> None:
    net = NetworkBuilder((3, 4))
    scalar = net.add("ReduceMean", net.input, net.constant(np.array([0, 1])), keepdims=0)
    matrix = net.add("Reshape", scalar, net.constant(np.array([1, 1])))
    graph = net.build(net.add("Add", net.input, matrix))
    _check(graph, rng, {"ReduceMean": 1, "Reshape": 1, "Add": 1})


def test_a_transpose_that_reverses_by_default(rng: np.random.Generator) -> None:
    net = NetworkBuilder((3, 4))
    turned = net.add("Relu", net.add("Transpose", net.input, perm=[1, 0]))
    graph = net.build(net.add("Neg", net.add("Tanh", net.add("Transpose", turned))))
    _check(graph, rng, {"Relu": 1, "Tanh": 1, "Neg": 1})


def test_a_gate_in_the_channels_last_order_sinks(rng: np.random.Generator) -> None:
    """Squeeze-and-excitation (Hu et al. 2018) as Keras writes it."""
    net = NetworkBuilder(("batch", 6, 6, 3))
    value = _channels_last_conv(net, net.input, (4, 3, 1, 1))
    mean = net.add("ReduceMean", value, net.constant(np.array([1, 2])), keepdims=0)
    gate = net.add("Sigmoid", net.dense(mean, (4, 4)))
    gated = net.add("Mul", value, net.add("Reshape", gate, net.constant(np.array([-1, 1, 1, 4]))), name="gated")
    graph = net.build(net.dense(net.add("ReduceMean", gated, net.constant(np.array([1, 2])), keepdims=0), (4, 2)))
    _check(graph, rng, {"Transpose": 1, "Conv": 1, "ReduceMean": 2, "Gemm": 2, "Sigmoid": 1, "Reshape": 1, "Mul": 1})
    assert graph.shape("gated") == ("batch", 4, 6, 6)


def test_a_constant_larger_than_any_network_is_refused() -> None:
    net = NetworkBuilder(("batch", 3))
    size = net.constant(np.array([2**20, 2**20]))
    graph = net.build(net.add("Add", net.input, net.add("ReduceMax", net.add("ConstantOfShape", size))))
    with pytest.raises(ModelError, match="constant of 4398046511104 bytes"):
        simplify(graph)


def test_results_that_are_no_arrays_are_left_alone() -> None:
    net = NetworkBuilder(("batch", 3))
    parts = net.add("SequenceConstruct", net.constant(np.ones(3, np.float32)), net.constant(np.ones(3, np.float32)))
    joined = net.add("ConcatFromSequence", parts, axis=0)
    graph = net.build(net.add("Add", net.input, net.add("ReduceMax", joined)))
    simplify(graph)
    assert "SequenceConstruct" in {node.op_type for node in graph.nodes}


def test_a_folded_scalar_stays_a_scalar() -> None:
    """As a scalar index it drops an axis, which an index of shape (1,) would keep."""
    net = NetworkBuilder(("batch", 3))
    index = net.add("Neg", net.constant(np.array(-1)))
    graph = net.build(net.add("Gather", net.input, index, axis=1, name="y"))
    simplify(graph)
    assert [node.op_type for node in graph.nodes] == ["Gather"]
    assert graph.shape("y") == ("batch",)


def _viewed(front: str, tail: list[int], end: int = 1) -> Graph:
    """x.view(..., tail): the first size as exporters compute it, or a different one."""
    net = NetworkBuilder(("batch", 6, 2, 4))
    source = net.add("Relu", net.input)
    if front == "slice":
        first = net.add("Shape", source, start=0, end=end)
    elif front == "gather":
        whole = net.add("Shape", source)
        first = net.add("Unsqueeze", net.add("Gather", whole, net.constant(np.array(0))), net.constant([0]))
    else:
        whole = net.add("Shape", source)
        first = net.add("Reshape", net.add("Gather", whole, net.constant(np.array(1))), net.constant([-1]))
    target = net.add("Concat", first, net.constant(tail[:1]), net.constant(tail[1:]), axis=0)
    return net.build(net.add("Abs", net.add("Reshape", source, target, name="viewed")))


@pytest.mark.parametrize("front", ["slice", "gather"])
@pytest.mark.parametrize(("tail", "sizes"), [([3, -1], [0, 3, 16]), ([6, 8], [0, 6, 8]), ([-1, 2, 2], [0, 12, 2, 2])])
def test_a_view_behind_the_batch_needs_no_arithmetic(front: str, tail: list[int], sizes: list[int]) -> None:
    graph = _viewed(front, tail)
    simplify(graph)
    assert [node.op_type for node in graph.nodes] == ["Relu", "Reshape", "Abs"]
    assert graph.constants[graph.nodes[1].input[1]].tolist() == sizes
    assert graph.shape("viewed") == ("batch", *sizes[1:])


def test_a_view_behind_another_size_is_left() -> None:
    graph = _viewed("channels", [2, -1])
    simplify(graph)
    assert graph.shape("viewed")[0] != "batch"


def _with_a_class_token(net: NetworkBuilder) -> str:
    """Tokens (N,3,4) behind one for the class, then split into heads: sizes as torch's exporter computes them."""
    whole = net.add("Shape", net.input, start=0, end=1)
    count = net.add("Reshape", net.add("Squeeze", whole), net.constant([-1]))
    token = net.add("Expand", net.constant(np.ones((1, 1, 4), np.float32)), _joined(net, count, 1, 4))
    tokens = net.add("Concat", token, net.input, axis=1)
    return net.add("Reshape", tokens, _joined(net, count, 4, -1, 2), name="heads")


def _joined(net: NetworkBuilder, count: str, *sizes: int) -> str:
    return net.add("Concat", count, net.constant(list(sizes)), axis=0)


def test_the_batch_size_is_followed_through_a_scalar(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 4))
    graph = net.build(net.add("Abs", _with_a_class_token(net)))
    before = _run(graph, image := rng.normal(size=(3, 3, 4)).astype(np.float32))
    simplify(graph)
    assert graph.shape("heads") == ("batch", 4, 2, 2)
    np.testing.assert_array_equal(_run(graph, image), before)


def _strided(net: NetworkBuilder, offsets: Array, step: int, *, first: int = 0) -> str:
    """as_strided of (N,2,3), as torch's exporter writes it: positions step * i + offsets in the flattened tensor."""
    count = net.add("Squeeze", net.add("Shape", net.input, start=first, end=first + 1))
    numbers = net.add("Range", net.constant(np.array(0)), count, net.constant(np.array(1)))
    rows = net.add("Unsqueeze", net.add("Mul", numbers, net.constant(np.array(step))), net.constant([1, 2]))
    positions = net.add("Add", rows, net.constant(offsets[None]))
    return net.add("Gather", net.add("Reshape", net.input, net.constant([-1])), positions, axis=0)


_ORDERS = {"same": [[0, 1], [2, 3], [4, 5]], "channels last": [[0, 3], [1, 4], [2, 5]], "repeated": [[0, 0], [5, 1]]}


@pytest.mark.parametrize("order", _ORDERS)
def test_a_copy_with_strides_is_a_reshape(order: str, rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 2, 3))
    graph = net.build(net.add("Abs", _strided(net, np.array(_ORDERS[order]), 6)))
    expected = {"Reshape": 1} if order == "same" else {"Reshape": 2, "Gather": 1}
    _check(graph, rng, {**expected, "Abs": 1})


@pytest.mark.parametrize(("step", "first", "highest"), [(3, 0, 5), (6, 1, 5), (6, 0, 6)])
def test_other_computed_positions_stay(step: int, first: int, highest: int) -> None:
    """Rows that overlap, as many rows as there are channels, and an image that reads the next one."""
    net = NetworkBuilder(("batch", 2, 3))
    offsets = np.array([[0, 1, 2], [3, 4, highest]])
    graph = net.build(net.add("Abs", _strided(net, offsets, step, first=first)))
    simplify(graph)
    assert "Gather" in {node.op_type for node in graph.nodes}
    gather = next(node for node in graph.nodes if node.op_type == "Gather")
    assert gather.input[1] not in graph.constants or first == 1


def test_a_transpose_of_merged_axes_is_one_transpose(rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 2, 3, 5))
    merged = net.add("Reshape", net.input, net.constant([-1, 3, 5]))
    turned = net.add("Transpose", merged, perm=[0, 2, 1])
    _check(
        net.build(net.add("Abs", net.add("Reshape", turned, net.constant([-1, 2, 5, 3])))),
        rng,
        {"Transpose": 1, "Abs": 1},
    )


@pytest.mark.parametrize("split", [[-1, 6, 5], [-1, 2, 3, 5], [-1, 3, 5, 2], [-1, 2, 15]])
def test_other_splits_stay(split: list[int], rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 2, 3, 5))
    merged = net.add("Reshape", net.input, net.constant([-1, 3, 5]))
    turned = net.add("Transpose", merged, perm=[0, 2, 1])
    _check(
        net.build(net.add("Abs", net.add("Reshape", turned, net.constant(split)))),
        rng,
        {"Reshape": 2, "Transpose": 1, "Abs": 1},
    )


@pytest.mark.parametrize(
    ("op", "numbers"), [("Gather", [[2, -1]]), ("Slice", [[-2], [9]]), ("Slice", [[2], [4], [0], [1]])]
)
def test_sizes_that_are_chosen_from_a_shape_are_constants(
    op: str, numbers: list[list[int]], rng: np.random.Generator
) -> None:
    net = NetworkBuilder(("batch", 2, 4, 5))
    chosen = net.add(op, net.add("Shape", net.input), *map(net.constant, numbers))
    count = net.add("Cast", net.add("ReduceProd", chosen, keepdims=0), to=1)
    graph = net.build(net.add("Div", net.input, count))
    _check(graph, rng, {"Div": 1})
    assert 20 in [array.item() for array in graph.constants.values() if array.size == 1]


@pytest.mark.parametrize("places", [[0, 2], [0]])
def test_an_open_size_that_is_chosen_stays(places: list[int], rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 2, 4, 5))
    chosen = net.add("Gather", net.add("Shape", net.input), net.constant(places))
    count = net.add("Cast", net.add("ReduceProd", chosen, keepdims=0), to=1)
    _check(
        net.build(net.add("Div", net.input, count)),
        rng,
        {"Shape": 1, "Gather": 1, "ReduceProd": 1, "Cast": 1, "Div": 1},
    )
