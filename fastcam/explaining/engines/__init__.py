"""Engines run a model on checked arguments and draw its maps: one for the CPU, one for CUDA devices.

In: an `ExplainedModel`, prepared inputs and a `Task`. Out: `Results`. Imports `explained_model`, `methods`,
`devices`, `kernels` and the ground.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ...arrays import Array, Indices
from ...kernels.boundary import Normalize
from ..boxes import Boxes
from ..runs import TimeLimit
from .inputs import Inputs


class Task(NamedTuple):
    """What to fetch and how to draw it, checked.

    Attributes
    ----------
    fetched : tuple of str
        "logits", "targets", then two outputs of each layer, then `ExplainedModel.descriptions`.
    method : str
        Name of a row of `METHODS`.
    normalize : {"max", "minmax", None}
    size : tuple of int or None
        (H,W) of the heatmaps; None for that of the layer.
    batch : int
        Largest number of images given to the model at once.
    on_device : bool
        Whether the results stay on the device, as `DeviceTensor`.
    limit : TimeLimit
    raw : bool
        Whether maps before their ReLU are wanted, of the layer's size, drawn on the host.
    extra : ndarray or None
        The model's further input, with one row for all images or one per image.
    positions : sequence of int
        Numbers of the explained layers.
    settings : mapping
        All settings of the method.
    progress : bool
        Whether to show the progress of methods that run the model again.
    """

    fetched: tuple[str, ...]
    method: str
    normalize: Normalize
    size: tuple[int, ...] | None
    batch: int
    on_device: bool
    limit: TimeLimit
    raw: bool = False
    extra: Array | None = None
    positions: Sequence[int] = (0,)
    settings: Mapping[str, Any] = {}
    progress: bool = False


class Results(NamedTuple):
    """The results for N images: NumPy arrays, or arrays on the device if the task says so.

    Attributes
    ----------
    heatmaps : (N,K,H,W) float32
    maps : (N,K,h,w) float32
    targets : (N,K) int64
    logits : (N,classes) float32
    evidence : (N,K) float32
    boxes : Boxes or None
        Of a detector.
    similarity : (N,K) float32 or None
        Of an embedding, to each reference.
    """

    heatmaps: Any
    maps: Any
    targets: Any
    logits: Any
    evidence: Any
    boxes: Boxes | None = None
    similarity: Any = None

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any, Any]:
        """The fields that all kinds of scores have."""
        return self[:5]


class Engine(Protocol):
    """Runs and draws; can be called from many threads at once."""

    def explain(self, inputs: Inputs, targets: Indices, task: Task) -> Results:
        """Explain all images.

        Parameters
        ----------
        inputs : Inputs
            N images.
        targets : ndarray
            (1 or N, K) int64.
        task : Task

        Raises
        ------
        ArgumentError
            Images or results cannot be on a device with this engine.
        TimeLimitError
            The time limit was exceeded.
        NonFiniteError
            NaN or infinity in an image's scores, activations or gradients.
        ModelError
            ONNX Runtime cannot run the model.
        FileFormatError
            Outputs do not match each other.
        """
