"""`verify`: whether heatmaps may be trusted in production, measured, with thresholds on which a pipeline can depend."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import kernels
from ..arguments import check_mapping, check_number, check_path, checked, optional, shown
from ..arrays import Doubles, Floats
from ..errors import ArgumentError, ImageError, LayerError, suggest
from ..explaining.explainer import Explainer
from ..explaining.heads import open_head
from ..explaining.images import Images, as_list, on_host
from ..files import digest_file, write_json
from ..kernels.reference import normalized, resized, weighted_sum
from ..preprocessing import Layout
from .evaluation import evaluate, paired_gain
from .metrics import rank_correlation

_SEED = 0
# Random pictures where none are given: enough for checks of arithmetic, not of what a model has learned.
_RANDOM_PICTURES = 3
_DIRECTIONS = 4
# Of the activations' root mean square. Differences of float32 scores lose more digits with smaller steps, and larger
# ones meet more kinks of the network.
_STEP = 1e-2
_PACKAGES = ("fastcam", "onnxruntime", "onnx", "numpy", "pillow")


class Check(NamedTuple):
    """A row of `CHECKS`.

    Attributes
    ----------
    meaning : str
    bound : float
        Default threshold.
    side : {"at most", "at least"}
    compute : callable
    needs_photos : bool
        Whether random pictures would say nothing.
    """

    meaning: str
    bound: float
    side: Literal["at most", "at least"]
    compute: Callable[[_Subject], float]
    needs_photos: bool = False


@dataclass(frozen=True)
class Finding:
    """What one check measured.

    Attributes
    ----------
    name, meaning : str
    value : float or None
        None if it could not be measured.
    bound : float
    side : {"at most", "at least"}
    passed : bool or None
        None if it could not be measured.
    reason : str
        Why it was not measured.
    """

    name: str
    meaning: str
    value: float | None
    bound: float
    side: str
    passed: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """Measured facts about one file on this machine.

    Attributes
    ----------
    findings : list of Finding
    facts : dict
        Hashes of the file and of the pictures, versions, the processor, the method.
    """

    findings: list[Finding]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether no check that could be measured missed its threshold."""
        return all(finding.passed is not False for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings, for JSON."""
        return {"passed": self.passed, "findings": [vars(finding) for finding in self.findings], "facts": self.facts}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises
        ------
        WriteError
            The file cannot be written.
        """
        write_json(check_path("path", path), self.to_dict())


@dataclass(frozen=True)
class _Subject:
    """What is checked."""

    explainer: Explainer
    tensors: Floats
    method: str
    other: Explainer | None
    pictures: Sequence[Any] | None


@checked(model=check_path, thresholds=optional(check_mapping))
def verify(
    model: str | os.PathLike[str],
    images: Images | None = None,
    *,
    method: str | None = None,
    compare_with: str | os.PathLike[str] | None = None,
    thresholds: Mapping[str, Any] | None = None,
) -> Verification:
    """Check a classifier's file on this machine: its gradients, its arithmetic, and what its heatmaps depend on.

    Parameters
    ----------
    model : path
        Written by `fastcam.export`.
    images : optional
        Photos like those of production, a few dozen. Without them, checks of what the model has learned are left out.
    method : str, optional
        By default the file's default method.
    compare_with : path, optional
        The same model in another precision: how often both choose the same class, and how far the heatmaps drift.
    thresholds : mapping, optional
        Other bounds than those of `CHECKS`, by the check's name.

    Returns
    -------
    Verification

    Raises
    ------
    ArgumentError
        A threshold does not exist, or the file is no classifier.
    FastcamError
        As `Explainer` does.
    """
    for name, bound in (thresholds or {}).items():
        if name not in CHECKS:
            raise ArgumentError(f"thresholds: {shown(name)}: {suggest(name, CHECKS)}choose from {', '.join(CHECKS)}")
        check_number(f"thresholds: {name}", bound, lambda number: True, "a number")
    explainer = Explainer(model)
    if explainer.score != "classes":
        raise ArgumentError(f"{explainer.path} explains {explainer.score}: these checks are for classifiers")
    pictures = None if images is None else as_list(on_host(images))
    if pictures is not None and not pictures:
        raise ImageError("there are no images to check with: omit them, or give some")
    tensors = _random_tensors(explainer) if pictures is None else np.asarray(explainer.prepare(pictures), np.float32)
    other = None if compare_with is None else Explainer(check_path("compare_with", compare_with))
    subject = _Subject(explainer, tensors, method or explainer.default_method, other, pictures)
    bounds = {name: float((thresholds or {}).get(name, row.bound)) for name, row in CHECKS.items()}
    findings = [_measured(name, row, subject, bounds[name]) for name, row in CHECKS.items() if _applies(name, subject)]
    return Verification(findings, _facts(subject, pictures))


def _applies(name: str, subject: _Subject) -> bool:
    return name not in _COMPARISONS or subject.other is not None


def _measured(name: str, row: Check, subject: _Subject, bound: float) -> Finding:
    if row.needs_photos and subject.pictures is None:
        return Finding(name, row.meaning, None, bound, row.side, None, "needs photos")
    try:
        value = row.compute(subject)
    except (LayerError, ArgumentError) as error:
        return Finding(name, row.meaning, None, bound, row.side, None, str(error))
    passed = value <= bound if row.side == "at most" else value >= bound
    return Finding(name, row.meaning, value, bound, row.side, bool(passed))


def _gradients(subject: _Subject) -> float:
    """Compare derivatives along directions that are constant over the map: there pooled gradients are exact."""
    head = open_head(subject.explainer.path, 0, None)
    random = np.random.default_rng(_SEED)
    measured, stated = [], []
    for tensor in subject.tensors[:_RANDOM_PICTURES]:
        evidence, target = subject.explainer.evidence(tensor[None])
        activations = evidence.activations
        _, height, width = activations.shape
        size = float(np.sqrt(np.mean(np.square(activations, dtype=np.float64))))
        for _ in range(_DIRECTIONS):
            direction = random.normal(0, size, len(activations))
            moved = _STEP * direction[:, None, None]
            both = np.stack([activations + moved, activations - moved]).astype(np.float32)
            high, low = head.score(both)[:, target].astype(np.float64)
            measured.append((high - low) / (2 * _STEP))
            stated.append(float(evidence.weights[0].astype(np.float64) @ direction) * height * width)
    errors = np.abs(np.subtract(measured, stated))
    return float(np.median(errors) / max(float(np.median(np.abs(stated))), np.finfo(np.float32).tiny))


def _kernels(subject: _Subject) -> float:
    """Compare Grad-CAM by the native kernels with NumPy in float64, from the same activations and gradients."""
    worst = 0.0
    for tensor in subject.tensors[:_RANDOM_PICTURES]:
        evidence, _ = subject.explainer.evidence(tensor[None])
        activations, weights = evidence.activations[None], evidence.weights[None]
        found = kernels.render(activations, weights, weighting="channel", normalize="max", size=evidence.size)
        maps = normalized(np.maximum(weighted_sum(activations, weights, "channel"), 0), "max")
        expected = resized(maps, evidence.size)
        size = float(np.linalg.norm(expected))
        worst = max(worst, float(np.linalg.norm(found.heatmaps - expected)) / size if size else 0.0)
    return worst


def _repeats(subject: _Subject) -> float:
    """Return the largest difference between two runs, and between a picture alone and in a batch."""
    both = [subject.explainer(subject.tensors, method=subject.method).heatmaps for _ in range(2)]
    alone = subject.explainer(subject.tensors[:1], method=subject.method).heatmaps
    return float(max(np.abs(both[0] - both[1]).max(), np.abs(both[0][:1] - alone).max()))


def _blank(subject: _Subject) -> float:
    found = subject.explainer(subject.tensors, method=subject.method)
    return float(np.mean([blank for image in found for blank in image.blank]))


def _random_weights(subject: _Subject) -> float:
    """Return the mean rank correlation with the maps of the network with shuffled weights (Adebayo et al. 2018)."""
    with tempfile.TemporaryDirectory(prefix="fastcam-verify-") as folder:
        path = Path(folder) / "shuffled.onnx"
        _shuffle(subject.explainer.path, path)
        shuffled = Explainer(path)
        targets = subject.explainer(subject.tensors).targets
        maps = [
            each(subject.tensors, targets, method=subject.method, size="layer").maps[:, 0]
            for each in (subject.explainer, shuffled)
        ]
    return float(np.mean([rank_correlation(*_rows(pair)) for pair in zip(*maps, strict=True)]))


def _shuffle(source: Path, destination: Path) -> None:
    """Write a file whose weights have other places in their own tensors: sizes and ranges stay."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    random = np.random.default_rng(_SEED)
    for tensor in model.graph.initializer:
        if tensor.data_type == tensor.FLOAT and len(tensor.dims) > 1:
            array = numpy_helper.to_array(tensor)
            mixed = random.permutation(array.ravel()).reshape(array.shape)
            tensor.CopyFrom(numpy_helper.from_array(mixed, tensor.name))
    if model.ByteSize() > _LARGEST_MESSAGE:
        raise ArgumentError("the file is too large to be shuffled: 2 GB at most")
    onnx.save(model, destination)


_LARGEST_MESSAGE = 2**31 - 1


def _random_logit(subject: _Subject) -> float:
    """Return the mean rank correlation of the heatmaps of the two top classes."""
    if subject.explainer.class_count == 1:
        raise ArgumentError("there is only one class")
    found = subject.explainer(subject.tensors, "top2", method=subject.method, size="layer").maps
    return float(np.mean([rank_correlation(*_rows(pair)) for pair in found]))


def _faithfulness(subject: _Subject) -> float:
    """Return by how much insertion is at least better than with random heatmaps: the lower end of the interval."""
    found = evaluate(subject.explainer, list(subject.pictures or ()), methods=subject.method, metrics="insertion")
    return paired_gain(found, subject.method, "insertion", "random")


def _agreement(subject: _Subject) -> float:
    one, two = (each(subject.tensors).targets[:, 0] for each in _both(subject))
    return float((one == two).mean())


def _drift(subject: _Subject) -> float:
    """Return the median relative L2 distance of the heatmaps, of the class that the first file chooses."""
    targets = subject.explainer(subject.tensors).targets
    one, two = (each(subject.tensors, targets, method=subject.method).heatmaps[:, 0] for each in _both(subject))
    sizes = np.linalg.norm(one, axis=(1, 2))
    return float(np.median(np.linalg.norm(one - two, axis=(1, 2)) / np.where(sizes > 0, sizes, 1)))


def _both(subject: _Subject) -> tuple[Explainer, Explainer]:
    if subject.other is None:
        raise ArgumentError("there is no other file")
    if subject.other.signature[0] != subject.explainer.signature[0]:
        raise ArgumentError(f"{subject.other.path} takes other images than {subject.explainer.path}")
    return subject.explainer, subject.other


def _rows(pair: Sequence[Floats]) -> tuple[Doubles, Doubles]:
    first, second = (np.asarray(one, np.float64).ravel() for one in pair)
    return first, second


def _random_tensors(explainer: Explainer) -> Floats:
    layout: Layout = explainer.input_layout
    height, width = explainer.input_size
    random = np.random.default_rng(_SEED)
    if explainer.preprocessing is not None:
        coarse = random.integers(0, 256, (_RANDOM_PICTURES, 8, 8, 3), np.uint8)
        scale = (-(-height // 8), -(-width // 8))
        large = np.kron(coarse, np.ones((1, *scale, 1), np.uint8))[:, :height, :width]
        return np.asarray(explainer.prepare(list(large)), np.float32)
    channels = explainer.signature[0][next(iter(explainer.signature[0]))][layout.index("C")]
    sides = {"H": height, "W": width, "C": channels}
    return random.random((_RANDOM_PICTURES, *(sides[axis] for axis in layout[1:])), np.float32)


def _facts(subject: _Subject, pictures: Sequence[Any] | None) -> dict[str, Any]:
    paths = [item for item in pictures or () if isinstance(item, str | os.PathLike)]
    return {
        "model": str(subject.explainer.path),
        "model_sha256": digest_file(subject.explainer.path),
        **({} if subject.other is None else {"compared_with": str(subject.other.path)}),
        "pictures": None if pictures is None else len(pictures),
        "pictures_sha256": {str(path): digest_file(Path(path)) for path in paths},
        "method": subject.method,
        "layers": list(subject.explainer.layers),
        "providers": subject.explainer.providers,
        "kernels": kernels.describe(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


CHECKS: dict[str, Check] = {
    "gradients": Check(
        "relative error of the gradients against finite differences of the scores", 0.02, "at most", _gradients
    ),
    "kernels": Check("relative error of the heatmap kernels against NumPy in float64", 1e-5, "at most", _kernels),
    "repeats": Check(
        "largest difference of a heatmap between two runs, and between batches", 1e-5, "at most", _repeats
    ),
    "blank": Check(
        "share of maps in which hardly anything speaks for the class", 0.1, "at most", _blank, needs_photos=True
    ),
    "random_weights": Check(
        "rank correlation with the maps of the network with shuffled weights", 0.5, "at most", _random_weights
    ),
    "random_logit": Check(
        "rank correlation of the maps of the two top classes", 0.98, "at most", _random_logit, needs_photos=True
    ),
    "faithfulness": Check(
        "gain of insertion over random maps, lower end of the 95 % interval", 0.0, "at least", _faithfulness,
        needs_photos=True,
    ),
    "agreement": Check("share of pictures for which both files choose the same class", 0.95, "at least", _agreement),
    "drift": Check("median relative distance of the maps of both files", 0.1, "at most", _drift),
}  # fmt: skip
_COMPARISONS = ("agreement", "drift")
