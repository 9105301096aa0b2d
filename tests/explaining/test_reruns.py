"""Methods that run the model again: masks, ablations, gradients of the image. Peers: `oracles/test_peer_methods.py`."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from detector_graphs import one_map_detector
from networks import Array, NetworkBuilder, relative_error, small_classifier
from PIL import Image
from segmentation_graphs import segmenter

import fastcam
from fastcam.errors import ArgumentError, ImageError
from fastcam.explaining.methods import METHODS

# Those of transformers: `oracles/test_transformers.py`.
_ATTENTION = ("attentionrollout", "legrad")
_RERUNS = [name for name, row in METHODS.items() if row.reruns is not None and name not in _ATTENTION]
_BACKGROUND = np.random.default_rng(8).normal(size=(3, 3, 12, 12)).astype(np.float32)
# Few runs, so that the tests are fast.
_FEW: dict[str, dict[str, Any]] = {
    "sscam": {"samples": 2},
    "iscam": {"samples": 3},
    "rise": {"masks": 40, "grid": 3},
    "occlusion": {"window": 0.4},
    "smoothgrad": {"samples": 3},
    "smoothgradcam++": {"samples": 3},
    "integratedgradients": {"steps": 5},
    "expectedgradients": {"samples": 5},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reruns") / "small.onnx"
    _export(path)
    return path


def _export(path: Path, **options: Any) -> None:
    evidence = ["guided_gradients", "bias_maps", "curvatures"]
    model = small_classifier(**options).to_model()
    fastcam.export(model, path, gradients="image", evidence=evidence, preprocess="imagenet")


def _open(path: Path) -> fastcam.Explainer:
    return fastcam.Explainer(path, device="cpu", threads=1, background=_BACKGROUND)


@pytest.fixture(scope="module")
def explainer(path: Path) -> fastcam.Explainer:
    return _open(path)


@pytest.fixture
def batch(rng: np.random.Generator) -> Array:
    return rng.normal(size=(3, 3, 12, 12)).astype(np.float32)


def _linear(path: Path, rng: np.random.Generator) -> tuple[fastcam.Explainer, Array]:
    """Export a network whose scores are W x, and return W (2,3,8,8)."""
    net = NetworkBuilder(("batch", 3, 8, 8))
    weights = rng.normal(size=(192, 2)).astype(np.float32)
    layer = net.add("Identity", net.add("Mul", net.input, net.constant(np.float32(1))), name="layer")
    net.build(net.add("MatMul", net.add("Flatten", layer), net.constant(weights)))
    fastcam.export(net.graph.to_model(), path, layer="layer", gradients="image", evidence="bias_maps", score="values")
    return fastcam.Explainer(path, device="cpu", threads=1), weights.T.reshape(2, 3, 8, 8)


def _raw(explainer: fastcam.Explainer, batch: Array, target: Any, method: str, **settings: Any) -> Array:
    """The map before its ReLU, up to its scale."""
    found = explainer(batch, target, method=method, normalize="signed", size="layer", settings=settings)
    return np.asarray(found.maps)


def _scaled(maps: Array) -> Array:
    return np.asarray(maps / np.abs(maps).max(axis=(-2, -1), keepdims=True))


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def test_the_image_gradient_of_a_linear_score_is_its_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    explainer, weights = _linear(tmp_path / "linear.onnx", rng)
    batch = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    found = explainer(batch, [0, 1], method="saliency", normalize=None, size="layer").maps
    assert relative_error(found, np.broadcast_to(np.abs(weights).max(axis=1), found.shape)) < 1e-6


def test_full_gradients_of_a_linear_score_are_its_scaled_products(tmp_path: Path, rng: np.random.Generator) -> None:
    """Without biases: W x, whose magnitudes are scaled to 0..1 over channels and pixels (eq. 6)."""
    explainer, weights = _linear(tmp_path / "linear.onnx", rng)
    # Far from 0, so that the smallest product counts.
    batch = (np.sign(weights[:1]) / (0.5 + np.abs(weights[:1]))).astype(np.float32)
    sizes = np.abs(weights * batch)
    low, high = (one(sizes, axis=(1, 2, 3), keepdims=True) for one in (np.min, np.max))
    assert low[0] > 0.01
    found = explainer(batch, [0, 1], method="fullgrad", normalize=None, size="layer").maps[0]
    assert relative_error(found, ((sizes - low) / (high - low)).sum(axis=1)) < 1e-5


def test_integrated_gradients_add_up_to_the_score(tmp_path: Path, rng: np.random.Generator) -> None:
    """Completeness (Sundararajan et al. 2017, proposition 1), here exact: W x for each pixel."""
    explainer, weights = _linear(tmp_path / "linear.onnx", rng)
    batch = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    expected = (weights * batch).sum(axis=1)
    found = _raw(explainer, batch, [0, 1], "integratedgradients", steps=3)[0]
    assert relative_error(found, _scaled(expected)) < 1e-5


def test_image_gradients_are_finite_differences(path: Path, batch: Array) -> None:
    session = _session(path)
    image, target = batch[:1].astype(np.float64), np.array([[2]])

    def score(changed: Array) -> float:
        return float(session.run(["logits"], {"image": changed.astype(np.float32), "target": target})[0][0, 2])

    gradient = session.run(["image_gradients"], {"image": batch[:1], "target": target})[0][0, 0]
    random = np.random.default_rng(0)
    for _ in range(5):
        direction = random.normal(size=image.shape)
        step = 1e-3
        measured = (score(image + step * direction) - score(image - step * direction)) / (2 * step)
        # float32 scores near 1 differ by 1e-7, divided by the step: 1e-4.
        assert measured == pytest.approx(float((gradient * direction[0]).sum()), abs=2e-3)


def test_occlusion_of_a_linear_score_is_the_weighted_sum_in_the_window(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    explainer, weights = _linear(tmp_path / "linear.onnx", rng)
    batch = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    each = (weights[1] * batch[0]).sum(axis=0)
    windows = each.reshape(4, 2, 4, 2).sum(axis=(1, 3))
    found = _raw(explainer, batch, 1, "occlusion", window=0.25, stride=1.0)[0, 0]
    assert relative_error(found, _scaled(np.kron(windows, np.ones((2, 2))))) < 1e-5


def test_rise_is_the_weighted_mean_of_its_masks(
    path: Path, explainer: fastcam.Explainer, batch: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks as they were given to the model, and probabilities from a session of our own."""
    seen: list[Array] = []
    run = explainer._reruns.runner.run

    def watched(fetched: Any, tensor: Array, *rest: Any) -> Any:
        if list(fetched) == ["logits"]:
            seen.append(tensor)
        return run(fetched, tensor, *rest)

    monkeypatch.setattr(explainer._reruns.runner, "run", watched)
    found = _raw(explainer, batch[:1], 3, "rise", masks=50, grid=3)[0, 0]
    masked = np.concatenate(seen)
    assert len(masked) == 50
    masks = (masked / batch[:1]).mean(axis=1).astype(np.float64)
    assert masks.min() >= -1e-6
    assert masks.max() <= 1 + 1e-6
    # Half of the cells are shown, and not the same ones in every mask.
    assert 0.4 < masks.mean() < 0.6
    assert masks.std(axis=0).min() > 0.1
    logits = _session(path).run(["logits"], {"image": masked})[0].astype(np.float64)
    powers = np.exp(logits)
    probabilities = (powers / powers.sum(axis=1, keepdims=True))[:, 3]
    expected = np.einsum("m,mhw->hw", probabilities - probabilities.mean(), masks)
    assert relative_error(found, _scaled(expected)) < 1e-3


