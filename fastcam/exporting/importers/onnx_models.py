"""Import ONNX files and messages from any exporter into a `Graph`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import defs, external_data_helper, numpy_helper

from ...errors import ModelError
from ...graph import Graph, from_model, operator
from ...labels import stored_names
from ...preprocessing import Guess, Preprocessing
from .decisions import Scores, find_scores
from .fused_ops import fused_op_reason
from .imported import ImportedModel, ImportOptions, settle_signature
from .opsets import at_supported_opset, expand_group_normalization, weights_of
from .precision import narrowed, widened

_LARGEST_SIZE = 2**31
# Limits: elements of a batch as declared; number of nodes and weights.
_LARGEST_INPUT, _LARGEST_COUNT = 2**28, 500_000
# Elements of a value inside the network: 16 GB of float32.
_LARGEST_VALUE = 2**32
# What a window or a border of an image may be.
_LIMITS = dict.fromkeys(["pads", "kernel_shape", "strides", "dilations", "output_padding", "num_outputs"], 2**16)
# The end of a Slice may be any sufficiently large number.
_OPEN_ENDED = ("starts", "ends")


def read_onnx(path: Path, options: ImportOptions) -> ImportedModel:
    """Import an .onnx file; raises ModelError."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's parser has its own exception classes, by version
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: {error}") from error
    return import_onnx(model, options, base_dir=str(path.parent))


def import_onnx(model: onnx.ModelProto, options: ImportOptions, base_dir: str | None = None) -> ImportedModel:
    """Import a message; raises ModelError.

    Parameters
    ----------
    model : onnx.ModelProto
    options : ImportOptions
    base_dir : str, optional
        Folder of its external data; None if the message did not come from a file.
    """
    _refuse_impossible_sizes(model)
    _refuse_stray_files(model, base_dir)
    folder = base_dir or "."
    scores = _score_outputs(model, options)
    if scores.note is not None:
        options = replace(options, output=None)
    source_opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    graph = from_model(at_supported_opset(model, folder, scores.outputs), folder, weights_of(model))
    _refuse_impossible_values(graph)
    expand_group_normalization(graph, source_opset)
    _refuse_integer_arithmetic(graph)
    _refuse_unknown_ops(graph)
    notes = widened(graph) + narrowed(graph) + settle_signature(graph, options)
    notes += [scores.note] if scores.note else []
    properties = {entry.key: entry.value for entry in model.metadata_props}
    classes = scores.classes or stored_names(properties)
    return ImportedModel(graph, "onnx", classes=classes, notes=notes, guess=_guessed_preprocessing(properties))


def _guessed_preprocessing(properties: Mapping[str, str]) -> Guess | None:
    """Return what the models of Ultralytics expect, which say so in their metadata."""
    if properties.get("author") != "Ultralytics" or "imgsz" not in properties:
        return None
    return Guess(Preprocessing.of("scale"), "its metadata are those of Ultralytics, whose models take RGB of 0..1")


def _refuse_impossible_sizes(model: onnx.ModelProto) -> None:
    """Reject sizes with which ONNX's C++ code would overflow, aborting the process, or exhaust the memory."""
    graph = model.graph
    parts = len(graph.node) + len(graph.initializer)
    if parts > _LARGEST_COUNT:
        raise ModelError(f"the model has {parts} nodes and weights, more than {_LARGEST_COUNT}")
    for info in (*graph.input, *graph.output, *graph.value_info):
        if any(dim.dim_value > _LARGEST_SIZE for dim in info.type.tensor_type.shape.dim):
            raise ModelError(f"value {info.name!r} claims an axis of more than {_LARGEST_SIZE} elements")
    for info in graph.input:
        pixels = math.prod(max(dim.dim_value, 1) for dim in info.type.tensor_type.shape.dim)
        if pixels > _LARGEST_INPUT and info.name not in {tensor.name for tensor in graph.initializer}:
            raise ModelError(f"input {info.name!r} claims {pixels} elements, more than {_LARGEST_INPUT}")
    padding = {node.input[1] for node in graph.node if node.op_type == "Pad" and len(node.input) > 1}
    for tensor in graph.initializer:
        if tensor.name in padding and not external_data_helper.uses_external_data(tensor):
            _refuse_size("Pad", tensor.name, "pads", numpy_helper.to_array(tensor).reshape(-1).tolist())
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        for item in node.attribute:
            _refuse_size(node.op_type, node.name, item.name, [item.i, *item.ints])


