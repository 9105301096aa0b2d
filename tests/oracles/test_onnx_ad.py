"""Gradient rules against onnx-ad: an independent automatic differentiation of ONNX graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from networks import Array, relative_error
from onnx import ModelProto
from op_cases import CASES, OpCase
from op_support import TARGETS, drawn_values, gradient_graph, op_graph

from fastcam.exporting.gradients.table import VJPS
from fastcam.graph import static_dims

onnx_ad = pytest.importorskip("onnx_ad", reason="needs onnx-ad: pip install onnx-ad")

# It mistakes the pads at the end of an axis for those at its start; finite differences agree with us.
_WRONG = {"conv-asymmetric-pads"}
_STRAIGHT_THROUGH = {"QuantizeLinear", "DequantizeLinear"}
# It does not support a dynamic batch.
_CASES = [replace(case, batched=False) for case in CASES if case.name not in _WRONG]


def _run(model: ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _theirs(case: OpCase) -> ModelProto | None:
    """Return onnx-ad's reverse pass, or None if it rejects the graph."""
    try:
        derived: ModelProto = onnx_ad.reverse(op_graph(case, np.float32).to_model(), layout="onnx")
    except onnx_ad.UnsupportedOperator:
        return None
    return derived


def test_the_oracle_knows_every_op() -> None:
    """It rejects variants (automatic padding, ceil_mode, steps, mirrored pads), but accepts some of each op."""
    taken = {case.op for case in _CASES if _theirs(case) is not None}
    assert taken == set(VJPS) - _STRAIGHT_THROUGH
    assert sum(_theirs(case) is None for case in _CASES) <= 15


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_rule_equals_onnx_ad(case: OpCase, rng: np.random.Generator) -> None:
    derived = _theirs(case)
    if derived is None:
        pytest.skip("onnx-ad refuses this variant")
    graph = gradient_graph(case, np.float32)
    values = {name: array.astype(np.float32) for name, array in drawn_values(case, rng).items()}
    upstream = {}
    for index in case.read:
        shape = static_dims(graph, f"y{index}", range(len(graph.shape(f"y{index}"))))
        upstream[f"g{index}"] = rng.normal(size=(TARGETS, *shape)).astype(graph.inputs[f"g{index}"].dtype)
    ours = list(_run(graph.to_model(), {**values, **upstream}).values())[len(case.read) :]
    # Their targets are the last axis.
    seeds = {f"adj_y{name[1:]}": np.moveaxis(array, 0, -1).copy() for name, array in upstream.items()}
    theirs = _run(derived, {**values, **seeds})
    for index, found in zip(case.variables, ours, strict=True):
        assert relative_error(found, np.moveaxis(theirs[f"adj_x{index}"], -1, 0)) < 1e-5
