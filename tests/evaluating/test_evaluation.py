"""Metrics of heatmaps: against formulas, and against pytorch-grad-cam, xplique and SciPy where these have them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from networks import Array, NetworkBuilder, small_classifier
from PIL import Image

import fastcam
from bench import shims
from fastcam.cli import commands
from fastcam.errors import ArgumentError
from fastcam.evaluating.baselines import BASELINES
from fastcam.evaluating.case import Case
from fastcam.evaluating.metrics import METRICS, SETTINGS
from fastcam.evaluating.page import write_evaluation_page

_SIDE = 12
_FAST = {"steps": 4, "fidelity_samples": 8, "fidelity_grid": 3, "sensitivity_samples": 2, "road_levels": 2}


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory) -> fastcam.Explainer:
    path = tmp_path_factory.mktemp("evaluating") / "small.onnx"
    fastcam.export(small_classifier().to_model(), path, gradients="full", preprocess="imagenet")
    return fastcam.Explainer(path, device="cpu", threads=1)


@pytest.fixture
def pictures(rng: np.random.Generator) -> list[Array]:
    return [rng.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8) for _ in range(4)]


def _case(explainer: fastcam.Explainer, picture: Array, heatmap: Array, **settings: Any) -> Case:
    evidence, target = explainer.evidence(explainer.prepare(picture), None)
    every = {name: row.default for name, row in SETTINGS.items()} | settings
    return Case(evidence, target, 5, heatmap, lambda image, other: heatmap, None, every, 0)


def _value(metric: str, case: Case) -> float:
    return METRICS[metric].compute(case)


def _probability(explainer: fastcam.Explainer, tensor: Array, target: int) -> float:
    found = explainer(np.ascontiguousarray(tensor, np.float32)[None], target).probabilities
    assert found is not None
    return float(found[0, target])


def test_deletion_and_insertion_by_hand(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    heatmap = np.linspace(0, 1, _SIDE**2).reshape(_SIDE, _SIDE)
    case = _case(explainer, pictures[0], heatmap, steps=3)
    image = explainer.prepare(pictures[0])[0]
    curves: dict[str, list[float]] = {"deletion": [], "insertion": []}
    for quarter in range(4):
        # The last pixels are the most important.
        removed = (
            heatmap.ravel() >= np.sort(heatmap.ravel())[::-1][quarter * 48 - 1] if quarter else heatmap.ravel() > 2
        )
        gone = removed.reshape(_SIDE, _SIDE)
        curves["deletion"].append(_probability(explainer, np.where(gone, 0, image), case.target))
        curves["insertion"].append(_probability(explainer, np.where(gone, image, 0), case.target))
    for name, curve in curves.items():
        assert _value(name, case) == pytest.approx(np.mean(np.add(curve[1:], curve[:-1])) / 2, abs=1e-6)


def test_drop_increase_and_their_composites_by_hand(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    heatmap = np.random.default_rng(0).random((_SIDE, _SIDE))
    again = np.random.default_rng(1).random((_SIDE, _SIDE))
    case = dataclasses.replace(_case(explainer, pictures[0], heatmap), draw=lambda image, other: again)
    image = explainer.prepare(pictures[0])[0]
    whole = _probability(explainer, image, case.target)
    masked = _probability(explainer, image * heatmap.astype(np.float32), case.target)
    drop = max(0, whole - masked) / whole
    coherency = (np.corrcoef(heatmap.ravel(), again.ravel())[0, 1] + 1) / 2
    assert _value("average_drop", case) == pytest.approx(drop, abs=1e-5)
    assert _value("increase", case) == float(masked > whole)
    assert _value("complexity", case) == pytest.approx(heatmap.mean())
    assert _value("coherency", case) == pytest.approx(coherency)
    parts = [coherency, 1 - heatmap.mean(), 1 - drop]
    assert _value("adcc", case) == pytest.approx(3 / sum(1 / part for part in parts), abs=1e-5)


def test_places_by_hand(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    heatmap = np.zeros((_SIDE, _SIDE))
    heatmap[2, 3], heatmap[8, 8], heatmap[0, 0] = 1, 0.6, 0.4
    mask = np.zeros((_SIDE, _SIDE), bool)
    mask[2, 3] = mask[8, 8] = True
    case = dataclasses.replace(_case(explainer, pictures[0], heatmap), mask=mask)
    assert _value("pointing", case) == 1
    assert _value("energy", case) == pytest.approx(0.8)
    assert _value("iou", case) == 1
    case.mask = np.roll(mask, 1, axis=0)
    assert (_value("pointing", case), _value("energy", case), _value("iou", case)) == (0, 0, 0)


def test_sparseness_of_known_maps(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    even, single = np.ones((_SIDE, _SIDE)), np.zeros((_SIDE, _SIDE))
    single[4, 4] = 1
    ramp = np.arange(1, _SIDE**2 + 1).reshape(_SIDE, _SIDE) / _SIDE**2
    assert _value("sparseness", _case(explainer, pictures[0], even)) == pytest.approx(0, abs=1e-12)
    assert _value("sparseness", _case(explainer, pictures[0], single)) == pytest.approx(1 - 1 / _SIDE**2)
    # The mean difference of all pairs, over twice the mean: the other definition of the Gini index.
    pairs = np.abs(ramp.ravel()[:, None] - ramp.ravel()).mean() / (2 * ramp.mean())
    assert _value("sparseness", _case(explainer, pictures[0], ramp)) == pytest.approx(pairs)


def test_the_heatmaps_change_by_slight_noise(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    heatmap = np.ones((_SIDE, _SIDE))
    seen: list[float] = []

    def draw(image: Array, other: int | None) -> Array:
        seen.append(float(np.abs(image - original).max()))
        return heatmap * (1 + len(seen))

    case = dataclasses.replace(_case(explainer, pictures[0], heatmap, sensitivity_samples=3), draw=draw)
    original = case.evidence.image
    assert _value("max_sensitivity", case) == pytest.approx(3)
    radius = 0.02 * (original.max() - original.min())
    assert all(0.8 * radius < change <= radius * 1.001 for change in seen)


def test_another_class_is_drawn_for_random_logit(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    heatmap = np.random.default_rng(0).random((_SIDE, _SIDE))
    asked: list[int | None] = []

    def draw(image: Array, other: int | None) -> Array:
        asked.append(other)
        return -heatmap

    case = dataclasses.replace(_case(explainer, pictures[0], heatmap), draw=draw)
    assert _value("random_logit", case) == pytest.approx(-1)
    assert asked[0] not in (None, case.target)


def test_rank_correlation_is_scipys(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    """mu-fidelity with ties, from the same masks and scores."""
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy: pip install fastcam[evaluate]")
    heatmap = np.round(np.random.default_rng(3).random((_SIDE, _SIDE)), 1)
    case = _case(explainer, pictures[1], heatmap, fidelity_samples=30, fidelity_grid=4)
    cells = np.random.default_rng([0, 0]).random((30, 4, 4)) > 0.2
    masks = np.kron(cells, np.ones((3, 3))).astype(bool)
    image = explainer.prepare(pictures[1])[0]
    lost = [
        _probability(explainer, image, case.target) - _probability(explainer, image * m, case.target) for m in masks
    ]
    expected = stats.spearmanr(lost, [heatmap[~mask].sum() for mask in masks])[0]
    assert _value("mu_fidelity", case) == pytest.approx(expected, abs=1e-6)


# NumPy 2 warns of what torch's arrays lack; the peer's code is not our concern.
@pytest.mark.filterwarnings("ignore")
def test_road_is_that_of_pytorch_grad_cam(tmp_path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[peers]")
    pytest.importorskip("scipy", reason="needs SciPy: pip install fastcam[evaluate]")
    shims.install()
    road = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="needs grad-cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason="part of grad-cam")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(600, 4), torch.nn.Softmax(1)
    ).eval()
    fastcam.export(network, tmp_path / "small.onnx", example_input=torch.zeros(1, 3, _SIDE, _SIDE))
    explainer = fastcam.Explainer(tmp_path / "small.onnx", device="cpu")
    image = rng.random((3, _SIDE, _SIDE)).astype(np.float32)
    heatmap = rng.random((_SIDE, _SIDE))
    evidence, _ = explainer.evidence(image[None], 2)
    settings = {name: row.default for name, row in SETTINGS.items()} | {"road_noise": 0.0, "road_levels": 4}
    case = Case(evidence, 2, 4, heatmap, lambda image, other: heatmap, None, settings, 0)
    imputer = road.NoisyLinearImputer(noise=0)
    sums = []
    for remove in (road.RemoveLeastRelevantFirst, road.RemoveMostRelevantFirst):
        measured = [
            road.PerturbationConfidenceMetric(remove(percentile, imputer))(
                torch.tensor(image[None]),
                heatmap[None].astype(np.float32),
                [targets.ClassifierOutputTarget(2)],
                network,
            )
            for percentile in (20, 40, 60, 80)
        ]
        sums.append(np.mean(measured))
    assert _value("road", case) == pytest.approx((sums[0] - sums[1]) / 2, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_those_of_xplique(tmp_path: Path, rng: np.random.Generator) -> None:
    keras = pytest.importorskip("keras", reason="needs TensorFlow: pip install fastcam[keras]")
    shims.install()
    metrics = pytest.importorskip("xplique.metrics", reason="needs xplique: pip install --no-deps xplique")
    layers = keras.layers
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            layers.Input((_SIDE, _SIDE, 3)),
            layers.Conv2D(6, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(4),
            layers.Softmax(),
        ]
    )
    fastcam.export(model, tmp_path / "small.onnx", preprocess="none")
    explainer = fastcam.Explainer(tmp_path / "small.onnx", device="cpu")
    image = rng.random((1, _SIDE, _SIDE, 3)).astype(np.float32)
    heatmap = rng.random((_SIDE, _SIDE))
    # xplique stretches masks to 0..1.
    heatmap = (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min())
    evidence, _ = explainer.evidence(image, 1)
    settings = {name: row.default for name, row in SETTINGS.items()} | {"steps": 10}
    case = Case(evidence, 1, 4, heatmap, lambda image, other: heatmap, None, settings, 0)
    label = np.eye(4, dtype=np.float32)[[1]]
    peers = {
        "deletion": metrics.Deletion(model, image, label, steps=10),
        "insertion": metrics.Insertion(model, image, label, steps=10),
        "average_drop": metrics.AverageDropMetric(model, image, label),
        "increase": metrics.AverageIncreaseMetric(model, image, label),
    }
    for name, peer in peers.items():
        assert _value(name, case) == pytest.approx(float(peer.evaluate(heatmap[None].astype(np.float32))), abs=1e-5), (
            name
        )


def test_an_evaluation_finds_the_method_that_looks_at_what_counts(tmp_path: Path) -> None:
    """The score is the brightness of a corner, which no baseline knows."""
    net = NetworkBuilder(("batch", 3, 16, 16))
    layer = net.add("Relu", net.add("Mul", net.input, net.constant(np.float32(1))), name="layer")
    weights = np.zeros((3, 16, 16, 2), np.float32)
    weights[:, :6, 10:, 0] = 0.1
    scores = net.add("MatMul", net.add("Flatten", layer), net.constant(weights.reshape(-1, 2)))
    net.build(net.add("Softmax", scores, axis=-1))
    fastcam.export(net.graph.to_model(), tmp_path / "corner.onnx", layer="layer", gradients="full", preprocess="none")
    random = np.random.default_rng(0)
    pictures = [random.integers(1, 5, (16, 16, 3), np.uint8) for _ in range(6)]
    masks = [weights[0, :, :, 0] > 0] * 6
    found = fastcam.evaluate(
        tmp_path / "corner.onnx", pictures, target=0, methods="hirescam", masks=masks, settings=_FAST,
        metrics=["deletion", "insertion", "mu_fidelity", "energy", "pointing", "iou"],
    )  # fmt: skip
    rows = {(row.method, row.metric): row for row in found.summary()}
    for metric in ("deletion", "insertion", "mu_fidelity", "energy", "iou"):
        best = next(row.method for row in found.summary() if row.metric == metric)
        assert best == "hirescam", metric
        own = rows["hirescam", metric]
        assert own.low <= own.mean <= own.high
        assert own.values == 6
        assert own.better_than == ("random", "centre", "edges"), metric
        assert rows["random", metric].better_than != ("centre", "edges"), metric
    assert rows["hirescam", "energy"].mean > 0.95
    assert rows["random", "energy"].mean == pytest.approx(36 / 256, abs=0.05)


def test_all_metrics_of_all_methods(explainer: fastcam.Explainer, pictures: list[Array], tmp_path: Path) -> None:
    masks = [np.eye(_SIDE, dtype=bool)] * 4
    steps: list[tuple[int, int]] = []
    found = fastcam.evaluate(
        explainer, pictures, metrics=list(METRICS), masks=masks, settings=_FAST,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(BASELINES) < set(found.values)
    assert {"gradcam", "layercam", "eigencam"} < set(found.values)
    for method, metrics in found.values.items():
        for metric, values in metrics.items():
            assert values.shape == (4,)
            assert np.isfinite(values).all(), (method, metric)
    again = fastcam.evaluate(explainer, pictures, metrics=list(METRICS), masks=masks, settings=_FAST, batch_size=3)
    for method, metrics in found.values.items():
        for metric, values in metrics.items():
            np.testing.assert_allclose(values, again.values[method][metric], atol=1e-5)
    found.save(tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["values"]["gradcam"]["deletion"] == found.values["gradcam"]["deletion"].tolist()
    assert written["settings"]["steps"] == 4
    assert written["targets"] == found.targets
    table = found.to_dataframe()
    assert len(table) == len(METRICS) * len(found.values)
    assert "gradcam" in str(found)


def test_the_grid_game_by_hand(explainer: fastcam.Explainer, pictures: list[Array]) -> None:
    found = fastcam.evaluate(explainer, pictures, target=[0, 1, 2, 3], methods="layercam", metrics="grid")
    assert found.values["centre"]["grid"] == pytest.approx([0.25] * 4)
    tensors = explainer.prepare(pictures)
    halves = tensors.reshape(4, 3, 6, 2, 6, 2).mean(axis=(3, 5))
    grid = np.concatenate([np.concatenate(halves[:2], axis=2), np.concatenate(halves[2:], axis=2)], axis=1)
    maps = explainer(grid[None], [[0, 1, 2, 3]], method="layercam").heatmaps[0]
    expected = [
        maps[place][place // 2 * 6 : place // 2 * 6 + 6, place % 2 * 6 : place % 2 * 6 + 6].sum() / maps[place].sum()
        for place in range(4)
    ]
    assert found.values["layercam"]["grid"] == pytest.approx(expected, abs=1e-4)


def test_masks_from_files(explainer: fastcam.Explainer, pictures: list[Array], tmp_path: Path) -> None:
    large = np.zeros((40, 60), np.uint8)
    large[:20, :30] = 255
    Image.fromarray(large).save(tmp_path / "mask.png")
    small = np.zeros((_SIDE, _SIDE), bool)
    small[:6, :6] = True
    one, two = (
        fastcam.evaluate(explainer, pictures[:1], methods="gradcam", metrics="energy", masks=[mask])
        for mask in (tmp_path / "mask.png", small)
    )
    assert one.values["gradcam"]["energy"] == pytest.approx(two.values["gradcam"]["energy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "gradcan"}, "methods: 'gradcan': did you mean 'gradcam'"),
        ({"methods": ["gradcam", "gradcam"]}, "each only once"),
        ({"metrics": "deletoin"}, "metrics: 'deletoin': did you mean 'deletion'"),
        ({"metrics": "energy"}, "energy compare with the place of the object: give masks="),
        ({"settings": {"step": 3}}, "settings: 'step': did you mean 'steps'"),
        ({"settings": {"steps": 0}}, "settings: steps=0"),
        ({"target": [1, 2]}, "target holds 2 classes for 4 images"),
        ({"target": 1, "metrics": "grid"}, "needs pictures of 4 different classes"),
        ({"masks": [np.ones((3, 3), bool)]}, "there are 1 for 4 images"),
        (
            {"method_settings": {"rise": {"masks": 3}}, "methods": "gradcam"},
            "method_settings: 'rise': measured: gradcam",
        ),
        ({"method_settings": {"gradcam": 3}}, "give a mapping"),
        ({"masks": [np.zeros((3, 3), bool)] * 4}, "that of image 0 is empty"),
        ({"masks": [np.zeros((3, 3, 3))] * 4}, "give bool"),
    ],
)
def test_what_is_refused(
    explainer: fastcam.Explainer, pictures: list[Array], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        fastcam.evaluate(explainer, pictures, **arguments)


def test_the_page_shows_every_number(explainer: fastcam.Explainer, pictures: list[Array], tmp_path: Path) -> None:
    found = fastcam.evaluate(explainer, pictures, methods="gradcam", metrics=["deletion", "sparseness"], settings=_FAST)
    page = write_evaluation_page(found, tmp_path / "evaluation.html").read_text()
    for row in found.summary():
        assert f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})" in page
        assert page.count(f"<td>{row.method}</td>\n<td><div") == 2
    assert "lower is better" in page
    assert "&#34;steps&#34;: 4" in page or '"steps": 4' in page


def test_from_the_command_line(explainer: fastcam.Explainer, pictures: list[Array], tmp_path: Path) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    for folder in (photos, masks):
        folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(photos / f"{number}.png")
        Image.fromarray(np.eye(_SIDE, dtype=np.uint8) * 255).save(masks / f"{number}.png")
    arguments = ["evaluate", str(explainer.path), str(photos), "-o", str(tmp_path / "out"), "--masks", str(masks)]
    arguments += ["--method", "gradcam", "--metric", "energy", "--metric", "deletion", "--set", "steps=3"]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    expected = fastcam.evaluate(
        explainer, [photos / f"{number}.png" for number in range(4)], methods="gradcam", metrics=["energy", "deletion"],
        masks=[masks / f"{number}.png" for number in range(4)], settings={"steps": 3},
    )  # fmt: skip
    assert written["values"] == expected.to_dict()["values"]
    assert (tmp_path / "out" / "evaluation.html").exists()
    assert all(f"{row.mean:.3f} {row.low:.3f}..{row.high:.3f}" in result.output for row in expected.summary())
