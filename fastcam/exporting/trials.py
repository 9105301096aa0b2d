"""Trial runs of a graph on seeded images, in whichever runtime is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..graph import Graph

# Amplitudes of the noise: the network may take pixels of 0..1, of -1..1, or of 0..255.
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))


def score_seeded_images(graph: Graph, value: str | None = None) -> NDArray[np.float64] | None:
    """Return a value for seeded noise, one row per image, or None if the graph cannot be run.

    ONNX Runtime runs it if installed, else the reference implementation in the onnx package.

    Parameters
    ----------
    graph : Graph
    value : str, optional
        By default the graph's first output.
    """
    if value is not None:
        graph = graph.copy(outputs=[value])
        graph.prune()
    name, (_, shape) = next(iter(graph.inputs.items()))
    batch, *sides = shape
    rng = np.random.default_rng(0)
    count = batch if isinstance(batch, int) else len(_RANGES)
    ranges = (_RANGES[index % len(_RANGES)] for index in range(count))
    images = np.stack([rng.uniform(low, high, [int(side or 0) for side in sides]) for low, high in ranges])
    try:
        return _run(graph.to_model(), {name: images.astype(np.float32)})
    except Exception:  # noqa: BLE001 - both runtimes raise their own, and a trial that fails decides nothing
        return None


def _run(model: onnx.ModelProto, inputs: dict[str, Any]) -> NDArray[np.float64]:
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        outputs: Any = ReferenceEvaluator(model).run(None, inputs)
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, inputs)
    return np.asarray(outputs[0], np.float64)
