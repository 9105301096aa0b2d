"""The engine for the CPU, and for every provider whose results ONNX Runtime copies to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...arrays import Array, Indices
from ...errors import ArgumentError
from ..boxes import Boxes
from ..explained_model import ExplainedModel
from ..model_runs import ModelRunner
from . import Results, Task
from .drawing import HostPen, check_answered
from .inputs import WAY_OUT, Inputs

if TYPE_CHECKING:
    import onnxruntime

    from ..openvino import OpenVinoSession


class CpuEngine:
    """See `Engine`."""

    def __init__(
        self, model: ExplainedModel, session: onnxruntime.InferenceSession | OpenVinoSession, threads: int | None
    ) -> None:
        self._model = model
        self._runner = ModelRunner(model, session)
        self._pen = HostPen(model, threads)

    def explain(self, inputs: Inputs, targets: Indices, task: Task) -> Results:
        """See `Engine`."""
        if task.on_device:
            raise ArgumentError(f"the results cannot be on a GPU: the model runs on {self._runner.provider}. {WAY_OUT}")
        step = self._model.fixed_batch or task.batch
        parts = []
        for start in range(0, len(inputs), step):
            chunk = slice(start, start + step)
            tensor = inputs.tensor(chunk)
            wanted = targets if len(targets) == 1 else targets[chunk]
            extra = task.extra if task.extra is None or len(task.extra) == 1 else task.extra[chunk]
            logits, explained, *others = self._runner.run(task.fetched, tensor, wanted, extra, task.limit)
            layers, described = divided(others, len(self._model.descriptions))
            self._pen.check_outputs(len(tensor), wanted.shape[1], logits, explained, layers)
            check_answered(self._model, wanted, explained, logits)
            part = self._pen.draw(task, logits, explained, layers, start)
            if self._model.has_boxes:
                part = part._replace(boxes=Boxes(*described))
            elif described:
                part = part._replace(similarity=described[0])
            parts.append(part)
        return parts[0] if len(parts) == 1 else joined(parts)


def joined(parts: Sequence[Results]) -> Results:
    """Return the results of several batches as those of one."""
    arrays = [np.concatenate(group) for group in zip(*(part.arrays for part in parts), strict=True)]
    boxes = [part.boxes for part in parts if part.boxes is not None]
    corners, scores, classes = zip(*(one[:3] for one in boxes), strict=True) if boxes else ((), (), ())
    joined = Boxes(np.concatenate(corners), np.concatenate(scores), np.concatenate(classes)) if boxes else None
    similarity = [part.similarity for part in parts if part.similarity is not None]
    return Results._make([*arrays, joined, np.concatenate(similarity) if similarity else None])


def divided(values: list[Array], last: int) -> tuple[list[Array], list[Array]]:
    """Return the values without the last ones, and those."""
    return values[: len(values) - last], values[len(values) - last :]
