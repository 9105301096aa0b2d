"""Maps and heatmaps on the host, from a session's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ... import kernels
from ...arrays import Floats, Indices
from ...errors import FileFormatError, NonFiniteError
from ...kernels.boundary import Normalize
from ...kernels.reference import normalized
from ..explained_model import DEFAULT_METHOD, ExplainedModel
from ..methods import find_method
from . import Results, Task


class HostPen:
    """Draws with the kernels of the CPU.

    Parameters
    ----------
    model : ExplainedModel
    threads : int or None
        Threads of the kernels.
    """

    def __init__(self, model: ExplainedModel, threads: int | None) -> None:
        self._model = model
        self._threads = threads

    def draw(self, task: Task, logits: Floats, targets: Indices, layers: Sequence[Floats], start: int) -> Results:
        """Return heatmaps, maps, targets and logits of one batch, whose first image is number ``start``.

        Raises
        ------
        NonFiniteError
            NaN or infinity in an image's scores, activations or gradients.
        """
        advice = self._model.metadata.overflow_advice
        check_scores(logits, start, advice)
        try:
            if len(layers) == 2:
                rendered = self._render(task, layers[0], layers[1], task.size)
                return Results(rendered.heatmaps, rendered.maps, targets, logits, rendered.evidence)
            pairs = zip(layers[::2], layers[1::2], strict=True)
            rendered_layers = [self._render(task, *pair, None) for pair in pairs]
        except NonFiniteError as error:
            raise maps_not_finite(start + error.image, advice) from error
        maps, evidence = ([getattr(one, name) for one in rendered_layers] for name in ("maps", "evidence"))
        return Results(*fuse(maps, task.size, task.normalize), targets, logits, mean_evidence(evidence))

    def check_outputs(self, n: int, k: int, logits: Floats, targets: Indices, layers: Sequence[Floats]) -> None:
        """Refuse outputs of a changed file that do not fit each other, which is taken for granted afterwards.

        Raises
        ------
        FileFormatError
            They do not.
        """
        fits = logits.shape == (n, self._model.class_count) and targets.shape == (n, k)
        for activations, second in zip(layers[::2], layers[1::2], strict=True):
            c = activations.shape[1]
            whole = (n, k, c) if second.ndim == 3 else (n, k, c, *activations.shape[2:])
            fits = fits and activations.shape[0] == n and second.shape == whole and activations.size > 0
        if not fits:
            raise FileFormatError(f"{self._model.path}: its outputs do not fit each other: export the model again")
        self.check_targets(targets)

    def check_targets(self, targets: Indices) -> None:
        """Refuse explained classes that the model does not have.

        Raises
        ------
        FileFormatError
            There is one.
        """
        # Python's own minimum: NumPy's takes microseconds to begin with.
        indices = targets.ravel().tolist()
        low, high = min(indices), max(indices)
        if not 0 <= low <= high < self._model.class_count:
            raise FileFormatError(
                f"{self._model.path}: it explained the classes {low}..{high} of {self._model.class_count}: export the "
                "model again"
            )

    def _render(
        self, task: Task, activations: Floats, second: Floats, size: tuple[int, int] | None
    ) -> kernels.Rendered:
        if task.method == DEFAULT_METHOD:
            return kernels.render_outputs(activations, second, task.normalize, size, self._threads)
        row = find_method(task.method)
        # What overflows here is found and named by the kernel.
        with np.errstate(over="ignore", invalid="ignore"):
            weights = row.weights(activations, second)
        return kernels.render(
            activations,
            weights,
            weighting=row.weighting,
            normalize=task.normalize,
            size=size,
            threads=self._threads,
        )


def check_scores(logits: Floats, start: int, advice: str) -> None:
    """Raise NonFiniteError for the first image whose scores are not finite; ``start`` is the number of the first."""
    bad = kernels.first_not_finite(logits)
    if bad is not None:
        raise NonFiniteError(f"the scores of image {start + bad} are not finite: {advice}", start + bad)


def maps_not_finite(image: int, advice: str) -> NonFiniteError:
    """Return the error of an image whose maps are not finite; ``advice`` says what to do."""
    return NonFiniteError(f"the activations or gradients of image {image} are not finite: {advice}", image)


def fuse(maps: Sequence[Floats], size: tuple[int, int] | None, normalize: Normalize) -> tuple[Floats, Floats]:
    """Return the mean of several layers' maps as heatmaps of ``size`` and as maps of the largest layer's size."""
    largest = max((single.shape[2:] for single in maps), key=math.prod)
    heatmaps, fused = (_mean(maps, chosen, normalize) for chosen in (size or largest, largest))
    return heatmaps, fused


def mean_evidence(layers: Sequence[Floats]) -> Floats:
    """Return the mean of several layers' evidence (N,K)."""
    return np.asarray(np.mean(layers, axis=0, dtype=np.float64), np.float32)


def _mean(maps: Sequence[Floats], size: tuple[int, int], normalize: Normalize) -> Floats:
    """Return the mean of several layers' maps (N,K,h,w) at one size, normalised as they were."""
    mean = np.mean([kernels.resize(single, size) for single in maps], axis=0, dtype=np.float64)
    return normalized(np.asarray(mean), normalize).astype(np.float32)
