"""Token maps: which values they are, how they are arranged on the picture, and whether the scores read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import NetworkBuilder

import fastcam
from fastcam.errors import ArgumentError, LayerError
from fastcam.exporting.paths import Demand
from fastcam.exporting.tokens import TokenGrid, TokenGrids, patches_count

_ROWS, _COLUMNS, _CHANNELS = 3, 5, 4


def _evidence(prefix: int) -> onnx.ModelProto:
    """The score is a sum of squares of the patches: each patch counts by its own size."""
    net = NetworkBuilder(("batch", 3, 2 * _ROWS, 2 * _COLUMNS))
    patches = net.conv(net.input, (_CHANNELS, 3, 2, 2), strides=[2, 2])
    tokens = net.add("Reshape", patches, net.constant([0, _CHANNELS, _ROWS * _COLUMNS]))
    tokens = net.add("Transpose", tokens, perm=[0, 2, 1])
    if prefix:
        first = net.add("Slice", tokens, *map(net.constant, ([0], [prefix], [1])))
        tokens = net.add("Concat", net.add("Abs", first), tokens, axis=1)
    ones = net.constant(np.ones(_CHANNELS, np.float32))
    state = net.add("LayerNormalization", tokens, ones, axis=-1, name="state")
    squares = net.add("Mul", net.add("Add", state, tokens, name="sum"), net.add("Exp", state))
    pooled = net.add("ReduceMean", squares, net.constant([1]), keepdims=0)
    return net.build(net.dense(pooled, (_CHANNELS, 5))).to_model()


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 4), (2, 0), (1, 3)])
def test_a_patch_lights_up_where_it_lies(prefix: int, row: int, column: int, tmp_path: Path) -> None:
    fastcam.export(_evidence(prefix), tmp_path / "tokens.onnx", layer="sum", gradients="full")
    image = np.zeros((1, 3, 2 * _ROWS, 2 * _COLUMNS), np.float32)
    explainer = fastcam.Explainer(tmp_path / "tokens.onnx")
    names = ["activations", "gradients"]
    session, name = explainer._session, explainer._session.get_inputs()[0].name
    dark = session.run(names, {name: image})
    image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 3
    lit = session.run(names, {name: image})
    for before, after in zip(dark, lit, strict=True):
        changed = np.abs(after - before).reshape(-1, _ROWS, _COLUMNS).max(axis=0) > 1e-6
        assert np.argwhere(changed).tolist() == [[row, column]]


def test_grids_are_inferred() -> None:
    net = NetworkBuilder(("batch", 3, 12, 20))
    net.conv(net.input, (4, 3, 4, 4), name="patches", strides=[4, 4])
    counts = {"plain": 15, "class": 16, "registers": 20, "square": 25, "neither": 11, "many": 40}
    for name, tokens in counts.items():
        net.graph.inputs[name] = net.graph.inputs["image"]._replace(shape=("batch", tokens, 4))
        net.add("Relu", name, name=f"{name}_map")
    graph = net.build(
        "patches", *(f"{name}_map" for name in ("plain", "class", "registers", "square", "neither", "many"))
    )
    grids = TokenGrids(graph)
    assert grids.find("plain_map") == TokenGrid(0, 3, 5)
    assert grids.find("class_map") == TokenGrid(1, 3, 5)
    assert grids.find("registers_map") == TokenGrid(5, 3, 5)
    assert grids.find("square_map") == TokenGrid(10, 3, 5)
    assert grids.find("neither_map") is None
    assert grids.find("many_map") is None
    assert grids.find("many_map", (4, 9)) == TokenGrid(4, 4, 9)
    assert grids.find("many_map", (6, 7)) is None
    assert grids.find("patches") is None


def _first_token(net: NetworkBuilder, value: str) -> str:
    return net.add("Gather", value, net.constant(np.array(0)), axis=1)


def _sliced_prefix(net: NetworkBuilder, value: str) -> str:
    return net.add("Slice", net.add("Mul", value, value), *map(net.constant, ([0], [1], [1])))


def _after_layers(net: NetworkBuilder, value: str) -> str:
    normed = net.add("LayerNormalization", value, net.constant(np.ones(4, np.float32)), axis=-1)
    hidden = net.add("Relu", net.add("MatMul", normed, net.weight(4, 4)))
    return _first_token(net, net.add("Add", hidden, value))


def _last_patch(net: NetworkBuilder, value: str) -> str:
    return net.add("Gather", value, net.constant(np.array(9)), axis=1)


def _mixed_first(net: NetworkBuilder, value: str) -> str:
    scores = net.add("Softmax", net.add("MatMul", value, net.add("Transpose", value, perm=[0, 2, 1])), axis=-1)
    return _first_token(net, net.add("MatMul", scores, value))


@pytest.mark.parametrize(
    ("head", "reach"),
    [
        (_first_token, False),
        (_sliced_prefix, False),
        (_after_layers, False),
        (_last_patch, True),
        (_mixed_first, True),
    ],
)
def test_patches_that_nothing_reads_are_told(head: Callable[[NetworkBuilder, str], str], reach: bool) -> None:
    net = NetworkBuilder(("batch", 10, 4))
    state = net.add("Relu", net.input, name="state")
    graph = net.build(head(net, state))
    assert patches_count(Demand(graph), "state", TokenGrid(1, 3, 3)) is reach


def test_a_layer_of_tokens_without_a_grid_says_so(tmp_path: Path) -> None:
    no_grid: Any = 15
    model = _evidence(prefix=0)
    with pytest.raises(LayerError, match=r"token_grid=\(4, 4\) does not fit"):
        fastcam.export(model, tmp_path / "out.onnx", layer="sum", token_grid=(4, 4))
    with pytest.raises(ArgumentError, match=r"token_grid=15: give \(height, width\)"):
        fastcam.export(model, tmp_path / "out.onnx", token_grid=no_grid)
    assert not list(tmp_path.iterdir())


def _class_token_transformer(activation: str, *, whole_slice: bool) -> onnx.ModelProto:
    """One block of attention and one MLP, and scores that read the class token; the last three states are blank."""
    net = NetworkBuilder(("batch", 3, 2 * _ROWS, 2 * _COLUMNS))
    net.graph.opset = 20
    patches = net.conv(net.input, (_CHANNELS, 3, 2, 2), strides=[2, 2])
    tokens = net.add("Reshape", patches, net.constant([0, _CHANNELS, _ROWS * _COLUMNS]))
    tokens = net.add("Transpose", tokens, perm=[0, 2, 1])
    first = net.add("ReduceMean", tokens, net.constant([1]), keepdims=1)
    tokens = net.add("Concat", first, tokens, axis=1, name="tokens")
    ones = net.constant(np.ones(_CHANNELS, np.float32))
    state = net.add("LayerNormalization", tokens, ones, axis=-1, name="before_attention")
    scores = net.add("Softmax", net.add("MatMul", state, net.add("Transpose", state, perm=[0, 2, 1])), axis=-1)
    tokens = net.add("Add", net.add("MatMul", scores, state), tokens, name="after_attention")
    state = net.add("LayerNormalization", tokens, ones, axis=-1, name="before_mlp")
    hidden = net.add(activation, net.add("MatMul", state, net.weight(_CHANNELS, 8)))
    tokens = net.add("Add", net.add("MatMul", hidden, net.weight(8, _CHANNELS)), tokens, name="after_mlp")
    tokens = net.add("LayerNormalization", tokens, ones, axis=-1, name="last")
    if whole_slice:
        tokens = net.add("Slice", tokens, *(net.constant(np.array([number])) for number in (0, 2**63 - 1, 0)))
    row = net.add("Gather", tokens, net.constant(np.array(0)), axis=1)
    return net.build(net.dense(row, (_CHANNELS, 5))).to_model()


@pytest.mark.parametrize("whole_slice", [False, True])
@pytest.mark.parametrize("activation", ["Relu", "Gelu", "HardSwish", "Mish", "Elu", "Abs"])
def test_the_layer_before_the_last_attention_is_explained(activation: str, whole_slice: bool, tmp_path: Path) -> None:
    """Whatever the activation of the last MLP, and however the class token is selected."""
    model = _class_token_transformer(activation, whole_slice=whole_slice)
    result = fastcam.export(model, tmp_path / "tokens.onnx")
    assert result.layer == "before_attention"
    assert [note for note in result.notes if note.kind == "layer"] == []
    image = np.random.default_rng(0).random((1, 3, 2 * _ROWS, 2 * _COLUMNS)).astype(np.float32)
    session = fastcam.Explainer(tmp_path / "tokens.onnx")._session
    (weights,) = session.run(["weights"], {"image": image})
    assert np.abs(weights).max() > 1e-4
    for layer in ("before_mlp", "after_mlp", "last", "after_attention"):
        with pytest.raises(LayerError, match="the scores read only the first 1 tokens"):
            fastcam.export(model, tmp_path / "other.onnx", layer=layer)
    assert not (tmp_path / "other.onnx").exists()
