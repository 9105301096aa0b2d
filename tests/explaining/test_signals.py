"""Networks for series and volumes, against automatic differentiation and interpolation in torch and TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastcam

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")
nn = torch.nn
Module: Any = nn.Module

_LAYERS = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
}
# Odd sizes, and different ones along every axis: swapped axes cannot pass.
_SHAPES = {1: (2, 101), 3: (2, 15, 18, 22)}
# A place near 50 on the map has 50 * 2**-24 = 3e-6 of rounding error, in each of two implementations.
_ROUNDING = 1e-5
_MODES = {1: "linear", 3: "trilinear"}


def _network(axes: int) -> Any:
    torch.manual_seed(axes)
    convolution, normalization, pooling, average = _LAYERS[axes]
    layers = [
        *(convolution(2, 6, 3, padding=1), normalization(6), nn.ReLU(), pooling(2)),
        *(convolution(6, 8, 3), nn.ELU(), average(1), nn.Flatten(), nn.Linear(8, 3)),
    ]
    network = nn.Sequential(*layers).eval()
    network[1].running_mean.uniform_(-1, 1)
    network[1].running_var.uniform_(0.5, 2)
    return network


def _batch(axes: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(axes).standard_normal((count, *_SHAPES[axes])).astype(np.float32)


def _differentiated(network: Any, batch: np.ndarray, target: int) -> tuple[Any, Any]:
    """Return the activations of the last convolution's ELU, and the target's gradients, in double precision."""
    network = network.double()
    activations = network[:6](torch.from_numpy(batch).double())
    activations.retain_grad()
    network[6:](activations)[:, target].sum().backward()
    network.float()
    return activations.detach(), activations.grad


def _by_weights(activations: Any, gradients: Any) -> Any:
    axes = tuple(range(2, activations.ndim))
    return (activations * gradients.mean(axes, keepdim=True)).sum(1)


def _exported(axes: int, folder: Path, **options: Any) -> fastcam.Explainer:
    path = folder / f"axes{axes}.onnx"
    result = fastcam.export(_network(axes), path, example_input=torch.zeros(1, *_SHAPES[axes]), layer="5", **options)
    assert result.input_layout == {1: "NCT", 3: "NCDHW"}[axes]
    return fastcam.Explainer(path, device="cpu")


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("target", [0, 2])
def test_grad_cam_equals_autograd_and_torch_interpolation(axes: int, target: int, tmp_path: Path) -> None:
    batch = _batch(axes)
    raw = _by_weights(*_differentiated(_network(axes), batch, target))
    expected = torch.relu(raw)
    explainer = _exported(axes, tmp_path)
    found = explainer(batch, target=target, normalize=None)
    scale = float(expected.max())
    assert np.abs(found.maps[:, 0] - expected.numpy()).max() < 1e-5 * scale
    enlarged = nn.functional.interpolate(expected[:, None], size=_SHAPES[axes][1:], mode=_MODES[axes])[:, 0]
    assert np.abs(found.heatmaps[:, 0] - enlarged.numpy()).max() < 1e-5 * scale
    positive, magnitudes = (part.flatten(1).sum(1).numpy() for part in (expected, raw.abs()))
    assert np.abs(found.evidence[:, 0] - positive / magnitudes).max() < 1e-5


@pytest.mark.parametrize("axes", [1, 3])
def test_elementwise_gradients_equal_autograd(axes: int, tmp_path: Path) -> None:
    batch = _batch(axes)
    activations, gradients = _differentiated(_network(axes), batch, 1)
    expected = torch.relu((activations * gradients).sum(1)).numpy()
    found = _exported(axes, tmp_path, gradients="full")(batch, 1, method="hirescam", normalize=None, size="layer")
    assert np.abs(found.heatmaps[:, 0] - expected).max() < 1e-5 * expected.max()
    assert np.array_equal(found.heatmaps, found.maps)


class _ChannelsLast(Module):
    """Normalises the channels of a map, as ConvNeXt does, and leaves them last."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        torch.manual_seed(axes)
        self.convolution = _LAYERS[axes][0](2, 6, 3)
        self.normalization = nn.LayerNorm(6)
        self.dense = nn.Linear(6, 3)
        self.places = nn.Parameter(torch.rand(*(side - 2 for side in _SHAPES[axes][1:]), 1))

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x))

    def features(self, x: Any) -> Any:
        x = self.convolution(x)
        return self.normalization(x.permute(0, *range(2, x.ndim), 1))

    def head(self, x: Any) -> Any:
        # Depends on the place: reordered axes change the scores too.
        return self.dense((torch.sigmoid(x) * self.places).flatten(1, -2).mean(1))


