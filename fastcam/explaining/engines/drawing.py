"""Maps and heatmaps on the host, from a session's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

from ... import kernels
from ...arrays import Doubles, Floats, Indices
from ...errors import FileFormatError, ModelError, NonFiniteError
from ...kernels.boundary import Normalize
from ...kernels.reference import normalized
from ..explained_model import DEFAULT_METHOD, ExplainedModel
from ..methods import find_method
from ..methods.table import as_weighted
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
        if self._model.draws_only:
            return self.draw_maps(task, logits, targets, layers, start)
        # Overflow here is found and reported by the kernel.
        with np.errstate(over="ignore", invalid="ignore"):
            weighed = [_weigh(task.method, *pair) for pair in zip(layers[::2], layers[1::2], strict=True)]
        return self._draw(task, logits, targets, weighed, start)

    def draw_maps(self, task: Task, logits: Floats, targets: Indices, maps: Sequence[Floats], start: int) -> Results:
        """Return what `draw` returns from each layer's maps before their ReLU, (N,K,h,w)."""
        return self._draw(task, logits, targets, [as_weighted(one) for one in maps], start)

    def _draw(self, task: Task, logits: Floats, targets: Indices, layers: Sequence[_Weighed], start: int) -> Results:
        advice = self._model.metadata.overflow_advice
        check_scores(logits, start, advice)
        try:
            if task.raw:
                raw = _raw(layers)
                return Results(raw, raw, targets, logits, np.zeros(targets.shape, np.float32))
            rendered = [self._render(task, layer, task.size if len(layers) == 1 else None) for layer in layers]
        except NonFiniteError as error:
            raise maps_not_finite(start + error.image, advice) from error
        if len(rendered) == 1:
            return Results(rendered[0].heatmaps, rendered[0].maps, targets, logits, rendered[0].evidence)
        maps = [one.maps for one in rendered]
        fused = fuse_boxes(maps, task.size) if self._model.has_boxes else None
        fused = fused or fuse(maps, task.size, task.normalize, find_method(task.method).merge)
        shares = [one.evidence for one in rendered]
        # Most layers of a detector have nothing to do with a box, which is too large or too small for them.
        evidence = np.max(shares, axis=0) if self._model.has_boxes else mean_evidence(shares)
        return Results(*fused, targets, logits, evidence)

    def check_outputs(self, n: int, k: int, logits: Floats, targets: Indices, layers: Sequence[Floats]) -> None:
        """Reject outputs of a modified file that do not match each other; later code relies on it.

        Raises
        ------
        FileFormatError
            They do not match.
        """
        fits = logits.shape == (n, self._model.table_size) and targets.shape == (n, k)
        if self._model.draws_only and layers:
            fits, layers = fits and layers[0].shape[:2] == (n, k) and layers[0].size > 0, ()
        for activations, second in zip(layers[::2], layers[1::2], strict=True):
            c = activations.shape[1]
            whole = (n, k, c) if second.ndim == 3 else (n, k, c, *activations.shape[2:])
            fits = fits and activations.shape[0] == n and second.shape == whole and activations.size > 0
        if not fits:
            raise FileFormatError(f"{self._model.path}: its outputs do not match each other: export the model again")
        self.check_targets(targets)

    def check_targets(self, targets: Indices) -> None:
        """Reject explained classes that the model does not have.

        Raises
        ------
        FileFormatError
            There is such a class.
        """
        # Python's own minimum: NumPy's takes microseconds to start.
        indices = targets.ravel().tolist()
        low, high = min(indices), max(indices)
        # A detector may find fewer boxes than were asked for.
        lowest = -1 if self._model.has_boxes else 0
        if not lowest <= low <= high < self._model.table_size:
            raise FileFormatError(
                f"{self._model.path}: it explained the classes {low}..{high} of {self._model.table_size}: export the "
                "model again"
            )

    def _render(self, task: Task, layer: _Weighed, size: tuple[int, ...] | None) -> kernels.Rendered:
        activations, weights, weighting = layer
        if weighting == "outputs":
            return kernels.render_outputs(activations, weights, task.normalize, size, self._threads)
        return kernels.render(
            activations,
            weights,
            weighting=weighting,
            normalize=task.normalize,
            size=size,
            threads=self._threads,
        )


# Activations, weights, and how they are combined. "outputs": as the file gives them, and the kernels expect them.
_Weighed: TypeAlias = tuple[Floats, Floats, Literal["outputs", "channel", "element"]]


def _weigh(method: str, activations: Floats, second: Floats) -> _Weighed:
    if method == DEFAULT_METHOD:
        return activations, second, "outputs"
    return find_method(method).weigh(activations, second)


def _raw(layers: Sequence[_Weighed]) -> Floats:
    """Return maps before their ReLU, (N,K,h,w): the mean of several layers', of the largest one's size."""
    found = [_weighted_sum(*layer) for layer in layers]
    for single in found:
        bad = kernels.first_not_finite(single)
        if bad is not None:
            raise NonFiniteError("a map is not finite", bad)
    if len(found) == 1:
        return found[0]
    largest = max((single.shape[2:] for single in found), key=math.prod)
    return np.asarray(np.mean([kernels.resize(single, largest) for single in found], axis=0), np.float32)


