"""Constant folding: what it runs, and what it refuses to run beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.reference
import pytest
from networks import NetworkBuilder
from onnx import helper

from fastcam.errors import ModelError
from fastcam.exporting.passes.constants import FoldingBudget, fold_constants
from fastcam.graph import Graph


def _branch(build: Callable[[NetworkBuilder], str]) -> Graph:
    """A network that adds the maximum of a branch of constants to its input."""
    net = NetworkBuilder(("batch", 3))
    return net.build(net.add("Add", net.input, net.add("ReduceMax", build(net), keepdims=0), name="y"))


def _filled(net: NetworkBuilder, *sizes: int) -> str:
    value = helper.make_tensor("value", 1, [1], [1.0])
    return net.add("ConstantOfShape", net.constant(np.array(sizes, np.int64)), value=value)


def _convolution(net: NetworkBuilder) -> str:
    return net.add("Conv", net.constant(np.ones((1, 2, 4, 4), np.float32)), net.weight(3, 2, 3, 3))


def _resize(net: NetworkBuilder) -> str:
    sizes = net.constant(np.array([1, 1, 8, 8], np.int64))
    return net.add("Resize", net.constant(np.ones((1, 1, 2, 2), np.float32)), "", "", sizes, mode="cubic")


def _einsum(net: NetworkBuilder) -> str:
    return net.add("Einsum", net.weight(3, 3), net.weight(3, 3), equation="ab,cd->ad")


def _integer_product(net: NetworkBuilder) -> str:
    matrix = net.constant(np.ones((2, 2), np.int32))
    return net.add("Cast", net.add("MatMul", matrix, matrix), to=1)


@pytest.mark.parametrize("build", [_convolution, _resize, _einsum, _integer_product])
def test_ops_that_are_not_listed_stay_in_the_graph(
    build: Callable[[NetworkBuilder], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _branch(build)
    before = [node.op_type for node in graph.nodes]

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a node was run")

    monkeypatch.setattr(onnx.reference, "ReferenceEvaluator", refuse)
    assert not fold_constants(graph)
    assert [node.op_type for node in graph.nodes] == before


def _large_fill(net: NetworkBuilder) -> str:
    return _filled(net, 2**16, 2**16)


def _expand(net: NetworkBuilder) -> str:
    return net.add("Expand", net.constant(np.ones((1, 2**14), np.float32)), net.constant(np.array([2**18, 1])))


def _tile(net: NetworkBuilder) -> str:
    return net.add("Tile", net.constant(np.ones(60, np.float32)), net.constant(np.array([2**30])))


def _pad(net: NetworkBuilder) -> str:
    return net.add("Pad", net.constant(np.ones((1, 1), np.float32)), net.constant(np.array([0, 2**20, 2**20, 0])))


def _gather(net: NetworkBuilder) -> str:
    rows = net.constant(np.zeros(2**15, np.int64))
    return net.add("Gather", net.constant(np.ones((2, 2**17), np.float32)), rows)


def _range(net: NetworkBuilder) -> str:
    return net.add("Range", *(net.constant(np.array(number, np.float32)) for number in (0, 2**31, 1)))


def _one_hot(net: NetworkBuilder) -> str:
    indices, depth = net.constant(np.zeros(4096, np.int64)), net.constant(np.array(2**22))
    return net.add("OneHot", indices, depth, net.constant(np.array([0, 1], np.float32)))


def _sum_of_fills(net: NetworkBuilder) -> str:
    return net.add("Sum", *(net.add("ReduceMax", _filled(net, 2**9, 2**9), keepdims=0) for _ in range(2)))


@pytest.mark.parametrize("build", [_large_fill, _expand, _tile, _pad, _gather, _range, _one_hot])
def test_a_result_beyond_the_budget_is_refused_before_it_is_made(
    build: Callable[[NetworkBuilder], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _branch(build)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a node was run")

    monkeypatch.setattr(onnx.reference, "ReferenceEvaluator", refuse)
    with pytest.raises(ModelError, match="would create a constant of"):
        fold_constants(graph)


def test_the_budget_is_one_for_all_nodes() -> None:
    """Each of the two constants, with the largest estimate for its readers, fits by itself."""
    size = 4 * 2**18
    fold_constants(_branch(_sum_of_fills), FoldingBudget(3 * size + 1000, 2**40))
    with pytest.raises(ModelError, match="would create a constant of"):
        fold_constants(_branch(_sum_of_fills), FoldingBudget(5 * size // 2, 2**40))


def test_long_computations_are_refused() -> None:
    def product(net: NetworkBuilder) -> str:
        return net.add("MatMul", net.weight(64, 64), net.weight(64, 64))

    fold_constants(_branch(product), FoldingBudget(2**20, 64**3))
    with pytest.raises(ModelError, match="computes for too long"):
        fold_constants(_branch(product), FoldingBudget(2**20, 64**2))


@pytest.mark.parametrize(
    ("shape", "target", "elements"),
    [((2, 3), (2, 3), 6), ((1, 3), (4, 1), 12), ((5, 1, 1), (2, 3), 30), ((), (7,), 7), ((2, 3), (3,), 6)],
)
def test_the_size_of_a_broadcast_is_exact(shape: tuple[int, ...], target: tuple[int, ...], elements: int) -> None:
    def expand(net: NetworkBuilder) -> str:
        return net.add("Expand", net.constant(np.ones(shape, np.float32)), net.constant(np.array(target)))

    fold_constants(_branch(expand), FoldingBudget(8 * elements, 2**20))
    with pytest.raises(ModelError, match=f"a constant of {4 * elements} bytes"):
        fold_constants(_branch(expand), FoldingBudget(4 * elements - 1, 2**20))


def _evaluated(graph: Graph, image: Any) -> Any:
    outputs: Any = onnx.reference.ReferenceEvaluator(graph.to_model()).run(None, {"image": image})
    return outputs[0]


def test_folding_gives_what_the_graph_gave() -> None:
    def arithmetic(net: NetworkBuilder) -> str:
        rows = net.add("Reshape", net.weight(4, 6), net.constant(np.array([2, 12])))
        squares: Any = net.add("Mul", rows, rows)
        return net.add("Concat", squares, net.add("Transpose", net.weight(12, 1), perm=[1, 0]), axis=0)

    image = np.array([[1, 2, 3]], np.float32)
    expected, folded = (
        np.asarray(_evaluated(_folded(_branch(arithmetic), fold=fold), image)) for fold in (False, True)
    )
    np.testing.assert_array_equal(folded, expected)


def _folded(graph: Graph, *, fold: bool) -> Graph:
    if fold:
        assert fold_constants(graph)
        assert [node.op_type for node in graph.nodes] == ["Add"]
    return graph
