"""Op sequences that one op can express: found in every spelling, left alone if anything differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error

from fastcam.exporting.passes.layer_normalizations import join_layer_normalizations
from fastcam.exporting.passes.sequences import join_sequences
from fastcam.exporting.passes.simplify import simplify
from fastcam.exporting.passes.token_rows import join_rows_of_tokens
from fastcam.graph import Graph

_CHANNELS = 6
_GAMMA = np.linspace(0.5, 2, _CHANNELS, dtype=np.float32)
_BETA = np.linspace(-1, 1, _CHANNELS, dtype=np.float32)


def _statistics(net: NetworkBuilder, x: str, axes: list[int], square: Callable[[str], str]) -> tuple[str, str, str]:
    """Return mean, centred input and standard deviation; every constant is written again, as converters do."""
    mean = net.add("ReduceMean", x, net.constant(axes), keepdims=1)
    centred = net.add("Sub", x, mean)
    variance = net.add("ReduceMean", square(centred), net.constant(axes), keepdims=1)
    return mean, centred, net.add("Sqrt", net.add("Add", net.constant(np.array(1e-3, np.float32)), variance))


def _by_division(net: NetworkBuilder, x: str, axes: list[int], exponent: float = 2) -> str:
    """As PyTorch's older exporter writes it."""
    power = net.constant(np.array(exponent, np.float32))
    _, centred, deviation = _statistics(net, x, axes, lambda value: net.add("Pow", value, power))
    scaled = net.add("Mul", net.constant(_GAMMA), net.add("Div", centred, deviation))
    return net.add("Add", scaled, net.constant(_BETA), name="y")


def _by_scale_and_shift(net: NetworkBuilder, x: str, axes: list[int], shifted: str = "") -> str:
    """Keras' way: x scale + (beta - mean scale)."""
    mean, _, deviation = _statistics(net, x, axes, lambda value: net.add("Mul", value, value))
    scale = net.add("Mul", net.add("Reciprocal", deviation), net.constant(_GAMMA.reshape(1, 1, -1)))
    shift = net.add("Mul", net.add("Neg", mean), scale)
    shift = net.add("Add", shift, net.constant(_BETA.reshape(1, 1, -1)))
    return net.add("Add", net.add("Mul", shifted or x, scale), shift, name="y")


def _run(graph: Graph, x: Array) -> Array:
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString(), providers=["CPUExecutionProvider"])
    y: Array = session.run(None, {"image": x})[0]
    return y


@pytest.mark.parametrize("write", [_by_division, _by_scale_and_shift])
@pytest.mark.parametrize("axes", [[-1], [2]])
def test_a_normalisation_in_single_steps_is_joined(write: Any, axes: list[int], rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 5, _CHANNELS))
    graph = net.build(write(net, net.input, axes))
    x = rng.normal(2, 3, (2, 5, _CHANNELS)).astype(np.float32)
    expected = _run(graph, x)
    simplify(graph)
    (node,) = graph.nodes
    assert node.op_type == "LayerNormalization"
    assert list(node.output) == ["y"]
    assert relative_error(_run(graph, x), expected) < 1e-6


_OTHERS: dict[str, Callable[[NetworkBuilder], str]] = {
    "another axis": lambda net: _by_division(net, net.input, [1]),
    "two axes": lambda net: _by_division(net, net.input, [1, 2]),
    "a cube": lambda net: _by_division(net, net.input, [2], exponent=3),
    "two inputs": lambda net: _by_scale_and_shift(net, net.input, [2], shifted=net.add("Exp", net.input)),
    "a statistic of something else": lambda net: _by_scale_and_shift(
        net, net.add("Exp", net.input), [2], shifted=net.input
    ),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_what_only_looks_like_a_normalisation_is_left(name: str) -> None:
    net = NetworkBuilder(("batch", _CHANNELS, _CHANNELS))
    graph = net.build(_OTHERS[name](net))
    join_layer_normalizations(graph)
    assert "LayerNormalization" not in {node.op_type for node in graph.nodes}


def _product(net: NetworkBuilder, rows: list[int], back: list[int], units: int = 3) -> Graph:
    flat = net.add("Reshape", net.input, net.constant(rows))
    product = net.add("MatMul", flat, net.weight(rows[-1], units))
    return net.build(net.add("Reshape", product, net.constant(back), name="y"))


def test_a_product_over_tokens_needs_no_rows(rng: np.random.Generator) -> None:
    graph = _product(NetworkBuilder(("batch", 5, 4)), [-1, 4], [-1, 5, 3])
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    expected = _run(graph, x)
    simplify(graph)
    assert [node.op_type for node in graph.nodes] == ["MatMul"]
    assert relative_error(_run(graph, x), expected) < 1e-6


@pytest.mark.parametrize(
    ("rows", "back"),
    [([-1, 2], [-1, 10, 3]), ([-1, 4], [-1, 15]), ([-1, 4], [-1, 3, 5])],
    ids=["split", "flat", "mixed"],
)
def test_a_product_over_other_rows_is_left(rows: list[int], back: list[int]) -> None:
    graph = _product(NetworkBuilder(("batch", 5, 4)), rows, back)
    join_rows_of_tokens(graph)
    assert [node.op_type for node in graph.nodes] == ["Reshape", "MatMul", "Reshape"]


def _chunked(sizes: Array, places: list[int]) -> Graph:
    """Parts of six channels, the last ones first."""
    net = NetworkBuilder(("batch", _CHANNELS, 2))
    parts = net.add("SplitToSequence", net.input, net.constant(sizes), axis=1)
    taken = [net.add("SequenceAt", parts, net.constant(np.array(place)), name=f"part{place}") for place in places]
    return net.build(net.add("Concat", *taken, axis=1, name="y"))


@pytest.mark.parametrize("sizes", [np.array(4), np.array([4, 2])], ids=["steps", "sizes"])
def test_parts_of_a_sequence_become_a_split(sizes: Array, rng: np.random.Generator) -> None:
    graph = _chunked(sizes, [1, 0])
    x = rng.normal(size=(2, _CHANNELS, 2)).astype(np.float32)
    simplify(graph)
    assert [node.op_type for node in graph.nodes] == ["Split", "Concat"]
    np.testing.assert_array_equal(_run(graph, x), np.concatenate([x[:, 4:], x[:, :4]], axis=1))


def test_a_sequence_that_drops_its_axis_is_left() -> None:
    net = NetworkBuilder(("batch", 2, 3))
    parts = net.add("SplitToSequence", net.input, axis=1, keepdims=0)
    graph = net.build(net.add("SequenceAt", parts, net.constant(np.array(1))))
    assert not join_sequences(graph)
