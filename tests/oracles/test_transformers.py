"""Small vision transformers against GradientTape and torch's autograd: maps of tokens on their grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, relative_error, small_classifier

import fastcam
from fastcam.errors import LayerError, ModelError

_TARGETS = [0, 3]
_CHANNELS, _CLASSES = 8, 5
# Patches of 4 x 4 pixels, fewer rows than columns.
_IMAGE, _GRID = (12, 20), (3, 5)


def _map_of(tokens: Array, gradient: Array, prefix: int) -> Array:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) over the patches of one image's tokens (T,C)."""
    patches, slopes = (array[prefix:].reshape(*_GRID, -1).astype(np.float64) for array in (tokens, gradient))
    heatmap: Array = np.maximum((patches * slopes.mean(axis=(0, 1))).sum(axis=-1), 0)
    return heatmap


def _check(path: Path, image: Array, expected: Array, scores: Array) -> None:
    found = fastcam.Explainer(path)(image, _TARGETS, size="layer", normalize=None)
    assert found.maps.shape[2:] == _GRID
    assert np.abs(expected).max() > 0
    assert relative_error(found.maps[0], expected) < 1e-4
    assert relative_error(found.logits, scores) < 1e-5


def _keras_transformer(class_token: bool) -> Any:
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    layers = keras.layers
    Layer: Any = layers.Layer
    keras.utils.set_random_seed(1)

    class ClassToken(Layer):
        def build(self, shape: Any) -> None:
            self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="random_normal", name="token")

        def call(self, x: Any) -> Any:
            token = keras.ops.broadcast_to(self.token, (keras.ops.shape(x)[0], 1, x.shape[-1]))
            return keras.ops.concatenate([token, x], axis=1)

    image = keras.Input((*_IMAGE, 3))
    x = layers.Conv2D(_CHANNELS, 4, strides=4, name="patches")(image)
    x = layers.Reshape((_GRID[0] * _GRID[1], _CHANNELS))(x)
    x = ClassToken()(x) if class_token else x
    for block in range(2):
        y = layers.LayerNormalization(name=f"norm1_{block}")(x)
        x = layers.Add(name=f"sum1_{block}")([x, layers.MultiHeadAttention(2, 4, name=f"attention_{block}")(y, y)])
        y = layers.Dense(16, activation="gelu")(layers.LayerNormalization(name=f"norm2_{block}")(x))
        x = layers.Add(name=f"sum2_{block}")([x, layers.Dense(_CHANNELS)(y)])
    x = layers.LayerNormalization(name="norm")(x)
    x = x[:, 0] if class_token else layers.GlobalAveragePooling1D()(x)
    return keras.Model(image, layers.Dense(_CLASSES, name="scores")(x))


def _tape(model: Any, layer: str, image: Array, prefix: int) -> tuple[Array, Array]:
    import keras
    import tensorflow as tf

    split = keras.Model(model.inputs, [model.get_layer(layer).output, model.outputs[0]])
    with tf.GradientTape(persistent=True) as tape:
        tokens, scores = split([image])
        wanted = [scores[0, target] for target in _TARGETS]
    gradients = [tape.gradient(score, tokens).numpy()[0] for score in wanted]
    return np.stack([_map_of(tokens.numpy()[0], gradient, prefix) for gradient in gradients]), scores.numpy()


def _image(channels_first: bool = False) -> Array:
    shape = (1, 3, *_IMAGE) if channels_first else (1, *_IMAGE, 3)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


# The class token reads the last block's patches through its attention; a mean reads them all to the end.
@pytest.mark.parametrize(("class_token", "automatic"), [(True, "norm1_1"), (False, "norm")])
def test_tokens_of_a_keras_model_are_maps(class_token: bool, automatic: str, tmp_path: Path) -> None:
    model, image = _keras_transformer(class_token), _image()
    assert fastcam.export(model, tmp_path / "automatic.onnx").layer == automatic
    for layer in (automatic, "sum1_0", "norm2_0"):
        result = fastcam.export(model, tmp_path / "explained.onnx", layer=layer)
        assert layer in result.candidates
        _check(tmp_path / "explained.onnx", image, *_tape(model, layer, image, prefix=int(class_token)))


