"""What methods that run the model again learn about one image: see `methods.Evidence`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import kernels
from ..arrays import Doubles, Floats, Indices
from ..errors import ArgumentError, NonFiniteError
from ..metadata import IMAGE_GRADIENTS, layer_outputs
from .explained_model import ExplainedModel
from .heads import Head
from .methods.table import Rows
from .model_runs import ModelRunner
from .probabilities import probabilities_of
from .runs import TimeLimit

# Called with the number of further runs that are planned, and with the number that were done.
Progress = Callable[[int, int], None]

_NOTHING: Floats = np.zeros((0, 0, 0), np.float32)


class Asked(NamedTuple):
    """What is asked about one image.

    Attributes
    ----------
    image : ndarray
        The model's input without its batch.
    targets : ndarray
        (K,) entries of the table of scores.
    scores : ndarray
        (K,), of the whole image.
    layer : pair of ndarray or None
        Activations (C,h,w) and pooled gradients (K,C) of the explained layer, if the method reads them.
    extra : ndarray or None
        The model's further input, (1, ...).
    batch : int
        Largest number of images given to the model at once.
    limit : TimeLimit
    progress : callable
    """

    image: Floats
    targets: Indices
    scores: Doubles
    layer: tuple[Floats, Floats] | None
    extra: Floats | None
    batch: int
    limit: TimeLimit
    progress: Progress


class Sessions(Protocol):
    """The sessions of a model, each opened when it is first needed."""

    @property
    def runner(self) -> ModelRunner:
        """Runs the model."""

    def gives(self, name: str) -> ModelRunner:
        """Return what runs the model with an output for single methods."""

    def head(self, position: int) -> Head:
        """Return the head of a layer."""

    def background(self) -> Floats | None:
        """Return the images to compare with, as the model takes them, if there are any."""


class ImageEvidence:
    """See `methods.Evidence`.

    Parameters
    ----------
    model : ExplainedModel
    sessions : Sessions
    position : int
        Number of the explained layer.
    asked : Asked
    """

    def __init__(self, model: ExplainedModel, sessions: Sessions, position: int, asked: Asked) -> None:
        self._model = model
        self._sessions = sessions
        self.position = position
        self._asked = asked
        self.image = asked.image
        self.scores = asked.scores
        self.activations, self.weights = asked.layer or (_NOTHING, _NOTHING)
        self.layout = model.metadata.input_layout
        self.size = model.side("H"), model.side("W")

    def resize(self, maps: Floats, size: tuple[int, int]) -> Floats:
        """See `methods.Evidence`."""
        return np.asarray(kernels.resize(np.ascontiguousarray(maps[None]), size)[0])

    def score(self, images: Rows, count: int, *, probabilities: bool = False) -> Doubles:
        """See `methods.Evidence`."""
        output = "similarity" if self._model.metadata.score == "embedding" else "logits"
        answers = self._answers(self._sessions.runner, [output], images, count)
        return np.concatenate([self._of_targets(table, probabilities) for _, (table,) in answers])

    def score_masked(self, masks: Rows, count: int, *, probabilities: bool = False) -> Doubles:
        """See `methods.Evidence`."""
        shape = (-1, *self.size, 1) if self.layout == "NHWC" else (-1, 1, *self.size)

        def masked(rows: slice) -> Floats:
            whole = masks(rows)
            if whole.shape[1:] != self.size:
                whole = self.resize(whole, self.size)
            return np.asarray(self.image * whole.reshape(shape))

        return self.score(masked, count, probabilities=probabilities)

    def score_without_channels(self) -> Doubles:
        """See `methods.Evidence`."""
        if self._model.metadata.score == "embedding":
            raise ArgumentError("the channels of an embedding's layer cannot be taken away: choose another method")
        head = self._head()
        table = head.without_channels(self.activations, self._asked.batch, self._asked.limit)
        return self._of_targets(table)

    def has_linear_head(self) -> bool:
        """See `methods.Evidence`."""
        return self._head().is_linear

    def image_gradients(self, images: Rows, count: int, weights: Doubles) -> Doubles:
        """See `methods.Evidence`."""
        total = np.zeros((len(self._asked.targets), *self.image.shape))
        runner = self._sessions.gives(IMAGE_GRADIENTS)
        for rows, (gradients,) in self._answers(runner, [IMAGE_GRADIENTS], images, count):
            total += np.einsum("m...,mk...->k...", weights[rows], gradients.astype(np.float64))
        return total

    def output(self, name: str) -> Doubles:
        """See `methods.Evidence`."""
        runner = self._sessions.gives(name)
        ((_, (found,)),) = self._answers(runner, [name], lambda rows: self.image[None], 1)
        return np.asarray(found[0], np.float64)

    @property
    def background(self) -> Floats:
        """See `methods.Evidence`."""
        found = self._sessions.background()
        if found is None:
            raise ArgumentError(
                "the method compares the image with a background, such as some hundred training images: pass "
                f"background= to Explainer({str(self._model.path)!r}, ...), or --background"
            )
        return found

    def layer_gradients(self, images: Rows, count: int) -> tuple[Doubles, Doubles, Doubles]:
        """See `methods.Evidence`."""
        name = layer_outputs(self.position).gradients
        totals = [np.zeros(()) for _ in range(3)]
        for _, (gradients,) in self._answers(self._sessions.runner, [name], images, count):
            doubles = gradients.astype(np.float64)
            totals = [total + (doubles**power).sum(axis=0) for power, total in enumerate(totals, 1)]
        first, second, third = (total / count for total in totals)
        return first, second, third

    def _head(self) -> Head:
        if self._model.fixed_batch is not None:
            raise ArgumentError(
                f"{self._model.path} takes batches of exactly {self._model.fixed_batch} images, and so does its head: "
                "export it with a dynamic batch, or choose another method"
            )
        return self._sessions.head(self.position)

    def _of_targets(self, table: Floats, probabilities: bool = False) -> Doubles:
        """Return the targets' columns (M,K) of tables of scores (M,T)."""
        if not np.isfinite(table).all():
            raise NonFiniteError(
                f"the scores of a changed image are not finite: {self._model.metadata.overflow_advice}", 0
            )
        if self._model.metadata.score == "embedding":
            return table.astype(np.float64)
        likely = probabilities_of(table, self._model.metadata.score_activation) if probabilities else None
        return (table if likely is None else likely)[:, self._asked.targets].astype(np.float64)

    def _answers(
        self, runner: ModelRunner, fetched: Sequence[str], images: Rows, count: int
    ) -> Iterator[tuple[slice, list[Any]]]:
        """Yield the outputs of images, batch by batch."""
        asked = self._asked
        step = self._model.fixed_batch or self._asked.batch
        self._asked.progress(count, 0)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            tensor = np.ascontiguousarray(images(rows), np.float32)
            yield rows, runner.run(fetched, tensor, asked.targets[None], asked.extra, asked.limit)
            self._asked.progress(0, rows.stop - rows.start)
