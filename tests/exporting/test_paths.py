"""Which elements count, compared with the effect of changing each of them; which values change with the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from networks import NetworkBuilder
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fastcam.exporting.paths import Demand, varying_values

_SHAPE = (1, 5, 4)
Head = Callable[[NetworkBuilder, str], str]


def _integers(net: NetworkBuilder, *numbers: int) -> str:
    return net.constant(np.array(numbers, np.int64))


def _sliced(net: NetworkBuilder, x: str) -> str:
    return net.add("Slice", x, _integers(net, 1), _integers(net, 3), _integers(net, 1))


def _sliced_backwards(net: NetworkBuilder, x: str) -> str:
    arguments = [_integers(net, number) for number in (-1, -(2**63), 1, -2)]
    return net.add("Slice", x, *arguments)


def _whole_slice_then_first(net: NetworkBuilder, x: str) -> str:
    whole = net.add("Slice", x, _integers(net, 0), _integers(net, 2**63 - 1), _integers(net, 0))
    return net.add("Gather", whole, net.constant(np.array(0)), axis=1)


def _token_wise(net: NetworkBuilder, x: str) -> str:
    ones = net.constant(np.ones(4))
    hidden = net.add("HardSwish", net.add("MatMul", net.add("LayerNormalization", x, ones), net.weight(4, 3)))
    return net.add("Gather", hidden, _integers(net, 2, -1), axis=1)


def _attention(net: NetworkBuilder, x: str) -> str:
    scores = net.add("Softmax", net.add("MatMul", x, net.add("Transpose", x, perm=[0, 2, 1])))
    return net.add("Gather", net.add("MatMul", scores, x), net.constant(np.array(0)), axis=1)


def _queries_only(net: NetworkBuilder, x: str) -> str:
    keys = net.weight(4, 6)
    return net.add("Gather", net.add("Softmax", net.add("MatMul", x, keys)), net.constant(np.array(3)), axis=1)


def _split_and_joined(net: NetworkBuilder, x: str) -> str:
    first, second = "first", "second"
    net.graph.append(_split(x, [first, second], _integers(net, 2, 3)))
    turned = net.add("Concat", second, first, axis=1)
    return net.add("Slice", turned, _integers(net, 2), _integers(net, 4), _integers(net, 1))


def _split(x: str, outputs: list[str], sizes: str) -> Any:
    return helper.make_node("Split", [x, sizes], outputs, axis=1)


def _masked(net: NetworkBuilder, x: str) -> str:
    mask = np.zeros(_SHAPE)
    mask[0, 2, 1:3] = 2
    return net.add("Mul", x, net.constant(mask))


def _chosen(net: NetworkBuilder, x: str) -> str:
    condition = np.zeros(_SHAPE, bool)
    condition[0, :, 3] = True
    return net.add("Where", net.constant(condition), x, net.constant(np.array(1.0)))


def _broadcast(net: NetworkBuilder, x: str) -> str:
    row = net.add("Gather", x, _integers(net, 1), axis=1)
    return net.add("Add", row, net.weight(5, 4))


def _reduced(net: NetworkBuilder, x: str) -> str:
    means = net.add("ReduceMean", x, _integers(net, -1), keepdims=0)
    return net.add("Gather", means, net.constant(np.array(4)), axis=1)


def _rows(net: NetworkBuilder, x: str) -> str:
    rows = net.add("Gemm", net.add("Reshape", x, _integers(net, -1, 4)), net.weight(4, 2))
    back = net.add("Reshape", rows, _integers(net, 0, 2))
    return net.add("Slice", back, _integers(net, 0), _integers(net, 1), _integers(net, 0))


def _rounded_path(net: NetworkBuilder, x: str) -> str:
    steps = net.add("Mul", net.add("Floor", x), net.constant(np.array(3.0)))
    return net.add("Add", net.add("Gather", steps, _integers(net, 0), axis=1), _sliced(net, x))


def _padded(net: NetworkBuilder, x: str) -> str:
    """Position 0 of the padded tokens is a zero, and position 2 is the picture's second one."""
    padded = net.add("Pad", x, _integers(net, 0, 1, 0, 0, 2, 1))
    return net.add("Gather", padded, _integers(net, 0, 2, 7), axis=1)


def _reflected(net: NetworkBuilder, x: str) -> str:
    padded = net.add("Pad", x, _integers(net, 0, 2, 0, 0, 0, 0), mode="reflect")
    return net.add("Add", net.add("Gather", padded, _integers(net, 0), axis=1), net.add("ReduceSum", x, keepdims=1))


