"""Several layers in one file: each explained as if alone, the reverse pass shared, heatmaps fused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, NetworkBuilder, relative_error, small_classifier

import fastcam
from fastcam.errors import ArgumentError, LayerError
from fastcam.kernels.reference import normalized, resized

_SIZE = (12, 12)


def _residual() -> onnx.ModelProto:
    """A skip around the middle layer with channels last in between, as in Keras' graphs."""
    net = NetworkBuilder(("batch", 12, 12, 3))
    first = net.add("Transpose", net.input, perm=[0, 3, 1, 2])
    stem = net.add("Relu", net.conv(first, (4, 3, 3, 3), pads=[1, 1, 1, 1]), name="stem")
    small = net.add("MaxPool", stem, kernel_shape=[2, 2], strides=[2, 2])
    middle = net.add("Sigmoid", net.conv(small, (4, 4, 3, 3), pads=[1, 1, 1, 1]), name="middle")
    last = net.add("Relu", net.conv(net.add("Mul", small, middle), (6, 4, 3, 3)), name="last")
    rows = net.add("Flatten", net.add("GlobalAveragePool", last))
    hidden = net.add("Relu", net.dense(rows, (6, 8)))
    return net.build(net.add("Softmax", net.dense(hidden, (8, 5)), axis=1)).to_model()


_NETWORKS: dict[str, tuple[Any, list[str], tuple[int, ...]]] = {
    "vgg": (lambda: small_classifier().to_model(), ["block2", "block1"], (2, 3, 12, 12)),
    "residual": (_residual, ["middle", "stem", "last"], (2, 12, 12, 3)),
}


@pytest.fixture(params=_NETWORKS)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Path], Array]:
    """The file with all layers, one file per layer, and images."""
    build, layers, shape = _NETWORKS[request.param]
    result = fastcam.export(build(), tmp_path / "all.onnx", layer=layers, gradients="full")
    assert result.layers == tuple(layers)
    assert result.layer == layers[0]
    single = {layer: tmp_path / f"{layer}.onnx" for layer in layers}
    for layer, path in single.items():
        fastcam.export(build(), path, layer=layer, gradients="full")
    images = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    return tmp_path / "all.onnx", single, images


def _outputs(path: Path, images: Array, *names: str) -> list[Array]:
    explainer = fastcam.Explainer(path)
    inputs = {explainer._session.get_inputs()[0].name: images, "target": np.array([[0, 3]], np.int64)}
    return list(explainer._session.run(list(names), inputs))


def test_each_layer_is_explained_as_if_it_were_alone(files: tuple[Path, dict[str, Path], Array]) -> None:
    together, single, images = files
    explainer = fastcam.Explainer(together)
    assert explainer.layers == tuple(single)
    for position, (layer, path) in enumerate(single.items()):
        suffix = f"_{position}" if position else ""
        alone = _outputs(path, images, "activations", "weights", "gradients")
        found = _outputs(together, images, *(f"{name}{suffix}" for name in ("activations", "weights", "gradients")))
        for one, other in zip(found, alone, strict=True):
            assert relative_error(one, other) < 1e-6
        expected = fastcam.Explainer(path)(images, "top2", size="layer")
        maps = explainer(images, "top2", layer=layer, size="layer")
        np.testing.assert_allclose(maps.heatmaps, expected.heatmaps, atol=1e-6)
    first = fastcam.Explainer(single[explainer.layer])(images)
    np.testing.assert_allclose(explainer(images).heatmaps, first.heatmaps, atol=1e-6)


@pytest.mark.parametrize("normalize", ["max", "minmax", None])
def test_fused_heatmaps_are_the_mean_normalised_again(
    files: tuple[Path, dict[str, Path], Array], normalize: Any
) -> None:
    together, single, images = files
    layers = list(single)[::-1]
    maps = [fastcam.Explainer(single[layer])(images, "top2", normalize=normalize).maps for layer in layers]
    largest = max((one.shape[2:] for one in maps), key=lambda size: size[0] * size[1])
    found = fastcam.Explainer(together)(images, "top2", layer=layers, normalize=normalize)
    for size, fused in ((_SIZE, found.heatmaps), (largest, found.maps)):
        mean = np.mean([resized(one.astype(np.float64), size) for one in maps], axis=0)
        assert relative_error(fused, normalized(mean, normalize)) < 1e-5


def test_the_reverse_pass_is_shared(tmp_path: Path) -> None:
    """The shallow layer's gradient goes through the deep one's: what the deep one needs is computed once."""
    counts = {}
    for name, layers in {"shallow": ["stem"], "both": ["stem", "last"]}.items():
        fastcam.export(_residual(), tmp_path / f"{name}.onnx", layer=layers)
        counts[name] = Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node)
    # The mean over the map of the deep layer's gradient, scaled and transposed, no second chain to it.
    more = counts["both"] - counts["shallow"]
    assert set(more) <= {"Transpose", "Mul", "Squeeze", "ReduceSum"}
    assert more.total() <= 4


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ([], ArgumentError, r"layer=\[\]: give the name"),
        (["block1", 3], ArgumentError, "list of names"),
        (3, ArgumentError, "layer=3"),
        (["block1", "block3"], LayerError, "no layer 'block3': did you mean"),
        (["block1", "block1"], LayerError, "'block1' and 'block1' are the same value"),
        (["block1", "block1_node"], LayerError, "'block1' and 'block1_node' are the same value"),
    ],
)
def test_wrong_layers_are_refused(layer: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        fastcam.export(small_classifier().to_model(), tmp_path / "out.onnx", layer=layer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("block3", "did you mean 'block[12]'"),
        ([], r"layer=\[\]"),
        (["block1", "block1"], "different"),
        (["block1", "block10"], "does not explain"),
    ],
)
def test_a_layer_that_the_file_does_not_explain_is_refused(layer: Any, message: str, tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "two.onnx", layer=["block2", "block1"])
    with pytest.raises(LayerError, match=message):
        fastcam.Explainer(tmp_path / "two.onnx")(np.zeros((1, 3, 12, 12), np.float32), layer=layer)


def test_names_of_the_format_give_way_in_the_source(tmp_path: Path) -> None:
    """Layers with the names that other layers' outputs will get."""
    model = small_classifier().to_model()
    swapped = {"block1": "activations", "block2": "activations_1", "pool1": "weights", "scores": "weights_1"}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [swapped.get(name, name) for name in names]
    images = np.random.default_rng(5).normal(size=(2, 3, 12, 12)).astype(np.float32)
    fastcam.export(model, tmp_path / "named.onnx", layer=["activations", "activations_1"])
    fastcam.export(small_classifier().to_model(), tmp_path / "plain.onnx", layer=["block1", "block2"])
    assert fastcam.Explainer(tmp_path / "named.onnx").layers == ("activations", "activations_1")
    for name in ("activations", "weights", "activations_1", "weights_1", "logits"):
        found, expected = (_outputs(tmp_path / f"{file}.onnx", images, name)[0] for file in ("named", "plain"))
        np.testing.assert_array_equal(found, expected)