@pytest.mark.parametrize("axes", [1, 3])
def test_a_layer_with_the_channels_last(axes: int, tmp_path: Path) -> None:
    network, batch = _ChannelsLast(axes).eval(), _batch(axes)
    activations = network.features(torch.from_numpy(batch))
    activations.retain_grad()
    network.head(activations)[:, 1].sum().backward()
    expected = torch.relu((activations * activations.grad).sum(-1)).detach().numpy()
    path = tmp_path / "last.onnx"
    example = torch.zeros(1, *_SHAPES[axes])
    fastcam.export(network, path, example_input=example, layer="normalization", gradients="full")
    found = fastcam.Explainer(path, device="cpu")(batch, 1, method="hirescam", normalize=None, size="layer")
    assert np.abs(found.logits - network(torch.from_numpy(batch)).detach().numpy()).max() < 1e-5
    assert np.abs(found.maps[:, 0] - expected).max() < 1e-4 * expected.max()


@pytest.mark.parametrize("axes", [1, 3])
def test_signed_and_contrasted_maps(axes: int, tmp_path: Path) -> None:
    batch = _batch(axes)
    first, second = (_by_weights(*_differentiated(_network(axes), batch, target)) for target in (0, 1))
    explainer = _exported(axes, tmp_path)
    for expected, options in ((first, {}), (first - second, {"against": 1}), (-first, {"counterfactual": True})):
        top = expected.abs().flatten(1).amax(1).reshape(-1, *[1] * axes)
        found = explainer(batch, 0, normalize="signed", **options)
        assert np.abs(found.maps[:, 0] - (expected / top).numpy()).max() < 1e-4


@pytest.mark.parametrize("size", [(7,), (203,), (1,)])
def test_a_series_at_any_size(size: tuple[int], tmp_path: Path) -> None:
    batch = _batch(1)
    explainer = _exported(1, tmp_path)
    small = explainer(batch, 0, size="layer", normalize=None).maps
    expected = nn.functional.interpolate(torch.from_numpy(small), size=size, mode="linear").numpy()
    assert np.abs(explainer(batch, 0, size=size, normalize=None).heatmaps - expected).max() < _ROUNDING * small.max()


@pytest.mark.parametrize("size", [(4, 30, 9), (31, 5, 22), (1, 1, 1)])
def test_a_volume_at_any_size(size: tuple[int, int, int], tmp_path: Path) -> None:
    batch = _batch(3)
    explainer = _exported(3, tmp_path)
    small = explainer(batch, 0, size="layer", normalize=None).maps
    expected = nn.functional.interpolate(torch.from_numpy(small), size=size, mode="trilinear").numpy()
    assert np.abs(explainer(batch, 0, size=size, normalize=None).heatmaps - expected).max() < _ROUNDING * small.max()


@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_many_and_lists(axes: int, tmp_path: Path) -> None:
    batch = _batch(axes)
    explainer = _exported(axes, tmp_path)
    whole = explainer(batch)
    assert whole.targets.shape == (3, 1)
    for images in (list(batch), torch.from_numpy(batch), batch.astype(np.float64)):
        assert np.array_equal(explainer(images).heatmaps, whole.heatmaps)
    assert np.allclose(explainer(batch[1]).heatmaps[0], whole.heatmaps[1], atol=1e-5)
    assert np.allclose(explainer(torch.from_numpy(batch[1])).heatmaps[0], whole.heatmaps[1], atol=1e-5)


@pytest.mark.parametrize("axes", [1, 3])
def test_what_does_not_fit_is_refused(axes: int, tmp_path: Path) -> None:
    batch = _batch(axes)
    explainer = _exported(axes, tmp_path)
    broken = batch.copy()
    broken[1].flat[5] = np.nan
    with pytest.raises(fastcam.ImageError, match=r"number 1 of the .* NaN"):
        explainer(broken)
    with pytest.raises(fastcam.ImageError, match="resample it first"):
        explainer(batch[..., :-1])
    with pytest.raises(fastcam.ImageError, match=r"takes (series|volumes)"):
        explainer("photo.jpg")
    with pytest.raises(fastcam.ImageError, match="no images"):
        explainer([])
    with pytest.raises(fastcam.ImageError, match="not pictures"):
        _ = explainer.input_size
    with pytest.raises(fastcam.ArgumentError, match="size="):
        explainer(batch, size=(3, 3))
    with pytest.raises(fastcam.ArgumentError, match="changes pictures"):
        explainer(batch, method="scorecam")
    with pytest.raises(fastcam.ArgumentError, match="on_device"):
        explainer(batch, on_device=True)
    with pytest.raises(fastcam.ArgumentError, match="no picture"):
        explainer(batch)[0].overlay()


