"""The plain forward pass in the runtimes that a user could choose, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from .contestants import Models
from .networks import Floats, run_python

Forward = Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Runtime:
    """The package to install, and a function from models and images (N,C,H,W) to a scoring function."""

    package: str
    make: Callable[[Models, Floats], Forward]


def open_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options)


def plain_file(models: Models) -> Path:
    """Write the original classifier, ending in a softmax."""
    path = models.folder / "plain.onnx"
    if not path.exists():
        onnx.save(models.network.to_onnx(), path)
    return path


def _onnxruntime(models: Models, images: Floats) -> Forward:
    session = open_session(plain_file(models), models.threads)
    return lambda: np.asarray(session.run(None, {"images": images})[0])


def _torch(models: Models, images: Floats, compiled: bool = False) -> Forward:
    import torch
    from torch import nn

    features, head = models.torch
    module: Any = nn.Sequential(*features, *head, nn.Softmax(1)).eval()
    if compiled:
        torch.compiler.reset()
        module = torch.compile(module, dynamic=False)
    tensor = torch.from_numpy(images)

    def run() -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(module(tensor).numpy())

    return run


def _torch_compiled(models: Models, images: Floats) -> Forward:
    return _torch(models, images, compiled=True)


def _tensorflow(models: Models, images: Floats) -> Forward:
    model = models.keras
    import tensorflow as tf

    forward = tf.function(lambda pictures: tf.nn.softmax(model(pictures, training=False)))
    pictures = tf.constant(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    return lambda: np.asarray(forward(pictures))


def _openvino(models: Models, images: Floats) -> Forward:
    import openvino

    core = openvino.Core()
    model = core.read_model(plain_file(models))
    model.reshape(list(images.shape))
    options = {
        "INFERENCE_NUM_THREADS": models.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", options)
    return lambda: np.asarray(compiled([images])[0])


# In a separate process: the converter has its own protobuf, which aborts if TensorFlow's is loaded.
_CONVERT_TO_MNN = """
import sys
from MNN.tools import mnnconvert
source, path = sys.argv[1:]
mnnconvert.convert(["", "-f", "ONNX", "--modelFile", source, "--MNNModel", path, "--bizCode", "bench"])
"""


def _mnn(models: Models, images: Floats) -> Forward:
    import MNN

    path = models.folder / "plain.mnn"
    if not path.exists():
        run_python(_CONVERT_TO_MNN, str(plain_file(models)), str(path))
    network = MNN.nn.load_module_from_file(
        str(path), ["images"], ["predictions"], backend=0, precision_mode=1, thread_num=models.threads
    )
    variable = MNN.expr.const(images, list(images.shape), MNN.expr.NCHW)
    return lambda: np.array(MNN.expr.convert(network.forward([variable])[0], MNN.expr.NCHW).read())


ONNX_RUNTIME = "ONNX Runtime"
RUNTIMES: dict[str, Runtime] = {
    ONNX_RUNTIME: Runtime("onnxruntime", _onnxruntime),
    "torch": Runtime("torch", _torch),
    "torch.compile": Runtime("torch", _torch_compiled),
    "TensorFlow": Runtime("tensorflow", _tensorflow),
    "OpenVINO": Runtime("openvino", _openvino),
    "MNN": Runtime("MNN", _mnn),
}
