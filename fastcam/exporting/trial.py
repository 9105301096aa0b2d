"""Run an exported file before it gets its final name, to check what inspecting the graph cannot guarantee.

The file runs in a child process, on one image and on three. That reveals a network that was traced for one batch
size, whose scores depend on the other images of the batch, that gives different scores each time, or whose scores
differ from those of its source.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import ModelError
from ..graph import Dim
from ..metadata import layer_outputs
from ..notes import Note
from .importers.imported import Sample, trial_images
from .importers.quarantine import QUARANTINE, CrashError

# Relative to the largest score. Float32 sums in a different order differ by less than 1e-5 in deep networks, float16
# sums and rounding steps of quantised networks by less than 1e-2.
_TOLERANCE = {"fp32": 2e-3, "fp16": 2e-2}
_MANY = 3

_RANDOM = (
    "The same images give different scores each time: the model holds random ops, for example a dropout that is active "
    "at inference."
)
_MIXED = (
    "The scores of an image depend on the other images in its batch, for example by a BatchNorm with batch statistics: "
    "explain images one by one."
)


@dataclass(frozen=True)
class Trial:
    """What to run, and what to expect.

    Attributes
    ----------
    input_name : str
    input_shape : tuple
        With the batch: a number if it is fixed.
    score_activation : {"softmax", "sigmoid", "none", "mixture", "selection"}
        What turns logits into the scores of the source, as `scores.remove_score_activation` returns it.
    precision : {"fp32", "fp16"}
    takes_target : bool
        Whether the input ``target`` has no default value.
    sample : Sample or None
        Scores of the source model for some images, if it could be run.
    layers : sequence of str
        The explained layers that any image should give a map.
    """

    input_name: str
    input_shape: tuple[Dim, ...]
    score_activation: str
    precision: str
    takes_target: bool = False
    sample: Sample | None = None
    layers: Sequence[str] = ()

    def run(self, path: Path) -> list[Note]:
        """Run a file and return notes for its owner.

        Raises
        ------
        ModelError
            ONNX Runtime cannot run the file, or its scores are not those of the source.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            return [_skipped("onnxruntime is not installed")]
        batch = self.input_shape[0]
        request = {
            "path": str(path),
            "name": self.input_name,
            "image": self.input_shape[1:],
            "batches": [batch] if isinstance(batch, int) else [1, _MANY],
            "target": self.takes_target,
            "weights": [layer_outputs(position).weights for position in range(len(self.layers))],
        }
        try:
            answer = QUARANTINE(f"{__name__}:run_bytes", json.dumps(request).encode(), size=_size(path))
        except CrashError as crash:
            if crash.late:
                return [_skipped("it takes too long on this machine")]
            raise
        with np.load(io.BytesIO(answer), allow_pickle=False) as found:
            results = {name: found[name] for name in found.files}
        return self._judge(results)

    def _judge(self, results: dict[str, Array]) -> list[Note]:
        if "reason" in results:
            return [_skipped(str(results["reason"]))]
        if "error" in results:
            raise ModelError(
                f"the exported file runs for some batch sizes only: {results['error']}. A shape in the model was fixed "
                "when it was traced or exported: take sizes from x.shape, not from len(x) or numbers"
            )
        tolerance = _TOLERANCE[self.precision]
        few, many, again = results["few"], results["many"], results["again"]
        if _differ(many, again, tolerance):
            return [Note("checks", _RANDOM)]
        if _differ(many[: len(few)], few, tolerance):
            return [Note("checks", _MIXED)]
        silent = [name for name, is_silent in zip(self.layers, results["silent"], strict=True) if is_silent]
        scores = _SCORES.get(self.score_activation)
        if self.sample is not None and scores is not None:
            _compare(scores(many), self.sample.scores, tolerance)
        return [_silent(silent)] if silent else []


def _silent(layers: Sequence[str]) -> Note:
    names = ", ".join(map(repr, layers))
    return Note(
        "layer",
        f"The gradients of the scores at layer {names} were all zero on {_MANY} test images: its heatmaps may be "
        "empty for every picture. Choose another layer of `candidates`.",
    )


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits)))


# From the file's logits to the scores of its source. A selection of classes cannot be compared: the softmax ran over
# all of them.
_SCORES: dict[str, Callable[[Array], Array]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "mixture": np.asarray,
    "none": np.asarray,
}


def _skipped(reason: str) -> Note:
    return Note("checks", f"The file was not test-run: {reason}.")


def _compare(found: Array, expected: Array, tolerance: float) -> None:
    """Raise ModelError if the file's scores differ from those of the source."""
    rows = expected.reshape(len(expected), -1)
    # Sources may give log-probabilities, one column of a pair, or scores in other units: only comparable ones count.
    if rows.shape != found.shape or not np.isfinite(rows).all():
        return
    if (rows <= 0).all() and np.allclose(np.exp(rows).sum(1), 1, atol=1e-3):
        rows = np.exp(rows)
    # Probabilities in percent.
    if (rows >= 0).all() and np.allclose(found.sum(1), 1, atol=1e-3):
        rows = rows / rows.sum(1, keepdims=True)
    if _differ(found, rows, tolerance):
        raise ModelError(
            f"the exported file's scores differ from the model's by up to "
            f"{np.abs(found - rows).max():.2g} of {np.abs(rows).max():.2g}. "
            "Please report the model; an .onnx file of it may work"
        )


def _differ(left: Array, right: Array, tolerance: float) -> bool:
    scale = max(np.abs(left).max(), np.abs(right).max(), np.finfo(np.float32).tiny)
    # A network may overflow on noise, which says nothing about the file: NaN counts as equal.
    with np.errstate(invalid="ignore"):
        return bool(np.abs(left - right).max() > tolerance * scale)


def _size(path: Path) -> int:
    """Return the size in bytes of a model, including data files that it may read."""
    data = (other.stat().st_size for other in path.parent.glob("*.data"))
    return path.stat().st_size + sum(data)


def run_bytes(data: bytes) -> bytes:
    """Run a file in ONNX Runtime, in the child process.

    Parameters
    ----------
    data : bytes
        A request as `Trial.run` makes it, in JSON.

    Returns
    -------
    bytes
        Arrays as np.savez writes them: the logits of the first batch size ("few"), those of the last ("many"), and of
        the same images once more ("again"); whether all weights of each layer were zero ("silent"); "error" if a run
        failed, "reason" if this runtime cannot decide.
    """
    request = json.loads(data)
    buffer = io.BytesIO()
    np.savez(buffer, **_run(**request))
    return buffer.getvalue()


def _run(
    path: str, name: str, image: list[int], batches: list[int], target: bool, weights: list[str]
) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # the runtime has its own exception classes, by version
        # Ops of other runtimes, or of libraries that users load themselves.
        return {"reason": f"ONNX Runtime on the CPU cannot load it ({_short(error)})"}
    images = trial_images(image, max(batches))
    runs = {"few": batches[0], "many": batches[-1], "again": batches[-1]}

    def feeds(count: int) -> dict[str, Array]:
        top_class = {"target": np.full((count, 1), -1, np.int64)} if target else {}
        return {name: images[:count], **top_class}

    try:
        found = {run: session.run(["logits", *weights], feeds(count)) for run, count in runs.items()}
    except Exception as error:  # noqa: BLE001  # the runtime has its own exception classes, by version
        return {"reason" if _is_short_of_memory(error) else "error": _short(error)}
    silent = [not array.any() for array in found["many"][1:]]
    return {**{run: outputs[0] for run, outputs in found.items()}, "silent": np.array(silent, bool)}


def _is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Failed to allocate memory" in str(error)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
