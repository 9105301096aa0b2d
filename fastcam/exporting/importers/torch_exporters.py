"""torch's two ONNX exporters, from a module to a `Graph` whose values know which modules computed them.

The tracing exporter (TorchScript) takes a fifth of the time of the one that captures programs (torch.export), and
writes ONNX ops rather than their decompositions. It warns about what it may silently get wrong, such as branches
that depend on numbers; such modules are captured instead.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from ...arrays import Array
from ...errors import MissingExtraError, ModelError
from ...graph import Graph, TensorType, from_model
from .imported import TARGET_OPSET
from .opsets import converted
from .torch_tracing import plain_sizes, restored_attributes

_INPUT = "images"
# Where torch's exporter records the modules around a node: the model itself, its children ..., the call.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Shape arithmetic reads constants of this size; larger ones are weights.
_ARGUMENT_SIZE = 64


@dataclass
class Traced:
    """A traced module.

    Attributes
    ----------
    graph : Graph
    scopes : dict of str to list of str
        The paths of the modules around each node, by the node's outputs.
    """

    graph: Graph
    scopes: dict[str, list[str]]


class CannotTraceError(Exception):
    """An exporter rejects a module, or cannot be trusted with it.

    Attributes
    ----------
    by_values : bool
        Whether the module's computation depends on the values of the images.
    """

    def __init__(self, reason: str, *, by_values: bool = False) -> None:
        super().__init__(reason)
        self.by_values = by_values


def trace(torch: Any, module: Any, example: Any, names: Sequence[str] | None, *, strict: bool = True) -> Traced:
    """Export a module with the tracing exporter.

    Parameters
    ----------
    torch : module
    module : torch.nn.Module
    example : torch.Tensor
        Two images.
    names : sequence of str, optional
        Of the outputs.
    strict : bool
        Whether to reject a module that the tracer warns about.

    Raises
    ------
    CannotTraceError
    """
    paths = {path for path, _ in module.named_modules()}
    if any(re.sub(r"_\d+$", "", path) in paths - {path} for path in paths):
        raise CannotTraceError("names of modules that the tracer could take for repeated calls")
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(record=True) as remarks, plain_sizes(torch), restored_attributes(module):
            warnings.simplefilter("always")
            torch.onnx.export(
                module,
                (example,),
                file,
                dynamo=False,
                export_params=False,
                # Layers' values would be folded into others.
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                opset_version=TARGET_OPSET,
                input_names=[_INPUT],
                output_names=names,
                dynamic_axes={_INPUT: {0: "batch"}},
            )
    except Exception as error:  # each of its layers raises its own
        raise CannotTraceError(last_lines(error)) from error
    doubts = [remark for remark in remarks if remark.category.__name__ == "TracerWarning"]
    if doubts and strict:
        raise CannotTraceError(str(doubts[0].message), by_values=True)
    model = onnx.load_from_string(file.getvalue())
    weights = {name: _array(tensor) for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    weights = {info.name: weights[info.name] for info in model.graph.input if info.name in weights}
    # The tracer keeps one of several equal weights.
    copies = [node for node in model.graph.node if node.op_type == "Identity" and node.input[0] in weights]
    for node in copies:
        model.graph.node.remove(node)
        array = weights[node.input[0]]
        weights[node.output[0]] = array
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], kind, array.shape))
    scopes = {output: _split_scopes(node.name, paths) for node in model.graph.node for output in node.output}
    try:
        graph = _with_weights(model, weights)
    except ModelError as error:  # control flow, for example, of which the other exporter leaves none
        raise CannotTraceError(str(error)) from error
    outputs = [output for node in graph.nodes for output in node.output]
    if any(output not in graph.types or _is_open(graph.types[output]) for output in outputs):
        raise CannotTraceError("sizes of layers that are computed at inference")
    return Traced(graph, scopes)


def _is_open(type_: TensorType) -> bool:
    """Return whether a floating-point value has an unknown size after its batch axis."""
    return type_.dtype.kind == "f" and not all(isinstance(size, int) for size in type_.shape[1:])


def _split_scopes(name: str, paths: set[str]) -> list[str]:
    """Return the paths in a node's name, "/layer1/layer1.0/conv1_1/Conv".

    A part is a child's name, prefixed with the container's for a container's child; a second call is numbered.
    """
    path, label, scopes = "", "", [""]
    for part in name.split("/")[1:-1]:
        plain = re.sub(r"_\d+$", "", part)
        candidates = [
            candidate
            for own in (part, plain)
            for candidate in (
                f"{path}{own[len(label) :]}" if label and own.startswith(f"{label}.") else "",
                f"{path}.{own}" if path else own,
            )
            if candidate and candidate in paths
        ]
        if not candidates:
            break
        path = candidates[0]
        label = part if path.endswith(part) else plain
        scopes.append(path)
    return scopes


def capture(torch: Any, module: Any, example: Any, names: Sequence[str] | None) -> Traced:
    """Export a module with the program-capturing exporter.

    Raises
    ------
    CannotTraceError
    MissingExtraError
        onnxscript is not installed.
    """
    try:
        # torch's exporter needs it, but says so late.
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise MissingExtraError(
            f'exporting this torch module needs onnxscript ({error}): pip install "fastcam[torch]"'
        ) from error
    try:
        with restored_attributes(module):
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.AUTO},),
                output_names=names,
                opset_version=TARGET_OPSET,
                # Layers' values would be folded into others.
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # torch's tracer, its exporter and onnxscript raise their own
        cause = _innermost(error)
        by_values = "DataDependent" in type(cause).__name__ or "data-dependent" in str(cause).lower()
        raise CannotTraceError(last_lines(cause), by_values=by_values) from error
    from onnx_ir import serde

    model = program.model
    weights = {}
    for name, value in list(model.graph.initializers.items()):
        array = value.const_value.numpy()
        if array.size > _ARGUMENT_SIZE:
            weights[name] = array
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
    scopes = {
        output.name: [str(scope) for scope in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]]
        for node in model.graph
        for output in node.outputs
    }
    return Traced(_with_weights(serde.serialize_model(model), weights), scopes)


def _with_weights(model: onnx.ModelProto, weights: dict[str, Array]) -> Graph:
    """Turn an exporter's message into a graph; the weights, which are inputs of the message, become constants."""
    graph = from_model(converted(model))
    for name in weights:
        del graph.inputs[name]
    graph.constants |= weights
    return graph


def _array(tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    array: Array = tensor.numpy()
    return array


def _innermost(error: BaseException) -> BaseException:
    """Return the innermost of the errors that the exporters wrap around each other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def last_lines(error: BaseException) -> str:
    """Return the end of an error's message, where torch puts the reason, on one line and without colours."""
    lines = [line.strip() for line in _ESCAPES.sub("", str(_innermost(error))).splitlines() if line.strip()]
    # The rest is about the tracer's own options and the location in the user's code.
    stops = [index for index, line in enumerate(lines) if line.startswith(_REMARKS)]
    lines = lines[: stops[0]] if stops and stops[0] else lines
    text = " ".join(lines[-3:])
    return f"{type(_innermost(error)).__name__}: {text[-400:] or 'no reason given'}"


_REMARKS = ("For more information", "To fix", "The following call", "Set TORCH", "The error above", "Developer debug")


def unsupported(kind: str, reason: str) -> ModelError:
    """Return the error for a module that no exporter accepts."""
    return ModelError(
        f"torch cannot export {kind} to ONNX ({reason}): change the op that the reason names, or what depends on the "
        "values of the image, or pass an .onnx file"
    )
