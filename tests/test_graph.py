"""Reading models into graphs, renaming, pruning, shapes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import NetworkBuilder, relative_error, small_classifier
from onnx import helper, numpy_helper

from fastcam.errors import ModelError, UnsupportedOpError
from fastcam.graph import Graph, attribute, from_model, needed_nodes, static_dims


def test_a_model_comes_back_as_it_went_in(rng: np.random.Generator) -> None:
    graph = small_classifier()
    image = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    again = from_model(graph.to_model())
    first, second = (
        onnxruntime.InferenceSession(item.to_model().SerializeToString()).run(None, {"image": image})[0]
        for item in (graph, again)
    )
    np.testing.assert_array_equal(first, second)
    assert again.shape("block2") == ("batch", 8, 6, 6)
    assert again.inputs["image"].shape == ("batch", 3, 12, 12)


def test_constant_nodes_become_constants() -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value=numpy_helper.from_array(np.array([1.5, 2], np.float32))),
        helper.make_node("Constant", [], ["b"], value_float=3.0),
        helper.make_node("Constant", [], ["c"], value_ints=[4, 5]),
        helper.make_node("Constant", [], ["d"], value_int=6),
        helper.make_node("Constant", [], ["e"], value_floats=[7.0]),
        helper.make_node("Add", ["x", "a"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = from_model(
        helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)])
    )
    expected = {"a": [1.5, 2], "b": 3, "c": [4, 5], "d": 6, "e": [7]}
    assert {name: array.tolist() for name, array in graph.constants.items()} == expected
    assert [node.op_type for node in graph.nodes] == ["Add"]


def test_text_constants_are_refused() -> None:
    node = helper.make_node("Constant", [], ["a"], value_string="text")
    use = helper.make_node("Identity", ["a"], ["y"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [])
    with pytest.raises(ModelError, match="value_string"):
        from_model(helper.make_model(helper.make_graph([node, use], "g", [], [y])))


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no nodes"):
        from_model(onnx.ModelProto())


def test_weights_that_cannot_be_read_are_refused() -> None:
    model = small_classifier().to_model()
    model.graph.initializer[0].raw_data = b"abc"
    with pytest.raises(ModelError, match="weights cannot be read"):
        from_model(model)


def test_a_node_that_breaks_onnxs_rules_is_named() -> None:
    model = small_classifier().to_model()
    del model.graph.node[0].input[1:]
    with pytest.raises(ModelError, match=r"\(Conv\) is not valid ONNX"):
        from_model(model)


def test_a_value_that_nothing_makes_is_named() -> None:
    model = small_classifier().to_model()
    model.graph.node[1].input[0] = "ghost"
    with pytest.raises(ModelError, match=r"\(Relu\) reads \['ghost'\], which nothing computes"):
        from_model(model)
    model = small_classifier().to_model()
    model.graph.output[0].name = "ghost"
    with pytest.raises(ModelError, match="nothing computes the outputs"):
        from_model(model)


def test_what_shape_inference_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("contradiction")

    monkeypatch.setattr("onnx.shape_inference.infer_shapes", refuse)
    with pytest.raises(ModelError, match="shape inference rejected the model: contradiction"):
        small_classifier()


def test_control_flow_and_sparse_weights_are_refused() -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "branch", [], [])
    branch.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [2]))
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    c = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    with pytest.raises(ModelError, match=r"'choice' \(If\) contains a subgraph"):
        from_model(helper.make_model(helper.make_graph([node], "g", [x, c], [y])))
    model = small_classifier().to_model()
    model.graph.sparse_initializer.add()
    with pytest.raises(ModelError, match="sparse weights"):
        from_model(model)


def test_sizes_below_one_count_as_open() -> None:
    model = small_classifier().to_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert from_model(model).inputs["image"].shape[0] is None


def test_other_operator_sets_are_kept() -> None:
    model = small_classifier().to_model()
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    graph = from_model(model)
    assert graph.domains == {"com.example": 3}
    assert {item.domain: item.version for item in graph.to_model().opset_import} == {"": 18, "com.example": 3}


def test_a_sequence_input_is_refused() -> None:
    info = helper.make_tensor_sequence_value_info("x", onnx.TensorProto.FLOAT, None)
    node = helper.make_node("SequenceLength", ["x"], ["y"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [])
    with pytest.raises(ModelError, match="'x' is not a tensor"):
        from_model(helper.make_model(helper.make_graph([node], "g", [info], [y])))


def test_a_scalar_stays_a_scalar() -> None:
    """Gather by a scalar drops the axis; an index of shape (1,) would keep it."""
    net = NetworkBuilder((2, 3))
    graph = net.build(net.add("Gather", net.input, net.constant(np.array(1)), axis=1, name="y"))
    assert graph.to_model().graph.initializer[0].dims == []
    assert from_model(graph.to_model()).shape("y") == (2,)


def test_group_normalisation_keeps_the_shape() -> None:
    net = NetworkBuilder(("batch", 4, 3, 3))
    weights = [net.constant(np.ones(2, np.float32)) for _ in range(2)]
    graph = net.build(net.add("Relu", net.add("GroupNormalization", net.input, *weights, num_groups=2), name="y"))
    assert graph.shape("y") == ("batch", 4, 3, 3)


def test_renaming_reaches_every_use() -> None:
    graph = small_classifier()
    graph.rename("block2", "explained")
    graph.infer_types()
    assert graph.shape("explained") == ("batch", 8, 6, 6)
    assert "block2" not in {name for node in graph.nodes for name in (*node.input, *node.output)}
    graph.rename("image", "pixels")
    assert list(graph.inputs) == ["pixels"]
    assert graph.nodes[0].input[0] == "pixels"


def test_pruning_drops_what_no_output_needs() -> None:
    net = NetworkBuilder(("batch", 2))
    unused = net.add("Mul", net.input, net.constant(np.float32(2), "unused_weight"))
    net.add("Relu", unused)
    graph = net.build(net.add("Neg", net.input, name="y"))
    graph.prune()
    assert [node.op_type for node in graph.nodes] == ["Neg"]
    assert not graph.constants


def test_order_depends_on_the_outputs_alone() -> None:
    graph = small_classifier()
    graph.prune()
    order = [node.output[0] for node in graph.nodes]
    graph = graph.copy(nodes=graph.nodes[::-1])
    graph.prune()
    assert [node.output[0] for node in graph.nodes] == order
    assert [node.output[0] for node in needed_nodes(graph, graph.outputs)] == order


def test_equal_small_constants_are_shared_and_different_ones_are_not() -> None:
    graph = small_classifier()
    one = graph.emit_constant(np.array([1, 2]))
    assert graph.emit_constant(np.array([1, 2])) == one
    assert graph.emit_constant(np.array([1, 3])) != one
    assert graph.emit_constant(np.array([1.0, 2.0])) != one


def test_a_constant_that_a_pass_replaced_is_not_shared() -> None:
    graph = small_classifier()
    third = graph.emit_constant(np.float32(1 / 3))
    graph.constants[third] = np.asarray(np.float16(1 / 3), np.float32)
    again = graph.emit_constant(np.float32(1 / 3))
    assert graph.constants[again] == np.float32(1 / 3)


def test_names_do_not_collide() -> None:
    graph = small_classifier()
    assert graph.unused_name("block1") == "block1_1"
    assert graph.emit("Relu", "block1", stem="block1") == "block1_2"
    assert graph.unused_name("block1") == "block1_3"


def test_an_unknown_shape_says_what_to_do() -> None:
    graph = small_classifier()
    with pytest.raises(ModelError, match=r"'nothing' is unknown.*fixed height and width"):
        graph.shape("nothing")
    assert graph.rank("nothing") is None


def test_an_open_dimension_where_a_number_is_needed() -> None:
    graph = small_classifier()
    assert static_dims(graph, "block2", (1, 2)) == (8, 6)
    with pytest.raises(UnsupportedOpError, match=r"'block2' has shape \('batch', 8, 6, 6\)"):
        static_dims(graph, "block2", (0, 1))


def test_attributes_are_read_with_defaults_and_as_text() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", group=2)
    assert attribute(node, "auto_pad") == "SAME_UPPER"
    assert attribute(node, "group", 1) == 2
    assert attribute(node, "strides", [1, 1]) == [1, 1]


def test_large_weights_are_not_copied_for_inference() -> None:
    graph = small_classifier()
    weight = next(array for array in graph.constants.values() if array.size > 1000)
    graph.infer_types()
    assert any(array is weight for array in graph.constants.values())
    assert relative_error(weight, weight) == 0


def test_a_graph_that_feeds_itself_is_refused() -> None:
    net = NetworkBuilder(("batch", 2))
    net.add("Add", net.input, "second", name="first")
    net.add("Relu", "first", name="second")
    net.graph.outputs = ["second"]
    with pytest.raises(ModelError, match="cycle through node"):
        net.graph.prune()


def _assert_indices_are_right(graph: Graph) -> None:
    """Compare producer and readers of each value with a search through all nodes."""
    names = {name for node in graph.nodes for name in (*node.input, *node.output) if name}
    for name in names:
        makers = [node for node in graph.nodes if name in node.output]
        assert graph.producer(name) is (makers[-1] if makers else None)
        readers = {id(node) for node in graph.nodes if name in node.input}
        assert {id(node) for node in graph.readers(name)} == readers
    assert {name for name in graph.producers() if name not in names} == set()
    assert all(graph.unused_name(name) != name for name in names)


def _edit(graph: Graph, rng: np.random.Generator) -> None:
    """Do one edit of any kind, at any place."""
    nodes = graph.nodes
    node = nodes[rng.integers(len(nodes))]
    value = nodes[rng.integers(len(nodes))].output[0]
    kind = rng.integers(9)
    if kind == 0:
        graph.set_input(node, int(rng.integers(len(node.input))), value)
    elif kind == 1:
        graph.set_inputs(node, [value, *node.input][: max(1, len(node.input))])
    elif kind == 2:
        graph.insert_after(node, helper.make_node("Relu", [value], [graph.unused_name("new")]))
    elif kind == 3:
        graph.insert_before(node, helper.make_node("Relu", [value], [graph.unused_name("new")]))
    elif kind == 4:
        graph.rename(value, graph.unused_name("renamed"))
    elif kind == 5:
        graph.replace_uses(value, node.output[0], outputs=bool(rng.integers(2)))
    elif kind == 6:
        graph.rewrite(node, "Sum", [value, value])
    elif kind == 7:
        graph.rename_all({value: node.output[0], node.output[0]: value} if value != node.output[0] else {})
    elif len(nodes) > 4:
        graph.remove(node)


@pytest.mark.parametrize("seed", range(5))
def test_indices_follow_every_edit(seed: int) -> None:
    graph, rng = small_classifier(), np.random.default_rng(seed)
    for _ in range(60):
        _edit(graph, rng)
        _assert_indices_are_right(graph)


def test_two_values_swap_their_names() -> None:
    net = NetworkBuilder(("batch", 2))
    first, second = net.add("Neg", net.input, name="first"), net.add("Abs", net.input, name="second")
    graph = net.build(net.add("Sub", first, second, name="y"), "first")
    graph.rename_all({"first": "second", "second": "first"})
    assert [node.op_type for node in graph.nodes if node.output[0] == "first"] == ["Abs"]
    assert list(graph.nodes[-1].input) == ["second", "first"]
    assert graph.outputs == ["y", "second"]
    _assert_indices_are_right(graph)


def test_a_node_is_replaced_in_its_place() -> None:
    net = NetworkBuilder(("batch", 2))
    middle = net.add("Neg", net.input, name="middle")
    graph = net.build(net.add("Abs", middle, name="y"))
    before = graph.nodes[0]
    graph.replace(
        before, helper.make_node("Relu", ["image"], ["inner"]), helper.make_node("Exp", ["inner"], ["middle"])
    )
    assert [node.op_type for node in graph.nodes] == ["Relu", "Exp", "Abs"]
    assert not graph.holds(before)
    _assert_indices_are_right(graph)
    graph.check()


def test_a_copy_has_nodes_of_its_own() -> None:
    graph = small_classifier()
    copy = graph.copy()
    copy.rename("block2", "other")
    assert graph.producer("block2") is not None
    assert copy.producer("block2") is None
    _assert_indices_are_right(graph)
    _assert_indices_are_right(copy)


def test_attributes_are_set_replaced_and_removed() -> None:
    graph = small_classifier()
    pool = next(node for node in graph.nodes if node.op_type == "MaxPool")
    graph.set_attributes(pool, strides=[1, 1], kernel_shape=None, ceil_mode=1)
    assert (attribute(pool, "strides"), attribute(pool, "kernel_shape"), attribute(pool, "ceil_mode")) == (
        [1, 1],
        None,
        1,
    )


def test_a_freed_name_lies_between_what_is_made_and_what_is_read() -> None:
    graph = small_classifier()
    readers = [node.op_type for node in graph.readers("block2")]
    producer = graph.detach("block2", made="inside", read="outside")
    assert list(producer.output) == ["inside"]
    assert graph.producer("block2") is None
    assert [node.op_type for node in graph.readers("outside")] == readers
    _assert_indices_are_right(graph)


def test_a_node_cannot_be_added_twice() -> None:
    graph = small_classifier()
    with pytest.raises(ValueError, match="already part of the graph"):
        graph.append(graph.nodes[0])