def _all(net: NetworkBuilder, x: str) -> str:
    return net.add("ReduceSum", x, keepdims=1)


@pytest.mark.parametrize(
    "head",
    [
        _sliced,
        _sliced_backwards,
        _whole_slice_then_first,
        _token_wise,
        _attention,
        _queries_only,
        _split_and_joined,
        _masked,
        _chosen,
        _broadcast,
        _reduced,
        _rows,
        _rounded_path,
        _padded,
        _reflected,
        _all,
    ],
)
@pytest.mark.parametrize("batch", [1, "batch"])
def test_the_elements_that_count_are_those_that_change_the_scores(
    head: Head, batch: int | str, rng: np.random.Generator
) -> None:
    net = NetworkBuilder((batch, *_SHAPE[1:]), np.float64)
    graph = net.build(head(net, net.input))
    run: Any = ReferenceEvaluator(graph.to_model()).run
    # Off the kinks of HardSwish and Floor, which a small step then leaves alone.
    image = rng.uniform(0.2, 0.8, _SHAPE)
    (before,) = run(None, {"image": image})
    changes = np.zeros(_SHAPE, bool)
    for index in np.ndindex(*_SHAPE):
        moved = image.copy()
        moved[index] += 1e-3
        changes[index] = not np.array_equal(run(None, {"image": moved})[0], before)
    mask = np.broadcast_to(Demand(graph).mask("image"), _SHAPE)
    # A dynamic number of rows, several per image, counts as a whole: never too few.
    assert mask[changes].all()
    if (head, batch) != (_rows, "batch"):
        np.testing.assert_array_equal(mask, changes)


def _expanded(net: NetworkBuilder, other: str) -> str:
    batch = net.add("Shape", net.input, start=0, end=1)
    shape = net.add("Concat", batch, _integers(net, 3, 4, 4), axis=0)
    return net.add("Expand", other, shape)


def _tiled(net: NetworkBuilder, other: str) -> str:
    repeats = net.add("Concat", net.add("Shape", net.input, start=0, end=1), _integers(net, 1, 1, 1), axis=0)
    return net.add("Tile", other, repeats)


def _added_to_zeros(net: NetworkBuilder, other: str) -> str:
    return net.add("Add", net.add("ConstantOfShape", net.add("Shape", net.input)), other)


def _added_to_expanded_zero(net: NetworkBuilder, other: str) -> str:
    zero = net.add("Expand", net.constant(np.zeros(1, np.float32)), net.add("Shape", net.input))
    return net.add("Add", zero, other)


def _added_to_zero_times(net: NetworkBuilder, other: str) -> str:
    return net.add("Add", net.add("Mul", net.input, net.constant(np.float32(0))), other)


@pytest.mark.parametrize("spread", [_expanded, _tiled, _added_to_zeros, _added_to_expanded_zero, _added_to_zero_times])
def test_a_constant_picture_does_not_change_with_the_picture(spread: Head, rng: np.random.Generator) -> None:
    net = NetworkBuilder(("batch", 3, 4, 4))
    other = net.constant(rng.random((1, 3, 4, 4)).astype(np.float32))
    theirs = net.add("Relu", spread(net, other), name="theirs")
    ours = net.add("Relu", net.input, name="ours")
    graph = net.build(net.add("Add", ours, theirs, name="sum"))
    varying = varying_values(graph)
    assert {"ours", "sum"} <= varying
    assert "theirs" not in varying


def test_numbers_that_change_in_steps_still_change() -> None:
    net = NetworkBuilder(("batch", 3))
    steps = net.add("Cast", net.add("Greater", net.input, net.constant(np.float32(0))), to=TensorProto.FLOAT)
    graph = net.build(steps)
    assert steps in varying_values(graph)
    assert not Demand(graph).reaches(net.input)


def test_a_shift_of_zero_is_no_zero() -> None:
    net = NetworkBuilder(("batch", 3))
    pads = net.constant(np.array([0, 1, 0, 1]))
    value = net.constant(np.float32(5))
    zeros = net.add("Mul", net.input, net.constant(np.float32(0)))
    graph = net.build(net.add("Mul", net.add("Pad", zeros, pads, value), net.add("Pad", net.input, pads)))
    assert graph.outputs[0] in varying_values(graph)
