"""Networks of 16-bit floats, widened to float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fastcam.exporting.importers.precision import widen_to_float32
from fastcam.graph import Graph, TensorType

_HALVES = [TensorProto.FLOAT16, TensorProto.BFLOAT16]
_IDS = ["float16", "bfloat16"]


def _dtype(half: int) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(half)


def _with_dtype(graph: Graph, dtype: np.dtype[Any]) -> Graph:
    """Return the graph with its floats, small shape constants apart, in another type."""
    constants = {
        name: array if array.dtype.kind == "i" else array.astype(dtype) for name, array in graph.constants.items()
    }
    inputs = {name: TensorType(dtype, type_.shape) for name, type_ in graph.inputs.items()}
    return graph.copy(constants=constants, inputs=inputs, types={})


def _run(graph: Graph, image: Array) -> Array:
    session = onnxruntime.InferenceSession(graph.to_model().SerializeToString())
    return np.asarray(session.run(None, {next(iter(graph.inputs)): image})[0])


@pytest.mark.parametrize("half", _HALVES, ids=_IDS)
def test_a_network_of_half_floats_computes_in_float32_with_the_same_weights(
    half: int, rng: np.random.Generator
) -> None:
    graph = _with_dtype(small_classifier(), _dtype(half))
    exact = _with_dtype(graph, np.dtype(np.float64))
    image = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    (expected,) = ReferenceEvaluator(exact.to_model()).run(None, {"image": image.astype(np.float64)})
    assert widen_to_float32(graph)
    assert relative_error(_run(graph, image), expected) < 1e-5


@pytest.mark.parametrize("half", _HALVES, ids=_IDS)
def test_float32_weights_behind_casts_keep_every_bit(half: int, rng: np.random.Generator) -> None:
    kernel = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    image = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)

    def network(*, casts: bool) -> Graph:
        net = NetworkBuilder((1, 3, 6, 6))
        pair = [net.input, net.constant(kernel)]
        if casts:
            pair = [net.add("Cast", name, to=half) for name in pair]
        value = net.add("Conv", *pair)
        return net.build(net.add("Cast", value, to=TensorProto.FLOAT) if casts else value)

    graph = network(casts=True)
    assert widen_to_float32(graph)
    np.testing.assert_array_equal(_run(graph, image), _run(network(casts=False), image))


@pytest.mark.parametrize("half", _HALVES, ids=_IDS)
def test_attributes_that_hold_or_name_a_half_float_are_widened(half: int, rng: np.random.Generator) -> None:
    net = NetworkBuilder((3, 3), _dtype(half))
    ones = numpy_helper.from_array(np.array([1.5], _dtype(half)))
    filled = net.add("ConstantOfShape", net.constant(np.array([3, 3])), value=ones)
    diagonal = net.add("EyeLike", net.input, dtype=half)
    graph = net.build(net.add("Sum", net.input, filled, diagonal))
    image = rng.normal(size=(3, 3)).astype(np.float32)
    assert widen_to_float32(graph)
    np.testing.assert_array_equal(_run(graph, image), image + np.float32(1.5) + np.eye(3, dtype=np.float32))


def test_a_network_of_float32_is_left_alone() -> None:
    graph = small_classifier()
    before = graph.to_model().SerializeToString()
    assert not widen_to_float32(graph)
    assert graph.to_model().SerializeToString() == before
