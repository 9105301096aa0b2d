"""OpenVINO as the runtime of an exported file, with the session interface that `engines.cpu` needs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError, MissingExtraError, ModelError
from ..files import why_no_file
from .providers import without_default


class _Value(NamedTuple):
    """An input or output, as ONNX Runtime's sessions describe it."""

    name: str
    type: str
    shape: list[int | str]


class OpenVinoSession:
    """A file that OpenVINO has compiled for the CPU, with the methods of an ONNX Runtime session.

    May be called from many threads at once.

    Parameters
    ----------
    path : Path
    threads : int or None
        Threads of the model; by default all processors.

    Raises
    ------
    MissingExtraError
        The openvino package is not installed.
    ModelError
        The file is missing or damaged, or OpenVINO cannot compile it.
    DeviceError
        The file keeps its weights in a second file, and its ``target`` has a default.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError(f'device="openvino" needs openvino ({error}): pip install openvino') from error
        reason = why_no_file(path)
        if reason is not None:
            raise ModelError(f"{path}: {reason}")
        source = without_default(path)
        self._inputs, self._outputs, self._properties, has_data_file = _description(path)
        if isinstance(source, bytes) and has_data_file:
            raise DeviceError(
                f"{path} keeps its weights in a second file, and OpenVINO would treat the default of its "
                'input "target" as a constant: export the model again with target="required"'
            )
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            model = core.read_model(source if isinstance(source, bytes) else str(source))
            self._compiled = core.compile_model(model, "CPU", options)
        except Exception as error:  # OpenVINO's exceptions derive from RuntimeError and others
            raise ModelError(f"{path}: OpenVINO cannot compile this model: {error}") from error
        self._local = threading.local()

    def get_providers(self) -> list[str]:
        """Return what runs the model."""
        return ["OpenVINO"]

    def get_inputs(self) -> list[_Value]:
        """Return the inputs."""
        return self._inputs

    def get_outputs(self) -> list[_Value]:
        """Return the outputs."""
        return self._outputs

    def get_modelmeta(self) -> SimpleNamespace:
        """Return the file's metadata."""
        return SimpleNamespace(custom_metadata_map=self._properties)

    def run(self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]], options: Any = None) -> list[NDArray[Any]]:
        """Return the named outputs; ``options`` are ONNX Runtime's."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        # Copies: the next run of this thread writes to the same memory.
        results = self._local.request.infer(dict(inputs), share_inputs=True)
        return [np.asarray(results[name]) for name in names]


def _description(path: Path) -> tuple[list[_Value], list[_Value], dict[str, str], bool]:
    """Return inputs, outputs and metadata of a file, and whether its weights are in a second file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    inputs, outputs = ([_value(item) for item in items] for items in (model.graph.input, model.graph.output))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return inputs, outputs, properties, any(tensor.external_data for tensor in model.graph.initializer)


def _value(info: Any) -> _Value:
    import onnx

    tensor = info.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    shape = [side.dim_value if side.HasField("dim_value") else side.dim_param for side in tensor.shape.dim]
    return _Value(info.name, f"tensor({kind})", shape)
