"""Fixed batches: made dynamic if three images at once give the same as each alone, else kept with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import Array, relative_error, small_classifier
from small_networks import SIDE, SOUND_NETWORKS, classified, features

import fastcam


def _run(model: onnx.ModelProto, images: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores: Array = session.run(None, {"image": images})[0]
    return scores


# 8 is also the height, the width and half of the classes: a size that is not the batch must not become it.
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("network", SOUND_NETWORKS.values(), ids=SOUND_NETWORKS)
def test_a_batch_is_opened_where_no_op_mixes_images(
    network: Callable[[int], onnx.ModelProto], batch: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = network(batch)
    result = fastcam.export(model, tmp_path / "open.onnx")
    assert result.input_shape == ("batch", 3, SIDE, SIDE)
    assert any(f"fixed at {batch} and is open now" in note for note in result.notes)
    images = rng.normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)
    explainer = fastcam.Explainer(tmp_path / "open.onnx")
    together, alone = explainer(images, "top2"), [explainer(images[[index]], "top2") for index in range(3)]
    # Every image in the first row of a whole batch of others.
    others = rng.normal(size=(batch - 1, 3, SIDE, SIDE)).astype(np.float32)
    expected = [_run(model, np.concatenate([images[[index]], others]))[0] for index in range(3)]
    assert relative_error(together.probabilities, expected) < 1e-5
    assert relative_error(together.heatmaps, np.concatenate([one.heatmaps for one in alone])) < 1e-5


def _merged_rows(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    pixels = net.add("Reshape", net.add("Transpose", value, perm=[0, 2, 3, 1]), net.constant([batch * 64, 4]))
    back = net.add("Reshape", net.dense(pixels, (4, 4)), net.constant([batch, 256]))
    return classified(net, back, 256)


def _softmax_over_images(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    return classified(net, net.add("Flatten", net.add("Softmax", value, axis=0)), 256)


def _mean_over_images(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    mean = net.add("ReduceMean", value, net.constant([0]), keepdims=1)
    return classified(net, net.add("Flatten", net.add("Sub", value, mean)), 256)


def _constant_for_each(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    each = net.constant(np.arange(1, batch + 1, dtype=np.float32).reshape(-1, 1, 1, 1))
    return classified(net, net.add("Flatten", net.add("Mul", value, each)), 256)


def _joined_constant(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    token = net.constant(np.ones((batch, 1, SIDE, SIDE), np.float32))
    return classified(net, net.add("Flatten", net.add("Concat", value, token, axis=1)), 320)


def _reversed_images(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    order = net.constant(np.arange(batch)[::-1].copy())
    return classified(net, net.add("Flatten", net.add("Add", value, net.add("Gather", value, order, axis=0))), 256)


def _products_of_images(batch: int) -> onnx.ModelProto:
    net, value = features(batch)
    rows = net.add("Flatten", value)
    likeness = net.add("MatMul", rows, net.add("Transpose", rows, perm=[1, 0]))
    return classified(net, net.add("MatMul", likeness, rows), 256)


_UNSOUND: dict[str, Callable[[int], onnx.ModelProto]] = {
    "Reshape": _merged_rows,
    "Softmax": _softmax_over_images,
    "ReduceMean": _mean_over_images,
    "Mul": _constant_for_each,
    "contradict|Concat": _joined_constant,
    "Gather": _reversed_images,
    "Transpose": _products_of_images,
}


@pytest.mark.parametrize("op", _UNSOUND)
def test_a_batch_is_kept_where_images_meet(op: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = _UNSOUND[op](2)
    result = fastcam.export(model, tmp_path / "fixed.onnx")
    assert result.input_shape == (2, 3, SIDE, SIDE)
    (note,) = result.notes
    assert "fixed at 2" in note
    assert any(word in note for word in op.split("|"))
    images = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    found = fastcam.Explainer(tmp_path / "fixed.onnx")(images)
    assert relative_error(found.probabilities, _run(model, images)) < 1e-5


def test_an_op_that_is_not_known_keeps_the_batch(tmp_path: Path) -> None:
    model = small_classifier(batch=1, keeps_batch=True).to_model()
    (note,) = fastcam.export(model, tmp_path / "fixed.onnx").notes
    assert "Einsum" in note
    assert "not known to treat images one by one" in note


def test_an_open_batch_needs_no_note(tmp_path: Path) -> None:
    assert fastcam.export(small_classifier().to_model(), tmp_path / "open.onnx").notes == ()
