"""Runs of an explained model on arrays of the host, whatever its execution provider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, Indices
from ..errors import FastcamError, ModelError
from . import runs
from .explained_model import ExplainedModel
from .runs import TimeLimit

if TYPE_CHECKING:
    import onnxruntime

    from .openvino import OpenVinoSession


class ModelRunner:
    """Feeds a session and fetches its outputs; can be called from many threads at once.

    Parameters
    ----------
    model : ExplainedModel
    session : onnxruntime.InferenceSession or OpenVinoSession
    """

    def __init__(self, model: ExplainedModel, session: onnxruntime.InferenceSession | OpenVinoSession) -> None:
        self._model = model
        self._session = session

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self._session.get_providers()[0])

    def run(
        self, fetched: Sequence[str], tensor: Array, targets: Indices, extra: Array | None, limit: TimeLimit
    ) -> list[Array]:
        """Return outputs with a row for each of ``tensor``.

        Parameters
        ----------
        fetched : sequence of str
        tensor : ndarray
            The model's input, (n, ...).
        targets : ndarray
            (1 or n, K).
        extra : ndarray or None
            The model's further input, (1 or n, ...).
        limit : TimeLimit

        Raises
        ------
        ModelError
            ONNX Runtime cannot run the model.
        TimeLimitError
            The time limit was exceeded.
        """
        count = len(tensor)
        fixed_batch = self._model.fixed_batch
        if extra is not None and fixed_batch is not None and len(extra) > 1:
            extra = _filled(extra, fixed_batch)
        if fixed_batch is not None:
            # Such a file takes only full batches: the last one is padded with its last image.
            tensor, targets = (_filled(array, fixed_batch) for array in (tensor, targets))
        feeds = {self._model.input_name: tensor, "target": targets}
        if extra is not None and self._model.extra is not None:
            feeds[self._model.extra] = extra
        try:
            outputs = runs.run(lambda options: self._session.run(fetched, feeds, options), limit)
        except FastcamError:
            raise
        except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
            raise ModelError(f"{self._model.path}: ONNX Runtime cannot run this model: {error}") from error
        return list(outputs) if fixed_batch is None else [array[:count] for array in outputs]


def _filled(array: Array, count: int) -> Array:
    """Repeat the last row until there are ``count`` rows."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])
