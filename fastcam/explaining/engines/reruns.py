"""The engine for methods that run the model again, on the host, whatever the model's execution provider."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tqdm

from ...arrays import Array, Floats, Indices
from ...errors import ArgumentError
from ..boxes import Boxes
from ..evidence import Asked, ImageEvidence, Progress
from ..explained_model import ExplainedModel
from ..heads import Head
from ..methods import find_method
from ..model_runs import ModelRunner
from . import Results, Task
from .cpu import divided, joined
from .drawing import HostPen, check_answered
from .inputs import Inputs

if TYPE_CHECKING:
    from .opening import Session


class _Answer(NamedTuple):
    """The model's answer for one image, and what may be asked further about each layer."""

    logits: Floats
    targets: Indices
    described: list[Array]
    evidence: list[ImageEvidence]


class RerunEngine:
    """See `Engine`."""

    def __init__(
        self,
        model: ExplainedModel,
        session: Session,
        open_evidence: Callable[[str], Session],
        threads: int | None,
        background: Floats | None = None,
    ) -> None:
        self._model = model
        self._runner = ModelRunner(model, session)
        self._open_evidence = open_evidence
        self._runners: dict[str, ModelRunner] = {}
        self._pen = HostPen(model, threads)
        self._threads = threads
        self._background = background
        self._heads: dict[int, Head] = {}
        self._opening = threading.Lock()

    def explain(self, inputs: Inputs, targets: Indices, task: Task) -> Results:
        """See `Engine`."""
        if task.on_device:
            raise ArgumentError(f"method={task.method!r} is computed on the host: omit on_device")
        with _bar(task) as progress:
            parts = [self._explained(inputs, targets, task, number, progress) for number in range(len(inputs))]
        return parts[0] if len(parts) == 1 else joined(parts)

    def evidence(self, inputs: Inputs, targets: Indices, task: Task) -> tuple[ImageEvidence, int]:
        """Return what may be asked about the first image, its first target and its first layer, and the target."""
        found = self._ask(inputs, targets, task, 0, _unseen)
        return found.evidence[0], int(found.targets[0, 0])

    def _explained(self, inputs: Inputs, targets: Indices, task: Task, number: int, progress: Progress) -> Results:
        found = self._ask(inputs, targets, task, number, progress)
        # Fewer boxes than asked for: their maps are empty.
        present = (found.targets[0] >= 0)[:, None, None]
        method = find_method(task.method)
        maps = [method.rerun(evidence, task.settings) * present for evidence in found.evidence]
        layers = [np.asarray(one, np.float32)[None] for one in maps]
        drawn = self._pen.draw_maps(task, found.logits, found.targets, layers, number)
        if self._model.has_boxes:
            return drawn._replace(boxes=Boxes(*found.described))
        return drawn._replace(similarity=found.described[0]) if found.described else drawn

    def _ask(self, inputs: Inputs, targets: Indices, task: Task, number: int, progress: Progress) -> _Answer:
        """Run the model on one image, and return what may be asked about each layer."""
        image = inputs.tensor(slice(number, number + 1))
        wanted = targets if len(targets) == 1 else targets[number : number + 1]
        extra = task.extra if task.extra is None or len(task.extra) == 1 else task.extra[number : number + 1]
        if self._model.metadata.score == "segmentation" and extra is None:
            raise ArgumentError(
                f"method={task.method!r} changes the picture, and with it the pixels where a class is predicted: give "
                "mask="
            )
        logits, explained, *others = self._runner.run(task.fetched, image, wanted, extra, task.limit)
        layers, described = divided(others, len(self._model.descriptions))
        self._pen.check_outputs(1, wanted.shape[1], logits, explained, layers)
        check_answered(self._model, wanted, explained, logits)
        entries = np.maximum(explained[0], 0)
        scores = described[0][0] if self._model.metadata.score == "embedding" else logits[0, entries]
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        evidence = []
        for index, position in enumerate(task.positions):
            layer = (pairs[index][0][0], pairs[index][1][0]) if pairs else None
            asked = Asked(image[0], entries, scores.astype(np.float64), layer, extra, task.batch, task.limit, progress)
            evidence.append(ImageEvidence(self._model, self, position, asked))
        return _Answer(logits, explained, described, evidence)

    @property
    def runner(self) -> ModelRunner:
        """Runs the model."""
        return self._runner

    def gives(self, name: str) -> ModelRunner:
        """Return what runs the model with an output for single methods, which is opened when it is first needed."""
        with self._opening:
            if name not in self._runners:
                self._model.check_unchanged()
                self._runners[name] = ModelRunner(self._model, self._open_evidence(name))
            return self._runners[name]

    def background(self) -> Floats | None:
        """Return the images to compare with, as the model takes them, if there are any."""
        return self._background

    def head(self, position: int) -> Head:
        """Return the head of a layer, which is opened when it is first needed."""
        with self._opening:
            if position not in self._heads:
                self._model.check_unchanged()
                self._heads[position] = Head(self._model.path, position, self._threads)
            return self._heads[position]


def _unseen(planned: int, done: int) -> None:
    """Show nothing."""


@contextmanager
def _bar(task: Task) -> Iterator[Progress]:
    """Return a function that shows how many of the planned runs have been done, and how long the others will take."""
    with tqdm.tqdm(desc=task.method, unit="run", disable=not task.progress, leave=False, total=0) as bar:

        def progress(planned: int, done: int) -> None:
            bar.total += planned
            bar.update(done)
            if planned:
                bar.refresh()

        yield progress
