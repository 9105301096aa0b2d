"""ONNX files and messages, of any exporter, into a `Graph`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from ...errors import ModelError
from ...graph import Graph, from_model
from ...labels import stored_names
from .decisions import find_scores, with_outputs
from .imported import ImportedModel, ImportOptions, settle_signature
from .opsets import at_supported_opset, expand_group_normalization, weights_of
from .precision import widened

_LARGEST_SIZE = 2**31
# The end of a Slice may be any number that is large enough.
_OPEN_ENDED = ("starts", "ends")


def read_onnx(path: Path, options: ImportOptions) -> ImportedModel:
    """Import an .onnx file; raises ModelError."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's parser has its own exception classes, by version
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: {error}") from error
    return import_onnx(model, options, base_dir=str(path.parent))


def import_onnx(model: onnx.ModelProto, options: ImportOptions, base_dir: str = "") -> ImportedModel:
    """Import a message whose external data lies in ``base_dir``; raises ModelError."""
    _refuse_impossible_sizes(model)
    names = tuple(info.name for info in model.graph.output)
    chosen = (options.output,) if options.output in names else names
    scores = find_scores(model.graph.node, [tensor.name for tensor in model.graph.initializer], chosen)
    if scores.note is not None:
        model = with_outputs(model, scores.outputs)
        options = replace(options, output=None if options.output in names else options.output)
    source_opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    graph = from_model(at_supported_opset(model, base_dir), base_dir, weights_of(model))
    expand_group_normalization(graph, source_opset)
    _refuse_integer_arithmetic(graph)
    notes = widened(graph)
    settle_signature(graph, options)
    classes = scores.classes or stored_names({entry.key: entry.value for entry in model.metadata_props})
    return ImportedModel(graph, "onnx", classes=classes, notes=[*notes, *([scores.note] if scores.note else [])])


def _refuse_impossible_sizes(model: onnx.ModelProto) -> None:
    """Keep ONNX's C++ from computing with sizes beyond 2**31: it overflows, and then aborts the process."""
    graph = model.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        if any(dim.dim_value > _LARGEST_SIZE for dim in info.type.tensor_type.shape.dim):
            raise ModelError(f"value {info.name!r} claims an axis of more than {_LARGEST_SIZE} elements")
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        for item in node.attribute:
            numbers = [item.i, *item.ints]
            if item.name not in _OPEN_ENDED and any(abs(number) > _LARGEST_SIZE for number in numbers):
                raise ModelError(f"node {node.name!r} ({node.op_type}) has the impossible {item.name} {numbers[-1]}")


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
