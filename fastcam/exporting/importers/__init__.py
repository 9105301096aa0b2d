"""From a framework's model to a clean `Graph` of its forward pass: one module per framework, one table to choose.

In: a Keras model, a torch module, an ONNX model or the path of one. Out: an `ImportedModel`. Imports the ground; each
framework is imported when a model of its kind arrives.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx

from ...errors import ModelError
from ...graph import Graph
from .imported import ImportedModel, ImportOptions
from .keras_models import import_keras, is_keras, read_keras
from .onnx_models import import_onnx, read_onnx
from .torch_modules import import_torch, is_torch

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
        A path ends in .onnx, .keras or .h5.
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
    if isinstance(model, onnx.ModelProto):
        return import_onnx(model, options)
    if is_keras(model):
        return import_keras(model, options)
    if is_torch(model):
        return import_torch(model, options)
    raise ModelError(
        f"cannot export a {type(model).__module__}.{type(model).__qualname__}: "
        "give a Keras model, a torch module, an onnx.ModelProto, or a path that ends in .keras, .h5 or .onnx"
    )


def _refuse_nan(graph: Graph) -> None:
    """Infinity may be meant, in the mask of an attention; what is no number spoils every score."""
    for name, array in graph.constants.items():
        # The sum is NaN where a number is, and takes no memory; it may also be where infinities meet.
        with np.errstate(all="ignore"):
            suspect = array.dtype.kind == "f" and bool(np.isnan(array.sum()))
        count = int(np.isnan(array).sum()) if suspect else 0
        if count:
            raise ModelError(
                f"{count} of {array.size} numbers in {name!r} are NaN: training has diverged, or the file is damaged"
            )


def _import_path(path: Path, options: ImportOptions) -> ImportedModel:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ModelError(f"{path}: unknown model format {path.suffix!r}; known: {', '.join(_READERS)}")
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ModelError(f"{path}: the file is empty")
    return reader(path, options)


_READERS: dict[str, Callable[[Path, ImportOptions], ImportedModel]] = {
    ".onnx": read_onnx,
    ".keras": read_keras,
    ".h5": read_keras,
}
