"""The models behind the Open Inference Protocol: a normal inference request returns the heatmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arguments import shown
from ..arrays import Array
from ..errors import ArgumentError
from ..explaining.explainer import Explainer
from ..explaining.explanation import Explanation
from .pictures import decode

PICTURES, TENSOR, TARGET = "pictures", "image", "target"
_DEFAULT_OUTPUTS = ("logits", "targets", "heatmaps")
_PARAMETERS = ("method", "normalize", "size", "binary_data_output")


class InferenceRequest(NamedTuple):
    """What a client asks for.

    Attributes
    ----------
    images
        A preprocessed batch, or a list of pictures.
    target : list or None
        (N or 1, K) indices.
    options : dict
        Of the call.
    outputs : tuple of str
    binary : set of str
        Outputs to send as bytes.
    """

    images: Any
    target: Any
    options: dict[str, Any]
    outputs: tuple[str, ...]
    binary: set[str]


def describe(explainer: Explainer, name: str) -> dict[str, Any]:
    """Return a model's metadata."""
    height, width = explainer.input_size
    shape = list(explainer.signature[0][next(iter(explainer.signature[0]))])
    return {
        "name": name,
        "versions": ["1"],
        "platform": "onnx_fastcam",
        "inputs": [
            {"name": TENSOR, "datatype": "FP32", "shape": [-1, *shape[1:]]},
            {"name": PICTURES, "datatype": "BYTES", "shape": [-1]},
            {"name": TARGET, "datatype": "INT64", "shape": [-1, -1]},
        ],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, explainer.class_count]},
            {"name": "targets", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "heatmaps", "datatype": "FP32", "shape": [-1, -1, height, width]},
            {"name": "evidence", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, explainer.class_count]},
        ],
    }


def read_inference(message: Mapping[str, Any], inputs: Mapping[str, Any], most_pixels: int) -> InferenceRequest:
    """Check a request's inputs, parameters and outputs.

    Raises
    ------
    ArgumentError
        They are not those of the model.
    """
    unknown = inputs.keys() - {TENSOR, PICTURES, TARGET}
    if unknown or (TENSOR in inputs) == (PICTURES in inputs):
        raise ArgumentError(
            f"the inputs are {', '.join(inputs)}: give {TENSOR} (FP32, preprocessed) or {PICTURES} (BYTES, files of "
            f"photos), and if you like {TARGET} (INT64)"
        )
    parameters = message.get("parameters", {})
    if not isinstance(parameters, dict) or parameters.keys() - set(_PARAMETERS):
        raise ArgumentError(f"parameters: {shown(parameters)}: choose from {', '.join(_PARAMETERS)}")
    options = {name: value for name, value in parameters.items() if name != "binary_data_output"}
    outputs, binary = _outputs(message.get("outputs"), whole=parameters.get("binary_data_output") is True)
    return InferenceRequest(_images(inputs, most_pixels), _target(inputs.get(TARGET)), options, outputs, binary)


def _images(inputs: Mapping[str, Any], most_pixels: int) -> Any:
    if PICTURES in inputs:
        files = inputs[PICTURES]
        if not isinstance(files, list):
            raise ArgumentError(f"input {PICTURES!r}: its datatype is BYTES, the files of photos")
        return [decode(file, most_pixels) for file in files]
    tensor = inputs[TENSOR]
    if not isinstance(tensor, np.ndarray) or tensor.dtype != np.float32:
        raise ArgumentError(f"input {TENSOR!r}: its datatype is FP32")
    return tensor


def _target(value: Any) -> Any:
    """Return classes by index; -1 stands for the top class, as in the file."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind != "i" or value.ndim != 2:
        raise ArgumentError(f"input {TARGET!r}: give INT64 of shape (N,K)")
    if (value == -1).all() and value.shape[1] == 1:
        return None
    return value.tolist()


def _outputs(asked: Any, *, whole: bool) -> tuple[tuple[str, ...], set[str]]:
    if asked is None:
        return _DEFAULT_OUTPUTS, set(_DEFAULT_OUTPUTS) if whole else set()
    if not isinstance(asked, list) or not all(
        isinstance(item, dict) and item.get("name") in list(_OUTPUTS) for item in asked
    ):
        raise ArgumentError(f"outputs: {shown(asked)}: choose from {', '.join(_OUTPUTS)}")
    names = tuple(item["name"] for item in asked)
    given = (item.get("parameters") for item in asked)
    flags = [part.get("binary_data", whole) is True if isinstance(part, dict) else whole for part in given]
    return names, {name for name, flag in zip(names, flags, strict=True) if flag}


def _probabilities(found: Explanation) -> Array:
    if found.probabilities is None:
        raise ArgumentError("output 'probabilities': the file does not say how scores become probabilities")
    return found.probabilities


_OUTPUTS: dict[str, Any] = {
    "logits": lambda found: found.logits,
    "targets": lambda found: found.targets,
    "heatmaps": lambda found: found.heatmaps,
    "maps": lambda found: found.maps,
    "evidence": lambda found: found.evidence,
    "probabilities": _probabilities,
}


def infer(explainer: Explainer, request: InferenceRequest, timeout: float) -> dict[str, Array]:
    """Return the outputs that were asked for."""
    found = explainer(request.images, request.target, timeout=timeout, **request.options)
    return {name: np.asarray(_OUTPUTS[name](found)) for name in request.outputs}
