"""ONNX files and messages, of any exporter, into a `Graph`."""

from __future__ import annotations

from pathlib import Path

import onnx

from ..errors import ModelError
from ..graph import from_model
from .imported import (
    MAXIMUM_OPSET,
    MINIMUM_OPSET,
    TARGET_OPSET,
    ImportedModel,
    ImportOptions,
    check_one_input_one_output,
    open_batch,
)


def read_onnx(path: Path, options: ImportOptions) -> ImportedModel:
    """Import an .onnx file; raises ModelError."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's parser has its own exception classes, by version
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: {error}") from error
    return import_onnx(model, options, base_dir=str(path.parent))


def import_onnx(model: onnx.ModelProto, options: ImportOptions, base_dir: str = "") -> ImportedModel:
    """Import a message whose external data lies in ``base_dir``; raises ModelError."""
    graph = from_model(_at_supported_opset(model, base_dir), base_dir)
    check_one_input_one_output(graph)
    open_batch(graph)
    return ImportedModel(graph, framework="onnx")


def _at_supported_opset(model: onnx.ModelProto, base_dir: str) -> onnx.ModelProto:
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if MINIMUM_OPSET <= opset <= MAXIMUM_OPSET:
        return model
    try:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        onnx.load_external_data_for_model(whole, base_dir)
        return onnx.version_converter.convert_version(whole, TARGET_OPSET)
    except Exception as error:  # the C++ converter throws RuntimeError subclasses of its own
        raise ModelError(
            f"the model uses ONNX opset {opset} and cannot be brought to opset {TARGET_OPSET}: {error}. "
            f"Export it anew with an opset between {MINIMUM_OPSET} and {MAXIMUM_OPSET}."
        ) from error
