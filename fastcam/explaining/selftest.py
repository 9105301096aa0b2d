"""Runs the self-test of a file that draws its own heatmaps, in one of several runtimes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, FastcamError, FileFormatError, MissingExtraError, ModelError, suggest
from ..files import why_no_file
from ..pictures.writing import write_image
from ..selftest import SelfTest

Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"
_OUTPUTS = ("logits", "targets", "heatmaps")
_UINT8 = 2  # onnx.TensorProto.UINT8


@dataclass(frozen=True)
class SelfTestResult:
    """The result of a file's self-test in a runtime.

    Attributes
    ----------
    runtime : str
        Its name and version.
    target, explained : int
        The requested class, and the explained one.
    logits_error, heatmap_error : float
        Relative L2 errors.
    tolerance : float
        The largest error that the file allows.
    """

    runtime: str
    target: int
    explained: int
    logits_error: float
    heatmap_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the runtime explained the right class, with errors within the tolerance."""
        return self.explained == self.target and max(self.logits_error, self.heatmap_error) <= self.tolerance


def run_selftest(path: str | os.PathLike[str], runtime: str = "onnxruntime") -> SelfTestResult:
    """Run a file on its own test input in a runtime, and compare the result with the one stored in the file.

    Parameters
    ----------
    path : path
        A file of ``fastcam.export(..., draw=...)``.
    runtime : {"onnxruntime", "openvino", "opencv", "reference"}
        "reference" is the evaluator of the onnx package: slow.

    Raises
    ------
    ArgumentError
        The runtime is not known.
    MissingExtraError
        It is not installed.
    FileFormatError
        The file holds no self-test.
    ModelError
        The file cannot be read, or the runtime cannot run it.
    """
    import onnx

    if runtime not in RUNTIMES:
        hint = suggest(str(runtime), RUNTIMES)
        raise ArgumentError(f"runtime={runtime!r}: {hint}choose one of {', '.join(RUNTIMES)}")
    model, test = _read(path)
    image = next(item for item in model.graph.input if item.name != "target")
    kind = onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type)
    target = np.full((test.shape[0], 1), test.target, np.int64)
    module = _module(runtime)
    try:
        outputs = RUNTIMES[runtime](module, str(path), {image.name: test.input(kind), "target": target})
    except FastcamError:
        raise
    except Exception as error:  # each runtime has its own
        raise ModelError(f"{path}: {runtime} cannot run this model: {error}") from error
    logits, heatmaps = test.errors(outputs["logits"], outputs["heatmaps"])
    return SelfTestResult(
        runtime=f"{runtime} {module.__version__}",
        target=test.target,
        explained=int(outputs["targets"][0, 0]),
        logits_error=logits,
        heatmap_error=heatmaps,
        tolerance=test.tolerance,
    )


def write_selftest_picture(path: str | os.PathLike[str], picture: str | os.PathLike[str]) -> int:
    """Write the picture of a file's self-test, for a program that runs the file, and return the class to explain.

    Raises
    ------
    FileFormatError
        The file holds no self-test.
    ArgumentError
        The file does not take pictures, or the picture's suffix is not that of a lossless format.
    ModelError
        The file cannot be read.
    WriteError
        The picture cannot be written.
    """
    model, test = _read(path)
    kind = next(item for item in model.graph.input if item.name != "target").type.tensor_type.elem_type
    if kind != _UINT8:
        raise ArgumentError(f'{path} does not take pictures: export the model again with picture="input" or "any"')
    if Path(picture).suffix.lower() != ".png":
        raise ArgumentError(f"{picture}: the picture must keep every value: give a name that ends in .png")
    write_image(test.input(np.uint8)[0], picture)
    return test.target


def check_selftest_answer(path: str | os.PathLike[str], answer: str | os.PathLike[str]) -> tuple[float, float]:
    """Return the relative L2 error of a heatmap that another program wrote as raw float32, and the tolerance.

    Raises
    ------
    FileFormatError
        The file holds no self-test, or the other program's heatmap has the wrong size.
    ModelError
        A file cannot be read.
    """
    model, test = _read(path)
    output = next(item for item in model.graph.output if item.name == "heatmaps")
    height, width = (side.dim_value for side in output.type.tensor_type.shape.dim[2:])
    try:
        values = np.fromfile(answer, np.dtype("<f4"))
    except OSError as error:
        raise ModelError(f"{answer}: cannot be read: {error.strerror or error}") from error
    if values.size != height * width:
        raise FileFormatError(f"{answer} holds {values.size} numbers; a heatmap has {height} x {width}")
    return test.errors(test.logits[None], values.reshape(1, 1, height, width))[1], test.tolerance


def _read(path: str | os.PathLike[str]) -> tuple[Any, SelfTest]:
    """Return a file's model, without external weights, and its self-test."""
    import onnx

    reason = why_no_file(Path(path))
    if reason is not None:
        raise ModelError(f"{path}: {reason}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return model, SelfTest.from_properties({entry.key: entry.value for entry in model.metadata_props}, str(path))


def _module(runtime: str) -> Any:
    name, package = _MODULES[runtime]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"runtime={runtime!r} needs {package} ({error}): pip install {package}") from error


def _onnxruntime(module: Any, path: str, inputs: Arrays) -> Arrays:
    options = module.SessionOptions()
    options.log_severity_level = 3
    session = module.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip(_OUTPUTS, session.run(_OUTPUTS, inputs), strict=True))


def _openvino(module: Any, path: str, inputs: Arrays) -> Arrays:
    core = module.Core()
    model = core.read_model(path)
    names = {name for item in model.inputs for name in item.names}
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled({name: array for name, array in inputs.items() if name in names})
    return {name: results[name] for name in _OUTPUTS}


def _opencv(module: Any, path: str, inputs: Arrays) -> Arrays:
    network = module.dnn.readNetFromONNX(path)
    for name, array in inputs.items():
        network.setInput(array, name)
    # It returns either one output or all of them.
    names = network.getUnconnectedOutLayersNames()
    return dict(zip(names, network.forward(names), strict=True))


def _reference(module: Any, path: str, inputs: Arrays) -> Arrays:
    from onnx.reference import ReferenceEvaluator

    # A comparison with NaN warns in NumPy.
    with np.errstate(all="ignore"):
        evaluator = ReferenceEvaluator(path)
        return dict(zip(_OUTPUTS, evaluator.run(list(_OUTPUTS), dict(inputs)), strict=True))


RUNTIMES: dict[str, Callable[[Any, str, Arrays], Arrays]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "opencv": _opencv,
    "reference": _reference,
}
_MODULES = {
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "opencv": ("cv2", "opencv-python-headless"),
    "reference": ("onnx", "onnx"),
}