@pytest.mark.parametrize(
    "options", [{"draw": "jet"}, {"preprocess": "imagenet"}, {"gradients": "image"}, {"score": "boxes"}]
)
def test_options_for_pictures_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(fastcam.FastcamError):
        _exported(3, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("axes", [1, 3])
def test_keras_equals_gradient_tape(axes: int, tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(axes)
    layers = keras.layers
    shape = {1: (61, 2), 3: (9, 12, 14, 2)}[axes]
    convolution, pooling, average = {
        1: (layers.Conv1D, layers.MaxPooling1D, layers.GlobalAveragePooling1D),
        3: (layers.Conv3D, layers.MaxPooling3D, layers.GlobalAveragePooling3D),
    }[axes]
    model = keras.Sequential(
        [
            keras.Input(shape),
            *(convolution(6, 3, activation="relu", padding="same"), pooling()),
            *(convolution(8, 3, activation="elu", name="last"), average(), layers.Dense(3, activation="softmax")),
        ]
    )
    batch = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    inner = keras.Model(model.inputs[0], [model.get_layer("last").output, model.layers[-2].output])
    with tf.GradientTape() as tape:
        activations, features = inner(batch)
        kernel, bias = model.layers[-1].weights
        score = tf.reduce_sum((features @ kernel + bias)[:, 1])
    gradients = tape.gradient(score, activations).numpy()
    axes_of_map = tuple(range(1, axes + 1))
    raw = (activations.numpy() * gradients.mean(axes_of_map, keepdims=True)).sum(-1)
    expected = np.maximum(raw, 0)
    result = fastcam.export(model, tmp_path / "keras.onnx", layer="last")
    assert result.input_layout == {1: "NTC", 3: "NDHWC"}[axes]
    explainer = fastcam.Explainer(result.path, device="cpu")
    found = explainer(batch, target=1, normalize=None)
    assert np.abs(found.maps[:, 0] - expected).max() < 1e-5 * np.abs(raw).max()
    assert found[0].signal.shape == (2, *shape[:-1])
    assert fastcam.export(model, tmp_path / "automatic.onnx").layer != ""


def test_a_nifti_image_keeps_its_place(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="pip install nibabel")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    fastcam.export(network.eval(), tmp_path / "scan.onnx", example_input=torch.zeros(1, 1, 10, 12, 7))
    explainer = fastcam.Explainer(tmp_path / "scan.onnx", device="cpu")
    data = np.random.default_rng(0).integers(0, 200, (10, 12, 7)).astype(np.int16)
    # Rotated, mirrored, and of different spacing along each axis.
    affine = np.array([[0, -0.9, 0, 11], [1.5, 0, 0, -3], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_slope_inter(0.5, 3)
    image.to_filename(tmp_path / "scan.nii.gz")
    expected = explainer(data.astype(np.float32) * 0.5 + 3, 1).heatmaps[0, 0]
    assert expected.max() == 1
    explanation = explainer(tmp_path / "scan.nii.gz", 1)[0]
    for name in ("heat.nii", "heat.nii.gz"):
        explanation.save(tmp_path / name)
        written = nibabel.load(tmp_path / name)
        assert np.array_equal(written.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
        assert np.allclose(written.get_fdata(), expected, atol=1e-6)
    explanation.save(tmp_path / "heat.npy")
    assert np.allclose(np.load(tmp_path / "heat.npy"), expected, atol=1e-6)
    aspects = [panel.get_aspect() for panel in explanation.plot()]
    assert np.allclose(aspects, [0.9 / 4.0, 1.5 / 4.0, 1.5 / 0.9])
    assert np.array_equal(explainer(nibabel.load(tmp_path / "scan.nii.gz"), 1).heatmaps[0, 0], explanation.heatmaps[0])
    with pytest.raises(fastcam.ArgumentError, match="affine"):
        explainer(data, 1)[0].save(tmp_path / "none.nii")
    (tmp_path / "broken.nii").write_bytes(b"no image")
    with pytest.raises(fastcam.ImageError, match="broken"):
        explainer(tmp_path / "broken.nii")


@pytest.mark.parametrize("axes", [1, 3])
def test_plots_show_the_heatmap(axes: int, tmp_path: Path) -> None:
    batch = _batch(axes)
    explanation = _exported(axes, tmp_path)(batch, "top2")[0]
    panels = explanation.plot()
    assert len(panels) == {1: 2, 3: 6}[axes]
    drawn = [np.asarray(image.get_array()) for image in panels[0].images]
    heatmap = explanation.heatmaps[0]
    peak = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert np.array_equal(drawn[-1], heatmap[None] if axes == 1 else heatmap[peak[0]])
    if axes == 3:
        assert np.array_equal(drawn[0], batch[0, 0][peak[0]])
    explanation.save(tmp_path / "plot.png", k=1)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in explanation._repr_html_()


def test_facts_and_damaged_files(tmp_path: Path) -> None:
    import onnx
    from click.testing import CliRunner

    from fastcam.cli import commands

    explainer = _exported(3, tmp_path)
    # Half of the input, without the border that the second convolution loses.
    assert explainer.map_shapes == ((5, 7, 9),)
    assert fastcam.inspect(explainer.path).layers == {"5": (8, 5, 7, 9)}
    printed = CliRunner().invoke(commands, ["info", str(explainer.path)]).output
    assert "8 channels of 5 x 7 x 9" in printed
    assert "--preprocess" not in printed
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    refused = CliRunner().invoke(commands, ["explain", str(explainer.path), str(tmp_path), "-o", str(tmp_path / "out")])
    assert isinstance(refused.exception, fastcam.ImageError)
    assert "takes volumes, not pictures" in str(refused.exception)
    model = onnx.load(explainer.path)
    for shapes in ("[[5, 7]]", "[]", "[[5, -7, -9]]", "[[5, 7, 9], [1]]", '"x"'):
        for item in model.metadata_props:
            item.value = shapes if item.key == "fastcam.map_shapes" else item.value
        onnx.save(model, tmp_path / "damaged.onnx")
        with pytest.raises(fastcam.FileFormatError, match="map_shapes"):
            fastcam.Explainer(tmp_path / "damaged.onnx", device="cpu")


@pytest.mark.parametrize(
    "pooling", ["MaxPool1d(3, 2, 1)", "AvgPool1d(3, 2, 1)", "MaxPool1d(2, dilation=3, ceil_mode=True)"]
)
def test_pools_of_series_are_rows_of_pictures(pooling: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), eval(f"nn.{pooling}"), nn.Flatten(), nn.LazyLinear(3)).eval()
    batch = _batch(1)
    torch.manual_seed(1)
    with torch.no_grad():
        network(torch.from_numpy(batch))
    activations = network[:2](torch.from_numpy(batch))
    activations.retain_grad()
    scores = network[2:](activations)
    scores[:, 1].sum().backward()
    expected = torch.relu((activations * activations.grad).sum(1)).detach().numpy()
    path = tmp_path / "pools.onnx"
    fastcam.export(network, path, example_input=torch.zeros(1, *_SHAPES[1]), layer="1", gradients="full")
    found = fastcam.Explainer(path, device="cpu")(batch, 1, method="hirescam", normalize=None, size="layer")
    assert np.abs(found.logits - scores.detach().numpy()).max() < 1e-5
    assert np.abs(found.maps[:, 0] - expected).max() < 1e-5 * expected.max()


def test_plots_and_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    explanation = _exported(3, tmp_path)(_batch(3))[0]
    with pytest.raises(fastcam.ArgumentError, match="unknown suffix"):
        explanation.save(tmp_path / "heat.txt")
    with pytest.raises(fastcam.ArgumentError, match="give 3, 3 per target"):
        explanation.plot(axes=[])
    for spacing in ((1, 2), (1, 2, 0), "abc", (1, 2, float("inf")), 3):
        with pytest.raises(fastcam.ArgumentError, match="three numbers above 0"):
            explanation.plot(spacing=spacing)
    with pytest.raises(fastcam.ArgumentError, match="k=4"):
        explanation.plot(k=4)
    panels = explanation.plot(spacing=(3, 2, 1))
    assert [panel.get_aspect() for panel in panels] == [2, 3, 1.5]


def test_channels_of_a_nifti_image_come_last(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="pip install nibabel")
    explainer, volume = _exported(3, tmp_path), _batch(3, 1)[0]
    image = nibabel.Nifti1Image(np.moveaxis(volume, 0, -1), np.eye(4))
    assert np.array_equal(explainer(image).heatmaps, explainer(volume).heatmaps)
    image.to_filename(tmp_path / "cut.nii")
    content = (tmp_path / "cut.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes(content[: len(content) // 2])
    with pytest.raises(fastcam.ImageError, match="cannot be read"):
        explainer(tmp_path / "cut.nii")
    with pytest.raises(fastcam.ImageError, match="pass numbers"):
        explainer(np.array(["text"]))
