"""What runs a model on checked arguments and draws its maps: one engine for the CPU, one for CUDA devices.

In: an `ExplainedModel`, prepared inputs and a `Drawing`. Out: `Results`. Imports `explained_model`, `methods`,
`devices`, `kernels` and the ground.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...kernels.boundary import Normalize
from .inputs import Inputs

Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.int64]


class Drawing(NamedTuple):
    """What to fetch and how to draw it, checked.

    Attributes
    ----------
    fetched : tuple of str
        "logits", "targets", then two outputs of each layer.
    method : str
        Name of a row of `METHODS`.
    normalize : {"max", "minmax", None}
    size : tuple of int or None
        (H,W) of the heatmaps; None for the layer's.
    """

    fetched: tuple[str, ...]
    method: str
    normalize: Normalize
    size: tuple[int, int] | None


class Results(NamedTuple):
    """What an engine gives of N images: NumPy arrays, or arrays on the device where that was asked for.

    Attributes
    ----------
    heatmaps : (N,K,H,W) float32
    maps : (N,K,h,w) float32
    targets : (N,K) int64
    logits : (N,classes) float32
    """

    heatmaps: Any
    maps: Any
    targets: Any
    logits: Any


class Engine(Protocol):
    """Runs and draws; may be called by many threads at once."""

    def explain(self, inputs: Inputs, targets: Indices, drawing: Drawing, batch: int) -> Results:
        """Explain all images, ``batch`` at once.

        Parameters
        ----------
        inputs : Inputs
            N images.
        targets : ndarray
            (1 or N, K) int64.
        drawing : Drawing
        batch : int
            Largest number of images given to the model at once.

        Raises
        ------
        NonFiniteError
            NaN or infinity in an image's scores, activations or gradients.
        ModelError
            ONNX Runtime cannot run the model.
        FileFormatError
            Outputs do not fit each other.
        """
