"""Convert ONNX messages of any opset to one that runtimes and gradient rules know.

Only the nodes are converted. The weights stay where they are: a converter that copies them would need three times
their memory, and Protocol Buffers is limited to 2 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
from onnx import defs, external_data_helper, helper, inliner, shape_inference, version_converter

from ...errors import ModelError
from ...graph import Graph, attribute, operator
from .fused_ops import unfused
from .imported import MAXIMUM_OPSET, MINIMUM_OPSET, TARGET_OPSET
from .quarantine import QUARANTINE

# Between opset 20 and this one, the ops that changed only by accepting wider types are known (see `_lowered`).
_NEWEST_OPSET = 25

# Arguments that the converter reads (scales, axes, ratios) are not larger than this.
_ARGUMENT_SIZE = 64


def at_supported_opset(model: onnx.ModelProto, base_dir: str, outputs: Sequence[str]) -> onnx.ModelProto:
    """Return the model with its functions inlined and its nodes at an opset of `MINIMUM_OPSET` to `MAXIMUM_OPSET`.

    Parameters
    ----------
    model : onnx.ModelProto
        Not modified. It may be untrusted: ONNX's C++ code sees it in a separate process.
    base_dir : str
        Folder of the model's external data.
    outputs : sequence of str
        Values that the result must compute.

    Returns
    -------
    onnx.ModelProto
        Without the weights, which become inputs: `weights_of` returns them.

    Raises
    ------
    ModelError
        The opset is unknown, or a node cannot be converted.
    """
    message = _without_weights(model, base_dir, outputs).SerializeToString()
    result = onnx.ModelProto()
    result.ParseFromString(QUARANTINE("fastcam.exporting.importers.opsets:converted_bytes", message))
    return result


def converted_bytes(data: bytes) -> bytes:
    """Do what `converted` does for a serialised model, and check that shape inference survives the result.

    Raises
    ------
    ModelError
        The model cannot be converted.
    MemoryError
        It, or shape inference, needs more memory than is allowed here.
    """
    model = onnx.ModelProto()
    model.ParseFromString(data)
    result = converted(model)
    try:
        shape_inference.infer_shapes(result, data_prop=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001, S110  # a rejection is repeated, and worded, where the result is read
        pass
    answer: bytes = result.SerializeToString()
    return answer


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with its functions inlined and its nodes at a supported opset; raises ModelError."""
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    try:
        if model.functions:
            _refuse_explosion(model)
            model = inliner.inline_local_functions(shape_inference.infer_shapes(model), convert_version=True)
        if opset < MINIMUM_OPSET:
            return version_converter.convert_version(model, TARGET_OPSET)
        return _lowered(model, opset) if opset > MAXIMUM_OPSET else model
    except MemoryError:
        raise
    except Exception as error:  # the C++ converter throws RuntimeError subclasses of its own
        raise ModelError(
            f"the model uses ONNX opset {opset} and cannot be brought to opset {TARGET_OPSET}: {error}. "
            f"Export it again with an opset between {MINIMUM_OPSET} and {MAXIMUM_OPSET}."
        ) from error


# A hundred times the nodes of the largest networks.
_LARGEST_EXPANSION = 500_000


def _refuse_explosion(model: onnx.ModelProto) -> None:
    """Raise ModelError if nested functions would fill the memory with nodes."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], above: frozenset[tuple[str, str]]) -> int:
        if key in above or len(above) > _DEEPEST_CALLS:
            raise ModelError(f"function {key[1]!r} calls itself, or is nested too deeply to follow")
        if key not in sizes:
            calls = ((node.domain, node.op_type) for node in functions[key].node)
            sizes[key] = sum(size(call, above | {key}) if call in functions else 1 for call in calls)
        return sizes[key]

    for node in model.graph.node:
        key = (node.domain, node.op_type)
        if key in functions and size(key, frozenset()) > _LARGEST_EXPANSION:
            raise ModelError(f"function {key[1]!r} (node {node.name!r}) expands to {sizes[key]} nodes")


_DEEPEST_CALLS = 100


def weights_of(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield the name and the data of every initializer and of every large Constant node."""
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    yield from ((node.output[0], _constant(node)) for node in model.graph.node if _is_weight(node))


def _is_weight(node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and [item.name for item in node.attribute] == ["value"]
        and len(node.output) == 1
        and not _is_argument(_constant(node))
    )


def _constant(node: onnx.NodeProto) -> onnx.TensorProto:
    tensor: onnx.TensorProto = node.attribute[0].t
    return tensor


def _is_argument(tensor: onnx.TensorProto) -> bool:
    return bool(math.prod(tensor.dims) <= _ARGUMENT_SIZE)


def _without_weights(model: onnx.ModelProto, base_dir: str, outputs: Sequence[str]) -> onnx.ModelProto:
    """Return a copy in which the weights are inputs."""
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    source, graph = model.graph, copy.graph
    graph.name = source.name or "model"
    nodes = [own for node in source.node for own in unfused(node)]
    graph.node.extend(_inlined(node, base_dir) for node in _needed(nodes, outputs) if not _is_weight(node))
    known = {info.name: info for info in source.output}
    # The converter needs a type; the shape is inferred again.
    unknown = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs if name not in known
    )
    graph.output.extend([*(known[name] for name in outputs if name in known), *unknown])
    graph.value_info.extend(source.value_info)
    graph.sparse_initializer.extend(source.sparse_initializer)
    weights = dict(weights_of(model))
    graph.initializer.extend(_with_data(filter(_is_argument, source.initializer), base_dir))
    graph.input.extend(info for info in source.input if info.name not in weights)
    # The small ones too: the inliner takes types from here, and the converter requires it in old files.
    graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)) for name, tensor in weights.items()
    )
    return copy


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs need, in the original order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    # In a file that is not sorted topologically, later nodes may be needed too.
    return kept[::-1] if _is_ordered(kept[::-1], nodes) else list(nodes)


