"""The expected results of a file's self-test, computed by ONNX Runtime with all optimizations disabled."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..graph import Graph, operator
from ..metadata import Metadata
from ..notes import Note
from ..selftest import SelfTest, hashed, sampling_step
from .ops import QUANTIZATION_OPS
from .writer import write_model

# Relative L2 errors allowed for other runtimes: whole float32 networks stay within 1e-4. Some runtimes round float16
# after every op and some never; fused ops round quantized values at other points.
_TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2}
_QUANTIZED_TOLERANCE = 1e-1
# When runtimes resize a picture, float32 sums close to a half may round to another level: at most a few in 10,000.
_RESIZING_TOLERANCE = 1e-3
NO_SELFTEST = Note(
    "selftest", "The file holds no self-test, because computing it needs ONNX Runtime: pip install onnxruntime."
)
# Number of top ranks searched for the class with the most evidence: a nearly empty map would test nothing.
_RANKS = 10


def expect(graph: Graph, folder: Path, metadata: Metadata) -> SelfTest | None:
    """Return the self-test of a graph that draws, or None if ONNX Runtime is not installed.

    Parameters
    ----------
    graph : Graph
        With outputs "logits", "targets", "maps" and "heatmaps".
    folder : Path
        Holds a temporary copy of the model: its weights may be too large for memory twice.
    metadata : Metadata
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    name = next(name for name in graph.inputs if name != "target")
    height, width = (int(side or 0) for side in graph.shape("heatmaps")[2:])
    low, high = _range(metadata)
    # Files for pictures of any size are tested with one that has to be resized.
    sides = {"height": height + height // 4 + 1, "width": width + width // 3 + 1}
    known = [sides.get(str(side), side) for side in graph.inputs[name].shape]
    shape = tuple(side if isinstance(side, int) else 1 for side in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fastcam-selftest-") as temporary:
        write_model(graph, Path(temporary) / "model.onnx", {})
        session = onnxruntime.InferenceSession(
            Path(temporary) / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        inputs = {name: hashed(shape, low, high, graph.inputs[name].dtype)}
        classes = int(graph.shape("logits")[1] or 1)
        ranks = np.tile(-np.arange(1, min(_RANKS, classes) + 1, dtype=np.int64), (shape[0], 1))
        logits, targets, maps = session.run(["logits", "targets", "maps"], {**inputs, "target": ranks})
        evidence = (np.abs(maps[0]) if metadata.signed else maps[0]).max(axis=(1, 2))
        best = 1 + int(np.argmax(evidence[1:])) if len(evidence) > 1 else 0
        # Alone: the heatmap of a file that contrasts its targets depends on all of them.
        (heatmaps,) = session.run(["heatmaps"], {**inputs, "target": targets[:, best : best + 1]})
        del session
    step = sampling_step(height, width)
    return SelfTest(
        shape=shape,
        low=low,
        high=high,
        target=int(targets[0, best]),
        logits=logits[0],
        step=step,
        heatmap=heatmaps[0, 0, ::step, ::step].ravel(),
        tolerance=_tolerance(graph, metadata),
    )


def _range(metadata: Metadata) -> tuple[float, float]:
    """Return the lowest and highest value of the model's input, 0 and 1 if they are unknown."""
    if metadata.picture is not None:
        return 0.0, 255.0
    preprocessing: Any = metadata.preprocessing
    if preprocessing is None:
        return 0.0, 1.0
    ends = [(level - m) * s for m, s in zip(preprocessing.mean, preprocessing.scale, strict=True) for level in (0, 255)]
    return min(ends), max(ends)


def _tolerance(graph: Graph, metadata: Metadata) -> float:
    quantized = any(operator(node) in QUANTIZATION_OPS for node in graph.nodes)
    resizing = _RESIZING_TOLERANCE if metadata.picture == "any" else 0.0
    return max(_QUANTIZED_TOLERANCE if quantized else _TOLERANCES[metadata.precision], resizing)