def _weighted_sum(activations: Floats, weights: Floats, weighting: str) -> Floats:
    """Return the sum over channels of weight times activation, (N,K,h,w)."""
    # Overflow is found by the caller.
    with np.errstate(over="ignore", invalid="ignore"):
        if weighting == "element":
            return np.ascontiguousarray((weights * activations[:, None]).sum(axis=2, dtype=np.float64), np.float32)
        n, c, h, w = activations.shape
        return np.ascontiguousarray((weights @ activations.reshape(n, c, h * w)).reshape(n, -1, h, w), np.float32)


def check_answered(model: ExplainedModel, wanted: Indices, explained: Indices, logits: Floats) -> None:
    """Raise ModelError if the file explained other classes than the requested ones.

    Some execution providers take the default of ``target`` for a constant, and always explain the top class.

    Parameters
    ----------
    model : ExplainedModel
    wanted : ndarray
        (1 or N, K): class indices, or -r for the class of rank r.
    explained : ndarray
        (N,K), as the file says.
    logits : ndarray
        (N,classes).
    """
    path = model.path
    reason = 'its execution provider ignores the input "target". Export the model with target="required"'
    if explained.shape != (len(logits), wanted.shape[1]):
        raise ModelError(f"{path}: asked for {wanted.shape[1]} classes of each image, got {explained.shape}: {reason}")
    asked = np.broadcast_to(wanted, explained.shape)
    different = (asked >= 0) & (asked != explained)
    lowest = -int(asked.min())
    # Regions are ranked by their size, and boxes after suppression.
    if lowest > 0 and model.metadata.score in ("classes", "values"):
        best = -np.sort(-logits, axis=1)[:, :lowest] if lowest > 1 else logits.max(axis=1, keepdims=True)
        ranked = np.take_along_axis(best, np.maximum(-asked - 1, 0), axis=1)
        # Classes with equal scores share ranks; scores that are not finite are reported later.
        scores = np.take_along_axis(logits, np.clip(explained, 0, logits.shape[1] - 1), axis=1)
        different |= (asked < 0) & ((scores < ranked) | (scores > ranked))
    if different.any():
        image, position = np.argwhere(different)[0]
        raise ModelError(
            f"{path}: asked to explain {_target_name(int(asked[image, position]))} of image {image} of a batch, got "
            f"class {explained[image, position]}: {reason}"
        )


def _target_name(target: int) -> str:
    return f"class {target}" if target >= 0 else f"the class of rank {-target}"


def check_scores(logits: Floats, start: int, advice: str) -> None:
    """Raise NonFiniteError for the first image with scores that are not finite; images count from ``start``."""
    bad = kernels.first_not_finite(logits)
    if bad is not None:
        raise NonFiniteError(f"the scores of image {start + bad} are not finite: {advice}", start + bad)


def maps_not_finite(image: int, advice: str) -> NonFiniteError:
    """Return the error for an image whose maps are not finite; ``advice`` says what to do."""
    return NonFiniteError(f"the activations or gradients of image {image} are not finite: {advice}", image)


def fuse(
    maps: Sequence[Floats], size: tuple[int, ...] | None, normalize: Normalize, merge: str = "mean"
) -> tuple[Floats, Floats]:
    """Return several layers' maps as one: heatmaps of ``size``, and maps of the largest layer's size."""
    largest = max((single.shape[2:] for single in maps), key=math.prod)
    heatmaps, fused = (_merged(maps, chosen, normalize, merge) for chosen in (size or largest, largest))
    return heatmaps, fused


def fuse_boxes(maps: Sequence[Floats], size: tuple[int, ...] | None) -> tuple[Floats, Floats] | None:
    """Return `fuse`'s results where each box is explained by one layer at most: that layer's maps.

    A detector scores a box at one size of map. None where a box has evidence in several layers.
    """
    contributes = np.stack([single.any(axis=(2, 3)) for single in maps])
    if (contributes.sum(axis=0) > 1).any():
        return None
    largest = max((single.shape[2:] for single in maps), key=math.prod)
    heatmaps, fused = (np.zeros((*maps[0].shape[:2], *chosen), np.float32) for chosen in (size or largest, largest))
    for single, rows in zip(maps, contributes, strict=True):
        chosen = np.ascontiguousarray(single[rows][None])
        if chosen.size:
            for drawn in (heatmaps, fused):
                drawn[rows] = kernels.resize(chosen, drawn.shape[2:])[0]
    return heatmaps, fused


def joined_layers(layers: Sequence[Results], size: tuple[int, ...] | None) -> Results:
    """Return the results of a detector from those of its layers, scaled and of their own sizes."""
    maps = [one.maps for one in layers]
    heatmaps, fused = fuse_boxes(maps, size) or fuse(maps, size, None)
    return layers[0]._replace(heatmaps=heatmaps, maps=fused, evidence=np.max([one.evidence for one in layers], axis=0))


def mean_evidence(layers: Sequence[Floats]) -> Floats:
    """Return the mean of several layers' evidence (N,K)."""
    return np.asarray(np.mean(layers, axis=0, dtype=np.float64), np.float32)


_MERGES: dict[str, Callable[[Doubles], Doubles]] = {
    "mean": lambda maps: np.asarray(maps.mean(axis=0)),
    "product": lambda maps: np.asarray(maps.prod(axis=0)),
}


def _merged(maps: Sequence[Floats], size: tuple[int, ...], normalize: Normalize, merge: str) -> Floats:
    """Return several layers' maps (N,K,h,w) as one, of this size, normalised as they were."""
    resized = np.stack([kernels.resize(single, size) for single in maps]).astype(np.float64)
    return normalized(_MERGES[merge](resized), normalize).astype(np.float32)