def _is_ordered(kept: Sequence[onnx.NodeProto], nodes: Sequence[onnx.NodeProto]) -> bool:
    made = {name for node in kept for name in node.output}
    anywhere = {name for node in nodes for name in node.output}
    return all(name in made for node in kept for name in node.input if name in anywhere)


def _inlined(node: onnx.NodeProto, base_dir: str) -> onnx.NodeProto:
    """Return a Constant node with external data as one that holds them."""
    if not any(external_data_helper.uses_external_data(item.t) for item in node.attribute):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for item in copy.attribute:
        if external_data_helper.uses_external_data(item.t):
            (tensor,) = _with_data([item.t], base_dir)
            item.t.CopyFrom(tensor)
    return copy


def _with_data(tensors: Iterable[onnx.TensorProto], base_dir: str) -> list[onnx.TensorProto]:
    copies = []
    for tensor in tensors:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        if external_data_helper.uses_external_data(copy):
            try:
                external_data_helper.load_external_data_for_tensor(copy, base_dir)
            except Exception as error:  # the file system, and onnx's checks of paths and sizes
                raise ModelError(f"the model's weights cannot be read: {error}") from error
        copies.append(copy)
    return copies


def _lowered(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Relabel a newer opset with an older number.

    From opset 21 to 25 the ops took further element types, and attributes that older nodes cannot hold. A node that is
    valid at opset 20 means the same there, except GroupNormalization, which `expand_group_normalization` has replaced.
    Newer ops are expanded by the functions that define them.
    """
    if opset > _NEWEST_OPSET:
        raise ModelError(f"opset {opset} is newer than this version of fastcam, which knows {_NEWEST_OPSET}")
    newer = sorted({node.op_type for node in model.graph.node if _is_newer(node, opset)})
    if newer:
        # Function definitions depend on the types of their inputs.
        typed = shape_inference.infer_shapes(model, data_prop=True)
        model = inliner.inline_selected_functions(typed, [("", op) for op in newer], inline_schema_functions=True)
        del model.graph.value_info[:]
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = MAXIMUM_OPSET
    return model


def _is_newer(node: onnx.NodeProto, opset: int) -> bool:
    return operator(node) == node.op_type and defs.has(node.op_type) and not _exists(node.op_type, MAXIMUM_OPSET)


def _exists(op: str, opset: int) -> bool:
    try:
        return bool(defs.get_schema(op, opset))
    except defs.SchemaError:
        return False


def expand_group_normalization(graph: Graph, opset: int) -> None:
    """Expand GroupNormalization into older ops (Wu and He 2018, eq. 1, 2 and 6).

    Opset 18 defined it with one scale per group, which ONNX later withdrew; opset 21 with one scale per channel.

    Parameters
    ----------
    graph : Graph
        Changed in place.
    opset : int
        The model's original opset.
    """
    for node in [node for node in graph.nodes if operator(node) == "GroupNormalization"]:
        graph.replace(node, *_group_normalization(graph, node, opset))
    graph.infer_types()


def _group_normalization(graph: Graph, node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto]:
    """Normalise (N,groups,rest) per instance, each instance being one group."""
    x, scale, bias = node.input
    groups, y = attribute(node, "num_groups"), node.output[0]
    by_channel = opset >= 21
    shape, grouped, normalized, restored, scaled = (
        graph.unused_name(f"{y}/{part}") for part in ("shape", "grouped", "normalized", "restored", "scaled")
    )
    rows = graph.emit_constant(np.array([0, groups, -1], np.int64), stem="shape")
    weights = [scale, bias]
    if by_channel:
        dtype = graph.type(x).dtype
        weights = [graph.emit_constant(fill(groups, dtype)) for fill in (np.ones, np.zeros)]
    epsilon = attribute(node, "epsilon", 1e-5)
    nodes = [
        helper.make_node("Shape", [x], [shape], name=shape),
        helper.make_node("Reshape", [x, rows], [grouped], name=grouped),
        helper.make_node("InstanceNormalization", [grouped, *weights], [normalized], name=normalized, epsilon=epsilon),
        helper.make_node("Reshape", [normalized, shape], [restored if by_channel else y], name=restored),
    ]
    if by_channel:
        wide = graph.emit_constant(np.array([-1, *[1] * (len(graph.shape(x)) - 2)], np.int64), stem="shape")
        columns = [graph.unused_name(f"{y}/{part}") for part in ("scale", "bias")]
        nodes += [
            helper.make_node("Reshape", [name, wide], [column], name=column)
            for name, column in zip((scale, bias), columns, strict=True)
        ]
        nodes += [
            helper.make_node("Mul", [restored, columns[0]], [scaled], name=scaled),
            helper.make_node("Add", [scaled, columns[1]], [y], name=node.name),
        ]
    return nodes