def test_patches_that_the_scores_do_not_read_are_refused(tmp_path: Path) -> None:
    model = _keras_transformer(class_token=True)
    for layer in ("norm", "sum1_1", "sum2_1"):
        with pytest.raises(LayerError, match=rf"only the first 1 tokens of layer '{layer}'.*candidates: norm1_1"):
            fastcam.export(model, tmp_path / "out.onnx", layer=layer)
    assert not list(tmp_path.iterdir())


def test_a_grid_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = _keras_transformer(class_token=True)
    with pytest.raises(LayerError, match=r"\(4, 5\) does not fit it"):
        fastcam.export(model, tmp_path / "out.onnx", layer="norm1_1", token_grid=(4, 5))


def _torch_transformer(registers: int, pooled: bool) -> Any:
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")
    nn = torch.nn
    Module: Any = nn.Module
    torch.manual_seed(2)

    class Attention(Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(_CHANNELS, 3 * _CHANNELS), nn.Linear(_CHANNELS, _CHANNELS)

        def forward(self, x: Any) -> Any:
            n, t, c = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(n, t, c))

    class Block(Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(_CHANNELS), nn.LayerNorm(_CHANNELS)
            self.attention = Attention()
            self.mlp = nn.Sequential(nn.Linear(_CHANNELS, 16), nn.GELU(), nn.Linear(16, _CHANNELS))

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class Transformer(Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, _CHANNELS, 4, 4)
            self.prefix = nn.Parameter(torch.randn(1, registers, _CHANNELS))
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.norm, self.head = nn.LayerNorm(_CHANNELS), nn.Linear(_CHANNELS, _CLASSES)

        def forward(self, image: Any) -> Any:
            x = self.patches(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
            return self.head(x.mean(dim=1) if pooled else x[:, 0])

    return Transformer().eval()


def _autograd(model: Any, module: Any, image: Array, prefix: int) -> tuple[Array, Array]:
    import torch

    kept: list[Any] = []
    hook = module.register_forward_hook(lambda _, __, output: kept.append(output))
    scores = model(torch.tensor(image))
    hook.remove()
    gradients = [torch.autograd.grad(scores[0, target], kept[0], retain_graph=True)[0][0] for target in _TARGETS]
    maps = [_map_of(kept[0][0].detach().numpy(), gradient.numpy(), prefix) for gradient in gradients]
    return np.stack(maps), scores.detach().numpy()


_TOKENS = pytest.mark.parametrize(
    ("prefix", "pooled"), [(1, False), (5, False), (0, True)], ids=["class token", "four registers", "mean"]
)


@pytest.mark.parametrize("opset", [18, 23])
@_TOKENS
@pytest.mark.filterwarnings("ignore")
def test_tokens_of_a_torch_model_are_maps(prefix: int, pooled: bool, opset: int, tmp_path: Path) -> None:
    model = _torch_transformer(prefix, pooled)
    image = _image(channels_first=True)
    _export_source(model, tmp_path / "source.onnx", opset)
    result = fastcam.export(tmp_path / "source.onnx", tmp_path / "explained.onnx", token_grid=_GRID)
    source = onnx.load(tmp_path / "source.onnx")
    produced = {output: node.op_type for node in source.graph.node for output in node.output}
    assert produced[result.layer] == "LayerNormalization"
    module = model.norm if pooled else model.blocks[1].norm1
    _check(tmp_path / "explained.onnx", image, *_autograd(model, module, image, prefix))


def _export_source(model: Any, path: Path, opset: int) -> None:
    import torch

    batch = torch.export.Dim("batch")
    example = torch.zeros(2, 3, *_IMAGE)
    torch.onnx.export(model, (example,), path, dynamic_shapes=({0: batch},), opset_version=opset, verbose=False)


def _attention_by_hand(model: Any, image: Array) -> tuple[list[Any], list[Any]]:
    """Return the attention weights (N,heads,T,T) of every block, and the tokens (N,T,C) after it."""
    import torch

    x = model.patches(torch.tensor(image)).flatten(2).transpose(1, 2)
    x = torch.cat([model.prefix.expand(len(x), -1, -1), x], dim=1)
    weights, states = [], []
    for block in model.blocks:
        n, t, c = x.shape
        q, k, v = block.attention.qkv(block.norm1(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / (c // 2) ** 0.5, dim=-1)
        x = x + block.attention.out((attention @ v).transpose(1, 2).reshape(n, t, c))
        x = x + block.mlp(block.norm2(x))
        weights.append(attention)
        states.append(x)
    return weights, states


@pytest.mark.parametrize("opset", [18, 23])
@_TOKENS
@pytest.mark.filterwarnings("ignore")
def test_attention_of_a_torch_model(prefix: int, pooled: bool, opset: int, tmp_path: Path) -> None:
    """Rollout: rows of a product of matrices. LeGrad: autograd of each block's own score (Bousselham et al., eq. 5)."""
    model = _torch_transformer(prefix, pooled)
    import torch

    _export_source(model, tmp_path / "source.onnx", opset)
    evidence = ["rollout_maps", "legrad_maps"]
    fastcam.export(tmp_path / "source.onnx", tmp_path / "explained.onnx", token_grid=_GRID, evidence=evidence)
    explainer = fastcam.Explainer(tmp_path / "explained.onnx", device="cpu")
    batch = np.concatenate([_image(channels_first=True), -_image(channels_first=True)])
    weights, states = _attention_by_hand(model, batch)
    rollout = torch.eye(weights[0].shape[-1])
    for attention in weights:
        rollout = (attention.mean(dim=1) / 2 + torch.eye(len(rollout[0])) / 2) @ rollout
    read = rollout.mean(dim=1) if pooled else rollout[:, 0]
    expected = read[:, prefix:].reshape(2, 1, *_GRID).detach().numpy()
    options: Any = {"size": "layer", "normalize": None}
    found = explainer(batch, _TARGETS, method="attentionrollout", **options).maps
    assert relative_error(found, np.broadcast_to(expected, found.shape)) < 1e-5

    def scores_of(state: Any) -> Any:
        normed = model.norm(state)
        return model.head(normed.mean(dim=1) if pooled else normed[:, 0])

    found = explainer(batch, _TARGETS, method="legrad", **options).maps
    for number, target in enumerate(_TARGETS):
        total = torch.zeros(2, weights[0].shape[-1])
        for attention, state in zip(weights, states, strict=True):
            score = scores_of(state)[:, target].sum()
            (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
            total += gradient.clamp(min=0).mean(dim=(1, 2))
        assert relative_error(found[:, number], total[:, prefix:].reshape(2, *_GRID).numpy()) < 1e-4


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_of_a_keras_model(class_token: bool, tmp_path: Path) -> None:
    model, image = _keras_transformer(class_token), _image()
    import keras

    evidence = ["rollout_maps", "legrad_maps"]
    fastcam.export(model, tmp_path / "explained.onnx", evidence=evidence)
    explainer = fastcam.Explainer(tmp_path / "explained.onnx", device="cpu")
    inner = keras.Model(model.inputs, [model.get_layer(f"norm1_{block}").output for block in range(2)])
    scores = [
        model.get_layer(f"attention_{block}")(one, one, return_attention_scores=True)[1].numpy()[0].mean(axis=0)
        for block, one in enumerate(inner([image]))
    ]
    identity = np.eye(len(scores[0]))
    first, second = ((one + identity) / 2 for one in scores)
    rows = second @ first
    prefix = int(class_token)
    read = rows[0] if class_token else rows.mean(axis=0)
    found = explainer(image, method="attentionrollout", size="layer", normalize=None).maps[0, 0]
    assert relative_error(found, read[prefix:].reshape(_GRID)) < 1e-4


@pytest.mark.parametrize("name", ["rollout_maps", "legrad_maps"])
def test_networks_without_attention_over_all_tokens_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"evidence='{name}' is for transformers .* the network has no attention"):
        fastcam.export(small_classifier().to_model(), tmp_path / "no.onnx", evidence=name)
    assert not list(tmp_path.iterdir())
