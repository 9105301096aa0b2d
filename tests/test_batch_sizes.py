"""Sizes that are the batch size although ONNX's shape inference does not say so."""

from __future__ import annotations

import numpy as np
import pytest
from networks import NetworkBuilder

from fastcam.batch_sizes import is_multiple
from fastcam.graph import Graph


def _reshaped(net: NetworkBuilder, value: str, *sizes: int, name: str) -> str:
    return net.add("Reshape", value, net.constant(list(sizes)), name=name)


def _typed(net: NetworkBuilder, output: str) -> Graph:
    graph = net.build(output)
    graph.infer_types()
    return graph


def test_merged_axes_are_multiples_of_the_batch_and_split_again() -> None:
    net = NetworkBuilder(("n", 4, 6, 5))
    merged = _reshaped(net, net.input, -1, 6, 5, name="merged")
    turned = net.add("Transpose", merged, perm=[0, 2, 1], name="turned")
    graph = _typed(net, _reshaped(net, turned, -1, 4, 5, 6, name="split"))
    assert graph.shape("merged") == ("4 * n", 6, 5)
    assert graph.shape("turned") == ("4 * n", 5, 6)
    assert graph.shape("split") == ("n", 4, 5, 6)


def test_broadcasting_with_the_batch_is_the_batch() -> None:
    net = NetworkBuilder(("n", 4, 6))
    split = _reshaped(net, _reshaped(net, net.input, -1, 6, name="merged"), -1, 4, 6, name="split")
    added = net.add("Add", net.input, split, name="added")
    product = net.add("MatMul", added, net.add("Transpose", split, perm=[0, 2, 1]), name="product")
    graph = _typed(net, _reshaped(net, product, -1, 2, 8, name="again"))
    assert [graph.shape(name)[0] for name in ("split", "added", "product", "again")] == ["n"] * 4


def test_what_is_expanded_along_other_axes_keeps_the_batch() -> None:
    net = NetworkBuilder(("n", 4, 1))
    merged = _reshaped(net, net.input, -1, 2, 1, name="merged")
    target = net.add("Concat", net.add("Shape", merged, start=0, end=1), net.constant([2, 6]), axis=0)
    graph = _typed(net, net.add("Expand", merged, target, name="y"))
    assert graph.shape("y") == ("2 * n", 2, 6)


@pytest.mark.parametrize(("sizes", "shape"), [((-1, 5), 2), ((-1, 7, 24), 3)])
def test_sizes_that_are_no_multiple_stay_unnamed(sizes: tuple[int, ...], shape: int) -> None:
    net = NetworkBuilder(("n", 4, 6))
    graph = _typed(net, _reshaped(net, net.input, *sizes, name="y"))
    assert len(graph.shape("y")) == shape
    assert str(graph.shape("y")[0]).startswith("unk__")


def test_a_batch_mixed_with_twice_the_batch_stays_unnamed() -> None:
    net = NetworkBuilder(("n", 4, 6))
    twice = _reshaped(net, net.input, -1, 2, 6, name="twice")
    graph = _typed(
        net, net.add("Add", net.add("Slice", net.input, *(net.constant([k]) for k in (0, 2, 1))), twice, name="y")
    )
    assert graph.shape("twice")[0] == "2 * n"
    assert str(graph.shape("y")[0]).startswith("unk__")


def test_a_fixed_batch_needs_no_names() -> None:
    net = NetworkBuilder((2, 4, 6))
    graph = _typed(net, net.add("Add", _reshaped(net, net.input, -1, 6, name="merged"), net.constant(np.float32(1))))
    assert graph.shape("merged") == (8, 6)


@pytest.mark.parametrize("name", ["s0*4", "4*s0", "a*b", "images"])
def test_names_of_exporters_are_no_multiples(name: str) -> None:
    net = NetworkBuilder((name, 4, 6))
    graph = _typed(net, _reshaped(net, _reshaped(net, net.input, -1, 6, name="merged"), -1, 4, 6, name="split"))
    assert graph.shape("merged")[0] == f"4 * {name}"
    assert graph.shape("split")[0] == name
    assert [is_multiple(size) for size in (name, f"4 * {name}")] == [False, True]
