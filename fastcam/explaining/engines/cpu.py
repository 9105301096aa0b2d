"""The engine of the CPU, and of every provider whose results ONNX Runtime brings to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelError
from ..explained_model import ExplainedModel
from . import Drawing, Results
from .drawing import HostDrawing, check_targets
from .inputs import Inputs

if TYPE_CHECKING:
    import onnxruntime

    from ..openvino import OpenVinoSession

Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.int64]


class CpuEngine:
    """See `Engine`."""

    def __init__(
        self, model: ExplainedModel, session: onnxruntime.InferenceSession | OpenVinoSession, threads: int | None
    ) -> None:
        self._model = model
        self._session = session
        self._drawing = HostDrawing(model, threads)

    def explain(self, inputs: Inputs, targets: Indices, drawing: Drawing, batch: int) -> Results:
        """See `Engine`."""
        step = self._model.fixed_batch or batch
        parts = []
        for start in range(0, len(inputs), step):
            chunk = slice(start, start + step)
            tensor = inputs.tensor(chunk)
            wanted = targets if len(targets) == 1 else targets[chunk]
            logits, explained, *layers = self._run(tensor, wanted, drawing.fetched)
            check_targets(self._model.path, wanted, explained, logits)
            self._drawing.check_shapes(len(tensor), wanted.shape[1], logits, explained, layers)
            parts.append(self._drawing.draw(drawing, logits, explained, layers, start))
        return parts[0] if len(parts) == 1 else Results(*map(np.concatenate, zip(*parts, strict=True)))

    def _run(self, tensor: NDArray[Any], targets: Indices, fetched: tuple[str, ...]) -> list[NDArray[Any]]:
        """Run the model; return the outputs ``fetched`` for every row of ``tensor``."""
        count = len(tensor)
        fixed_batch = self._model.fixed_batch
        if fixed_batch is not None:
            # Such a file takes whole batches only: the last image fills up the last one.
            tensor, targets = (_filled(array, fixed_batch) for array in (tensor, targets))
        try:
            outputs = self._session.run(fetched, {self._model.input_name: tensor, "target": targets})
        except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
            raise ModelError(f"{self._model.path}: ONNX Runtime cannot run this model: {error}") from error
        return list(outputs) if fixed_batch is None else [array[:count] for array in outputs]


def _filled(array: NDArray[Any], count: int) -> NDArray[Any]:
    """Repeat the last row until there are ``count``."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])