def _refuse_impossible_values(graph: Graph) -> None:
    """Raise ModelError for a value that no memory holds, even for a single image."""
    for name, type_ in graph.types.items():
        count = math.prod(size for size in type_.shape if isinstance(size, int))
        if count > _LARGEST_VALUE:
            raise ModelError(f"value {name!r} claims {count} elements, more than {_LARGEST_VALUE}")


def _refuse_size(op: str, name: str, attribute: str, numbers: list[int]) -> None:
    limit = _LIMITS.get(attribute, _LARGEST_SIZE)
    largest = max(map(abs, numbers), default=0)
    if largest > limit and attribute not in _OPEN_ENDED:
        raise ModelError(f"node {name!r} ({op}) has the impossible {attribute} {largest}")


def _refuse_stray_files(model: onnx.ModelProto, base_dir: str | None) -> None:
    """Raise ModelError if the data are in files that are not next to the model."""
    initializers = list(model.graph.initializer)
    attributes = [item.t for node in model.graph.node for item in node.attribute if item.HasField("t")]
    outside = [tensor for tensor in (*initializers, *attributes) if external_data_helper.uses_external_data(tensor)]
    if outside and base_dir is None:
        raise ModelError(
            f"the data of {outside[0].name!r} are in a file, and a message does not say where: pass export the path of "
            "the .onnx file, or load it with its data, onnx.load(path)"
        )
    inner = (item.t for function in model.functions for node in function.node for item in node.attribute)
    if any(external_data_helper.uses_external_data(tensor) for tensor in inner):
        raise ModelError("a function of the model reads a file: export the model again without external data in it")


def _score_outputs(model: onnx.ModelProto, options: ImportOptions) -> Scores:
    """Return the values that may be the scores; callers may ask for any value of the model."""
    names, wanted = [info.name for info in model.graph.output], options.output
    if wanted is None and options.all_outputs:
        return Scores(names, None, None)
    if wanted is not None and wanted not in names and any(wanted in node.output for node in model.graph.node):
        return Scores([wanted], None, None)
    constants = [tensor.name for tensor in model.graph.initializer]
    return find_scores(model.graph.node, constants, [name for name in names if name == wanted] or names)


def _refuse_unknown_ops(graph: Graph) -> None:
    """Name the op that stops shape inference before the scores, if it is not an ONNX op."""
    if graph.rank(graph.outputs[0]) is not None:
        return
    node = next((node for node in graph.nodes if "::" in operator(node) or not defs.has(node.op_type)), None)
    if node is not None:
        raise ModelError(
            f"op {node.op_type!r} of domain {node.domain or 'ai.onnx'!r} (node {node.name or node.output[0]!r}) is "
            f"unknown: {fused_op_reason(node)}"
        )


def _refuse_integer_arithmetic(graph: Graph) -> None:
    node = next((node for node in graph.nodes if _computes_in_integers(node)), None)
    if node is not None:
        raise ModelError(
            f"op {node.op_type!r} (node {node.name or node.output[0]!r}) computes in integers, which have no gradient: "
            "quantise the model in QDQ format, with QuantizeLinear and DequantizeLinear around float ops, or give the "
            "float model"
        )


def _computes_in_integers(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("QLinear") or node.op_type in (
        "ConvInteger",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QGemm",
    )