def test_rise_finds_what_a_score_depends_on(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 32, 32))
    weights = np.zeros((3, 32, 32, 1), np.float32)
    weights[:, 20:28, 4:12] = 1
    layer = net.add("Identity", net.add("Mul", net.input, net.constant(np.float32(1))), name="layer")
    net.build(net.add("MatMul", net.add("Flatten", layer), net.constant(weights.reshape(-1, 1))))
    fastcam.export(net.graph.to_model(), tmp_path / "corner.onnx", layer="layer", score="values")
    explainer = fastcam.Explainer(tmp_path / "corner.onnx", device="cpu")
    found = explainer(np.ones((1, 3, 32, 32), np.float32), method="rise", settings={"masks": 500}).heatmaps[0, 0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert 20 <= row < 28
    assert 4 <= column < 12
    assert found[20:28, 4:12].mean() > 5 * found[:16, 16:].mean()


def test_channels_that_are_the_same_everywhere_are_scored_once(
    explainer: fastcam.Explainer, monkeypatch: pytest.MonkeyPatch, batch: Array
) -> None:
    """An image of zeros: the activations of most channels vary only at the border, those of some not at all."""
    runs = 0
    run = explainer._reruns.runner.run

    def counted(fetched: Any, tensor: Array, *rest: Any) -> Any:
        nonlocal runs
        runs += len(tensor) if list(fetched) == ["logits"] else 0
        return run(fetched, tensor, *rest)

    monkeypatch.setattr(explainer._reruns.runner, "run", counted)
    image = np.where(np.arange(12)[:, None] < 6, batch[:1], 0).astype(np.float32)
    activations = _session(explainer.path).run(["activations"], {"image": image})[0][0]
    varied = int((np.ptp(activations, axis=(1, 2)) > 0).sum())
    explainer(image, method="scorecam")
    assert runs == varied + (varied < len(activations))


@pytest.mark.parametrize("method", _RERUNS)
def test_results_depend_neither_on_the_batch_nor_on_its_other_images(
    explainer: fastcam.Explainer, batch: Array, method: str
) -> None:
    if method == "cam":
        pytest.skip("the head of this network is not linear")
    settings = _FEW.get(method)
    together = explainer(batch, [1, 4], method=method, settings=settings)
    alone = explainer(batch[1:2], [1, 4], method=method, settings=settings, batch_size=1)
    assert together.maps.shape[:2] == (3, 2)
    assert together.maps[1].any()
    assert relative_error(alone.maps[0], together.maps[1]) < 1e-5
    assert relative_error(together.maps[0], together.maps[1]) > 1e-2
    again = explainer(batch, [1, 4], method=method, settings=settings)
    np.testing.assert_array_equal(again.maps, together.maps)


def test_seeds_give_other_masks(explainer: fastcam.Explainer, batch: Array) -> None:
    maps = [_raw(explainer, batch[:1], 1, "rise", masks=30, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert relative_error(maps[0], maps[2]) > 0.1


def test_from_many_threads_as_from_one(explainer: fastcam.Explainer, batch: Array) -> None:
    methods = ["ablationcam", "scorecam", "saliency", "gradcam"]
    expected = {method: explainer(batch, 1, method=method).maps for method in methods}
    fresh = fastcam.Explainer(explainer.path, device="cpu", threads=1)
    found: dict[tuple[str, int], Array] = {}

    def work(method: str, number: int) -> None:
        found[method, number] = fresh(batch, 1, method=method).maps

    threads = [threading.Thread(target=work, args=(method, number)) for method in methods for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for (method, _), maps in found.items():
        np.testing.assert_array_equal(maps, expected[method])


def test_the_plain_session_computes_no_output_for_single_methods(explainer: fastcam.Explainer) -> None:
    """They would cost every call more than the network itself."""
    outputs = {"image_gradients", "guided_gradients", "bias_maps"}
    assert outputs <= {output.name for output in _session(explainer.path).get_outputs()}
    assert outputs.isdisjoint(explainer.signature[1])
    assert {"saliency", "guidedgradcam", "fullgrad"} <= set(explainer.methods)


def test_the_session_of_an_output_computes_no_other(explainer: fastcam.Explainer, batch: Array) -> None:
    explainer(batch, method="fullgrad")
    session = explainer._reruns.gives("bias_maps")._session
    assert [output.name for output in session.get_outputs()] == ["bias_maps"]


def test_a_background_without_images_is_refused(path: Path) -> None:
    with pytest.raises(ImageError, match="background= holds no images"):
        fastcam.Explainer(path, device="cpu", background=[])


def test_backgrounds_survive_pickling(explainer: fastcam.Explainer, batch: Array) -> None:
    copy = pickle.loads(pickle.dumps(explainer))
    found, expected = (one(batch, 1, method="expectedgradients").maps for one in (copy, explainer))
    np.testing.assert_array_equal(found, expected)


def test_files_from_before_evidence_had_names(path: Path, batch: Array, tmp_path: Path) -> None:
    """They say "image_gradients": "true"."""
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "fastcam.evidence":
            entry.key, entry.value = "fastcam.image_gradients", "true"
    onnx.save(model, tmp_path / "old.onnx")
    old = fastcam.Explainer(tmp_path / "old.onnx", device="cpu")
    assert "saliency" in old.methods
    assert "fullgrad" not in old.methods
    np.testing.assert_allclose(old(batch, method="saliency").maps, _open(path)(batch, method="saliency").maps)


def test_image_gradients_of_boxes_are_finite_differences(tmp_path: Path, rng: np.random.Generator) -> None:
    fastcam.export(one_map_detector(), tmp_path / "boxes.onnx", score="boxes", gradients="image")
    explainer = fastcam.Explainer(tmp_path / "boxes.onnx", device="cpu")
    size = explainer.input_size
    batch = rng.random((1, 3, *size)).astype(np.float32)
    found = explainer(batch, "top2", method="saliency", threshold=0, size="layer", normalize=None)
    assert found.maps.shape[2:] == size
    session = _session(explainer.path)
    name = session.get_inputs()[0].name
    entry = int(found.targets[0, 0])
    step = np.zeros_like(batch)
    row, column = np.unravel_index(found.maps[0, 0].argmax(), size)
    gains = []
    for channel in range(3):
        step[:] = 0
        step[0, channel, row, column] = 1e-2
        # The table holds probabilities, and what is explained is their logit.
        high, low = (session.run(["logits"], {name: batch + sign * step})[0][0, entry] for sign in (1, -1))
        gains.append(abs(np.log(high / (1 - high)) - np.log(low / (1 - low))) / 2e-2)
    assert found.maps[0, 0, row, column] == pytest.approx(max(gains), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rise", "settings": {"maskes": 3}}, "did you mean 'masks'"),
        ({"method": "rise", "settings": {"masks": 0}}, "settings: masks=0: give a whole number, 1 to 1000000"),
        ({"method": "rise", "settings": {"masks": 2.5}}, "settings: masks=2.5"),
        ({"method": "rise", "settings": {"keep": 2}}, "settings: keep=2: give a number from 0.01 to 0.99"),
        ({"method": "rise", "settings": [1]}, "settings=.*: give a mapping"),
        ({"settings": {"masks": 3}}, "the method has these: none"),
        ({"method": "rise", "layer": "block2"}, "looks at the image, not at a layer"),
        ({"method": "scorecam", "on_device": True}, "computed on the host"),
        ({"method": "scorecam", "against": 1}, "linear in the gradient"),
        ({"method": "refinecam", "normalize": "signed"}, "multiplies the maps of several layers"),
        ({"method": "cam"}, "global average pooling"),
    ],
)
def test_what_is_refused(explainer: fastcam.Explainer, batch: Array, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        explainer(batch, **arguments)


def test_render_refuses_methods_that_need_the_model() -> None:
    with pytest.raises(ArgumentError, match="runs the model again: use Explainer"):
        fastcam.render(np.ones((1, 2, 3, 3), np.float32), np.ones((1, 2), np.float32), method="scorecam")


def test_files_without_image_gradients_say_how_to_get_them(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "full.onnx", gradients="full")
    explainer = fastcam.Explainer(tmp_path / "full.onnx")
    assert "saliency" not in explainer.methods
    with pytest.raises(ArgumentError, match='export the model again with gradients="image"'):
        explainer(batch, method="saliency")


def test_files_that_take_pictures_cannot_be_masked(tmp_path: Path) -> None:
    model = small_classifier().to_model()
    fastcam.export(model, tmp_path / "drawn.onnx", draw="heatmaps", picture="input", preprocess="imagenet")
    explainer = fastcam.Explainer(tmp_path / "drawn.onnx")
    with pytest.raises(ArgumentError, match="export the model again without picture="):
        explainer(np.zeros((12, 12, 3), np.uint8), method="occlusion")


def test_heads_that_read_more_than_the_layer_are_refused(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 12, 12))
    first = net.add("Relu", net.conv(net.input, (8, 3, 3, 3), pads=[1, 1, 1, 1]), name="block1")
    inner = net.add("Relu", net.conv(first, (8, 8, 3, 3), pads=[1, 1, 1, 1]), name="inside")
    joined = net.add("Add", first, inner, name="joined")
    net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", joined)), (8, 5)))
    fastcam.export(net.graph.to_model(), tmp_path / "skip.onnx", layer="inside")
    with pytest.raises(fastcam.LayerError, match=r"the scores also depend on .*Export a later layer"):
        fastcam.Explainer(tmp_path / "skip.onnx")(np.zeros((1, 3, 12, 12), np.float32), method="ablationcam")


@pytest.mark.parametrize("option", [{"precision": "fp16"}, {"draw": "heatmaps"}])
def test_combinations_that_no_file_has(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match='gradients="image" is for files that compute in fp32 and do not draw'):
        fastcam.export(small_classifier().to_model(), tmp_path / "no.onnx", gradients="image", **option)
    assert not list(tmp_path.iterdir())


def test_progress_is_shown_and_cleared(
    explainer: fastcam.Explainer, batch: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    explainer(batch[:1], method="rise", settings={"masks": 64}, progress=True)
    shown = capsys.readouterr().err
    assert "rise" in shown
    assert "0/64" in shown
    explainer(batch[:1], method="rise", settings={"masks": 64})
    assert not capsys.readouterr().err


def test_a_call_that_takes_too_long_is_stopped(explainer: fastcam.Explainer, batch: Array) -> None:
    with pytest.raises(fastcam.TimeLimitError, match="timeout"):
        explainer(batch, method="rise", settings={"masks": 1_000_000}, timeout=0.5)


def test_the_files_graph_holds_the_output_for_other_runtimes(path: Path) -> None:
    outputs = {output.name: output for output in onnx.load(path).graph.output}
    dims = [dim.dim_value or dim.dim_param for dim in outputs["image_gradients"].type.tensor_type.shape.dim]
    assert dims[2:] == [3, 12, 12]


def _refused_network() -> onnx.ModelProto:
    """A classifier that no layer's map and no gradient explains: it reads where the rows' maxima are."""
    net = NetworkBuilder(("batch", 3, 12, 12))
    best = net.add("Cast", net.add("ArgMax", net.input, axis=3, keepdims=0), to=onnx.TensorProto.FLOAT)
    return net.build(net.dense(net.add("Flatten", best), (36, 4))).to_model()


def test_any_model_with_scores_is_explained_without_gradients(tmp_path: Path, rng: np.random.Generator) -> None:
    model = _refused_network()
    with pytest.raises(fastcam.ModelError):
        fastcam.export(model, tmp_path / "no.onnx")
    result = fastcam.export(model, tmp_path / "scores.onnx", gradients="none", preprocess="imagenet")
    assert (result.layer, result.layers, result.outputs) == ("", (), ("logits", "targets"))
    explainer = fastcam.Explainer(tmp_path / "scores.onnx", device="cpu")
    assert explainer.methods == ("rise", "occlusion")
    assert explainer.default_method == "rise"
    batch = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    found = _raw(explainer, batch, 1, "occlusion", window=0.25, stride=1.0)
    session = _session(tmp_path / "scores.onnx")

    def scores(images: Array) -> Array:
        return np.asarray(session.run(["logits"], {"image": images})[0][:, 1])

    expected = np.zeros((2, 12, 12))
    for row, column in np.ndindex(4, 4):
        rows, columns = slice(3 * row, 3 * row + 3), slice(3 * column, 3 * column + 3)
        hidden = batch.copy()
        hidden[:, :, rows, columns] = 0
        expected[:, rows, columns] = (scores(batch) - scores(hidden))[:, None, None]
    assert relative_error(found[:, 0], _scaled(expected)) < 1e-4
    photo = rng.integers(0, 256, (20, 30, 3), np.uint8)
    explainer(photo, settings={"masks": 20})[0].save(tmp_path / "why.png")
    assert "scores" in repr(explainer)
    assert fastcam.inspect(tmp_path / "scores.onnx").layers == {}
    with pytest.raises(ArgumentError, match="gives only scores: choose from rise, occlusion"):
        explainer(photo, method="gradcam")
    with pytest.raises(ArgumentError, match="omit layer= and draw="):
        fastcam.export(small_classifier().to_model(), tmp_path / "no.onnx", gradients="none", layer="block2")


def test_folder_jobs_of_files_that_give_only_scores(tmp_path: Path, rng: np.random.Generator) -> None:
    fastcam.export(_refused_network(), tmp_path / "scores.onnx", gradients="none", preprocess="imagenet")
    (tmp_path / "photos").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photos" / "one.png")
    result = fastcam.explain_files(
        tmp_path / "scores.onnx", tmp_path / "photos", tmp_path / "out", settings={"masks": 20}
    )
    assert not result.failures
    assert (tmp_path / "out" / "report.html").is_file()


def test_files_that_only_draw_are_explained_by_their_scores(tmp_path: Path, batch: Array) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "plain.onnx", preprocess="imagenet")
    fastcam.export(small_classifier().to_model(), tmp_path / "drawn.onnx", draw="heatmaps", preprocess="imagenet")
    plain, drawn = (fastcam.Explainer(tmp_path / f"{name}.onnx", device="cpu") for name in ("plain", "drawn"))
    assert drawn.methods == ("gradcam", "rise", "occlusion")
    for method in drawn.methods:
        found, expected = (one(batch, 2, method=method, settings=_FEW.get(method)).maps for one in (drawn, plain))
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("method", _RERUNS)
def test_files_of_a_fixed_batch(tmp_path: Path, batch: Array, method: str) -> None:
    _export(tmp_path / "two.onnx", batch=2, keeps_batch=True)
    explainer = _open(tmp_path / "two.onnx")
    if method in ("cam", "ablationcam"):
        with pytest.raises(ArgumentError, match="takes batches of exactly 2 images, and so does its head"):
            explainer(batch, 1, method=method)
        return
    _export(tmp_path / "any.onnx")
    expected = _open(tmp_path / "any.onnx")(batch, 1, method=method, settings=_FEW.get(method))
    found = explainer(batch, 1, method=method, settings=_FEW.get(method))
    assert relative_error(found.maps, expected.maps) < 1e-5


@pytest.mark.parametrize("score", ["segmentation", "boxes", "embedding", "values"])
def test_evidence_for_every_kind_of_score(score: str, tmp_path: Path, batch: Array) -> None:
    """Guided gradients and biases follow the score that the kind differentiates; without ReLU's rule they are plain."""
    sources: dict[str, Any] = {
        "segmentation": segmenter,
        "boxes": one_map_detector,
        "embedding": lambda: small_classifier().to_model(),
        "values": lambda: small_classifier().to_model(),
    }
    evidence = ["guided_gradients", "bias_maps"]
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = {"output": "scores"} if score == "embedding" else {}
    fastcam.export(sources[score](), path, score=score, gradients="image", evidence=evidence, **options)
    explainer = fastcam.Explainer(path, device="cpu")
    image = np.random.default_rng(0).normal(size=(1, *explainer._image_shape)).astype(np.float32)
    asked: dict[str, Any] = {"reference": np.ones(5)} if score == "embedding" else {"target": 1}
    if score == "segmentation":
        asked["mask"] = np.ones(explainer.input_size, bool)
    if score == "boxes":
        asked = {"threshold": 0.0, "target": "top1"}
    for method in ("saliency", "guidedbackprop", "fullgrad"):
        found = explainer(image, method=method, normalize=None, **asked)
        assert found.maps.shape[:2] == (1, 1)
        assert found.maps.max() > 0, method
    for name in ("legrad_maps", "curvatures"):
        if score != "values":
            with pytest.raises(ArgumentError, match=f"evidence='{name}' is for classes and values"):
                fastcam.export(sources[score](), path, score=score, evidence=name, **options)


def test_evidence_of_a_class_that_does_not_exist_is_nan(tmp_path: Path, batch: Array) -> None:
    """With a required target only its own row."""
    evidence = ["guided_gradients", "bias_maps", "curvatures"]
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx", target="required", evidence=evidence)
    session = _session(tmp_path / "m.onnx")
    found = session.run(evidence, {"image": batch[:2], "target": np.array([[1, 99], [7, 2]])})
    expected = session.run(evidence, {"image": batch[:2], "target": np.array([[1, 0], [0, 2]])})
    for one, other in zip(found, expected, strict=True):
        assert np.isnan(one[0, 1]).all()
        assert np.isnan(one[1, 0]).all()
        np.testing.assert_allclose(one[[0, 1], [0, 1]], other[[0, 1], [0, 1]], rtol=1e-5, atol=1e-7)
