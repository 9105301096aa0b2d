"""From a framework's model to a clean `Graph` of its forward pass: one module per framework, and tables to choose.

In: a Keras model, a torch module, an ONNX model or the path of one. Out: an `ImportedModel`. Imports the ground only;
each framework is imported when one of its models arrives.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx

from ...arguments import shown
from ...errors import ModelError
from ...graph import Graph
from .imported import ImportedModel, ImportOptions
from .keras_models import import_keras, is_keras, read_keras, read_saved_model
from .onnx_models import import_onnx, read_onnx
from .torch_modules import import_torch, is_torch, read_torchscript

if TYPE_CHECKING:
    import keras
    import torch

ModelSource: TypeAlias = "keras.Model | torch.nn.Module | onnx.ModelProto | str | os.PathLike[str]"

__all__ = ["ImportOptions", "ImportedModel", "ModelSource", "import_model"]


def import_model(model: ModelSource, options: ImportOptions | None = None) -> ImportedModel:
    """Read a classifier into a graph.

    Parameters
    ----------
    model : keras.Model, torch.nn.Module, onnx.ModelProto, or path
        A path ends in .onnx, .keras, .h5 or .hdf5, names a SavedModel folder, or a TorchScript file (.pt).
    options : ImportOptions, optional
        For models that can be read in more than one way.

    Returns
    -------
    ImportedModel

    Raises
    ------
    ModelError
        When the model cannot be read or is not a classifier of one image input.
    MissingExtraError
        When the framework of a Keras model or torch module, or its converter, is not installed.
    """
    imported = _import(model, options or ImportOptions())
    _refuse_nan(imported.graph)
    return imported


def _import(model: ModelSource, options: ImportOptions) -> ImportedModel:
    if isinstance(model, str | os.PathLike):
        return _import_path(Path(model), options)
    for recognizes, read in _OBJECTS:
        if recognizes(model):
            return read(model, options)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    advice = next((advice for start, advice in _ADVICE_ON_OBJECTS.items() if kind.startswith(start)), _GENERAL_ADVICE)
    raise ModelError(f"cannot export a {kind}: {advice}")


def _is_message(model: object) -> bool:
    return isinstance(model, onnx.ModelProto)


# How an object is recognised, and imported. A recogniser imports no framework: the model's own is loaded already.
_OBJECTS: tuple[tuple[Callable[[Any], bool], Callable[[Any, ImportOptions], ImportedModel]], ...] = (
    (_is_message, import_onnx),
    (is_keras, import_keras),
    (is_torch, import_torch),
)
_GENERAL_ADVICE = "give a Keras model, a torch module, an onnx.ModelProto, or a path that ends in .keras, .h5 or .onnx"
_ADVICE_ON_OBJECTS = {
    "collections.OrderedDict": "a state dict holds weights only: build the module, call its load_state_dict, and give "
    "the module",
    "torch.export.exported_program": "give the module that it was exported from",
    "tf_keras.": "this is a model of Keras 2: save it as an .h5 file, and export that",
    "tensorflow.python.saved_model": "give the path of the SavedModel folder",
    "tensorflow.": "give the Keras model, or the path of a SavedModel folder",
    "keras.src.saving": "give the Keras model",
}


def _refuse_nan(graph: Graph) -> None:
    """Refuse NaN, which spoils every score; infinity may be meant, in the mask of an attention."""
    for name, array in graph.constants.items():
        # The sum is NaN if any number is, and needs no memory; it can also be NaN where infinities meet.
        with np.errstate(all="ignore"):
            suspect = array.dtype.kind == "f" and bool(np.isnan(array.sum()))
        count = int(np.isnan(array).sum()) if suspect else 0
        if count:
            raise ModelError(
                f"{count} of {array.size} numbers in {name!r} are NaN: training has diverged, or the file is damaged"
            )


def _import_path(path: Path, options: ImportOptions) -> ImportedModel:
    try:
        is_saved_model = (path / "saved_model.pb").is_file()
    except OSError as error:
        raise ModelError(f"{shown(str(path))}: {error.strerror}") from error
    if is_saved_model:
        return read_saved_model(path, options)
    suffix = path.suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None:
        advice = _ADVICE.get(suffix, f"known: {', '.join(_READERS)}, and SavedModel folders")
        raise ModelError(f"{path}: unknown model format {path.suffix!r}; {advice}")
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ModelError(f"{path}: the file is empty")
    return reader(path, options)


_READERS: dict[str, Callable[[Path, ImportOptions], ImportedModel]] = {
    ".onnx": read_onnx,
    ".keras": read_keras,
    ".h5": read_keras,
    ".hdf5": read_keras,
    **dict.fromkeys([".pt", ".pth", ".torchscript"], read_torchscript),
}

_ADVICE = {
    ".pb": "give the folder of the SavedModel; a frozen graph becomes an .onnx file with python -m tf2onnx.convert "
    "--graphdef",
    ".tflite": "convert it with python -m tf2onnx.convert --tflite model.tflite --output model.onnx, or give the Keras "
    "model it was made from",
    ".safetensors": "it holds only weights: build the module or the Keras model, load them, and pass it to export",
    ".ckpt": "it holds weights only: build the model, load them, and pass the model to export",
    ".ort": "give the .onnx file that it was made from",
    ".json": "give the Keras model; a TensorFlow.js model becomes a SavedModel with tensorflowjs_converter",
    ".mlmodel": "give the model that it was converted from",
    ".pkl": "a pickle is a program, which export does not run: load it yourself, and pass the model to export",
    ".bin": "it holds weights only: build the model, load them, and pass the model to export",
}
