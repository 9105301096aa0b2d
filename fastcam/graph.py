"""A model as a graph that can be asked and extended.

Read side: producers, consumers, attributes, constants, shapes. Write side: `Graph.emit` appends nodes.

The weights live beside the nodes as NumPy arrays, outside any protobuf message: a VGG16 is passed around,
shape-inferred and rewritten as a few kilobytes of nodes, and its 537 MB are neither copied nor serialised until the
file is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, shape_inference

from .errors import ModelError, UnsupportedOpError

Array = npt.NDArray[Any]
Dim = int | str | None

# Shape arithmetic (Reshape, Slice, Pad ...) reads small constants; inference needs their values, and only theirs.
_INFERENCE_CONSTANT_SIZE = 64

# Ops that the checker refuses, and importers replace.
_WITHDRAWN = ("GroupNormalization",)

_DEFAULT_DOMAINS = ("", "ai.onnx")


class TensorType(NamedTuple):
    """Element type and shape of a value; a dimension is a number, a symbol, or None when nothing is known."""

    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]


@dataclass
class Graph:
    """Nodes in topological order, with their constants and the types of their values.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
    constants : dict of str to ndarray
        The weights, by value name. Arrays are shared, never modified in place.
    inputs : dict of str to TensorType
    outputs : list of str
    opset : int
        Version of the default ONNX operator set.
    types : dict of str to TensorType
        What shape inference knows, by value name; `infer_types` refreshes it.
    defaults : dict of str to ndarray
        Values of the inputs that a caller may leave out.
    domains : dict of str to int
        Versions of further operator sets.
    maps : dict of str to tuple of int
        Height, width and channels of the values that are known to be maps, whatever the order of their axes.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, Array]
    inputs: dict[str, TensorType]
    outputs: list[str]
    opset: int
    types: dict[str, TensorType] = field(default_factory=dict)
    defaults: dict[str, Array] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=dict)
    maps: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    # Names ever seen, while the number of nodes is this; and the small constants by value.
    _seen: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _seen_nodes: int = field(default=-1, init=False, repr=False, compare=False)
    _small: dict[tuple[str, tuple[int, ...], bytes], str] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def producer(self, value: str) -> onnx.NodeProto | None:
        """Return the node that makes ``value``; None for inputs and constants."""
        return self.producers().get(value)

    def producers(self) -> dict[str, onnx.NodeProto]:
        """Return the node behind every computed value."""
        return {output: node for node in self.nodes for output in node.output if output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Return the nodes that read each value, in topological order; a node that reads it twice is listed once."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                if name:
                    readers.setdefault(name, []).append(node)
        return readers

    def type(self, value: str) -> TensorType:
        """Return the type of ``value``.

        Raises
        ------
        ModelError
            When shape inference could not tell.
        """
        if value in self.constants:
            array = self.constants[value]
            return TensorType(array.dtype, array.shape)
        known = self.types.get(value) or self.inputs.get(value)
        if known is None:
            raise ModelError(
                f"the shape of value {value!r} is unknown: shape inference stopped before it. "
                "Give the model's input a fixed height and width, then export again."
            )
        return known

    def shape(self, value: str) -> tuple[Dim, ...]:
        """Return the shape of ``value``; raises ModelError as `type` does."""
        return self.type(value).shape

    def rank(self, value: str) -> int | None:
        """Return the number of dimensions of ``value``, None where inference could not tell."""
        if value in self.constants:
            return self.constants[value].ndim
        known = self.types.get(value) or self.inputs.get(value)
        return None if known is None else len(known.shape)

    def unused_name(self, stem: str) -> str:
        """Return ``stem``, or ``stem`` with the first number that makes it a new value name."""
        if len(self.nodes) != self._seen_nodes:
            self._seen.update(name for node in self.nodes for name in (*node.input, *node.output))
            self._seen_nodes = len(self.nodes)
        name, number = stem, 1
        while name in self._seen or name in self.constants or name in self.inputs:
            name, number = f"{stem}_{number}", number + 1
        self._seen.add(name)
        return name

    def rename(self, old: str, new: str) -> None:
        """Give the value ``old`` the name ``new`` everywhere."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
        for mapping in (self.constants, self.inputs, self.types, self.defaults, self.maps):
            _rename_key(mapping, old, new)
        self._seen.add(new)
        self.outputs = [new if name == old else name for name in self.outputs]

    def replace_uses(self, old: str, new: str) -> None:
        """Let every reader of ``old``, the graph's outputs included, read ``new`` instead."""
        for node in self.nodes:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        self.outputs = [new if name == old else name for name in self.outputs]

    def prune(self) -> None:
        """Drop what the outputs do not need, and bring the nodes into an order that depends on the outputs alone."""
        self.nodes = needed_nodes(self, self.outputs)
        used = {name for node in self.nodes for name in node.input} | set(self.outputs)
        self.constants = {name: array for name, array in self.constants.items() if name in used}
        made = {name for node in self.nodes for name in node.output}
        self.types = {name: type_ for name, type_ in self.types.items() if name in made}

    def check(self) -> None:
        """Raise ModelError where a node breaks ONNX's rules for its op, or reads a value that nothing makes."""
        context = onnx.checker.C.CheckerContext()
        context.ir_version = onnx.IR_VERSION
        context.opset_imports = {"": self.opset, **self.domains}
        known = {*self.inputs, *self.constants, *(name for node in self.nodes for name in node.output)}
        for node in self.nodes:
            if operator(node) in _WITHDRAWN:
                continue
            try:
                onnx.checker.check_node(node, context)
            except onnx.checker.ValidationError as error:
                raise ModelError(f"node {node.name!r} ({node.op_type}) is not valid ONNX: {error}") from error
            missing = [name for name in node.input if name and name not in known]
            if missing:
                raise ModelError(f"node {node.name!r} ({node.op_type}) reads {missing}, which nothing makes")
        if not known.issuperset(self.outputs):
            raise ModelError(f"nothing makes the outputs {sorted(set(self.outputs) - known)}")

    def infer_types(self) -> None:
        """Refresh `types` by ONNX shape inference, without handing it the weights."""
        try:
            model = shape_inference.infer_shapes(self._without_weights(), data_prop=True)
        except Exception as error:  # the C++ checker throws several unrelated types
            raise ModelError(f"shape inference refused the model: {error}") from error
        # An output declared without a shape leaves inference with a second, empty entry: the informed one counts.
        self.types = {info.name: _type_of(info) for info in model.graph.output if _has_shape(info)}
        self.types |= {info.name: _type_of(info) for info in model.graph.value_info if _has_shape(info)}

    def _without_weights(self) -> onnx.ModelProto:
        """Return the graph as a message in which the large constants are inputs."""
        known = {name: array for name, array in self.constants.items() if _steers_shapes(array)}
        assumed = {
            name: TensorType(array.dtype, array.shape) for name, array in self.constants.items() if name not in known
        }
        view = dataclasses.replace(self, nodes=[], constants=known, inputs={**self.inputs, **assumed})
        for node in self.nodes:
            view.nodes.extend(_inferable(view, node))
        return view.to_model()

    def to_model(self, *, metadata: Mapping[str, str] | None = None, name: str = "fastcam") -> onnx.ModelProto:
        """Return the graph as a message that holds its weights (a copy of them)."""
        model = self.skeleton(metadata=metadata, name=name)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(array, order="C"), key)
            for key, array in {**self.constants, **self.defaults}.items()
        )
        return model

    def skeleton(self, *, metadata: Mapping[str, str] | None = None, name: str = "fastcam") -> onnx.ModelProto:
        """Return the graph as a message without its weights."""
        proto = helper.make_graph(
            self.nodes,
            name,
            [_value_info(key, type_) for key, type_ in self.inputs.items()],
            [self._output_info(key) for key in self.outputs],
        )
        model = helper.make_model(
            proto,
            opset_imports=[helper.make_opsetid(domain, n) for domain, n in {"": self.opset, **self.domains}.items()],
            producer_name="fastcam",
            ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)]),
        )
        helper.set_model_props(model, dict(metadata or {}))
        return model

    def _output_info(self, name: str) -> onnx.ValueInfoProto:
        known = self.types.get(name) or self.inputs.get(name)
        if known is None:
            return onnx.ValueInfoProto(name=name)
        # Names that inference gave are no declaration: the next one may know more.
        shape = tuple(None if str(size).startswith("unk__") else size for size in known.shape)
        return _value_info(name, TensorType(known.dtype, shape))

    def emit(self, op: str, *inputs: str, stem: str = "", **attributes: Any) -> str:
        """Append a node of one output and return the name of the value it makes."""
        output = self.unused_name(stem or f"{op}_out")
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        self._seen_nodes += 1
        return output

    def emit_constant(self, array: npt.ArrayLike, *, stem: str = "constant") -> str:
        """Add a constant and return its name; an equal small constant is shared."""
        value = np.asarray(array)
        key = _content(value)
        known = self.constants.get(self._small.get(key, ""))
        # A pass may have given the name another value since.
        if key[2] and known is not None and _content(known) == key:
            return self._small[key]
        name = self.unused_name(stem)
        self.constants[name] = value
        if key[2]:
            self._small[key] = name
        return name


def from_model(
    model: onnx.ModelProto, base_dir: str = "", weights: Iterable[tuple[str, onnx.TensorProto]] = ()
) -> Graph:
    """Read a model message into a `Graph`: weights as arrays, constant nodes as constants.

    Parameters
    ----------
    model : onnx.ModelProto
        Not modified.
    base_dir : str
        Folder of the model's external data.
    weights : iterable of (str, onnx.TensorProto), optional
        Further constants by name, which the message has among its inputs.

    Raises
    ------
    ModelError
        When the message holds no graph, or its weights cannot be read.
    """
    if not model.graph.node:
        raise ModelError("the model has no nodes: is it an ONNX model?")
    _refuse_unsupported(model.graph)
    try:
        own = ((tensor.name, tensor) for tensor in model.graph.initializer)
        constants = {name: numpy_helper.to_array(tensor, base_dir) for name, tensor in (*own, *weights)}
    except Exception as error:  # protobuf, NumPy and the file system each raise their own
        raise ModelError(f"the model's weights cannot be read: {error}") from error
    graph = Graph(
        nodes=[_copy(node) for node in model.graph.node if node.op_type != "Constant"],
        constants=constants | {n.output[0]: _constant_value(n) for n in model.graph.node if n.op_type == "Constant"},
        inputs={info.name: _type_of(info) for info in model.graph.input if info.name not in constants},
        outputs=[info.name for info in model.graph.output],
        opset=next((item.version for item in model.opset_import if item.domain in _DEFAULT_DOMAINS), 0),
        domains={item.domain: item.version for item in model.opset_import if item.domain not in _DEFAULT_DOMAINS},
    )
    graph.check()
    graph.infer_types()
    return graph


def _refuse_unsupported(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if any(item.HasField("g") or item.graphs for item in node.attribute):
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) holds a graph of its own: fastcam explains networks without "
                "control flow. Export the model again with fixed conditions"
            )
    if graph.sparse_initializer:
        raise ModelError("the model has sparse weights: export it again with dense ones")


def operator(node: onnx.NodeProto) -> str:
    """Return the op of a node, with its domain in front unless that is ONNX's own."""
    return str(node.op_type if node.domain in _DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}")


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, text decoded, ``default`` where it is absent."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def needed_nodes(graph: Graph, outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes behind ``outputs`` in the order of a depth-first walk from them.

    Raises
    ------
    ModelError
        When a value depends on itself.
    """
    producers = graph.producers()
    order: list[onnx.NodeProto] = []
    entered: set[int] = set()
    finished: set[int] = set()
    for output in outputs:
        stack = [(producers.get(output), False)]
        while stack:
            node, left = stack.pop()
            if node is None or id(node) in finished:
                continue
            if left:
                finished.add(id(node))
                order.append(node)
                continue
            if id(node) in entered:
                raise ModelError(f"the graph has a cycle through node {node.name or node.output[0]!r}")
            entered.add(id(node))
            stack.append((node, True))
            stack.extend((producers.get(name), False) for name in reversed(node.input) if name)
    return order


def dependents(graph: Graph, value: str) -> list[onnx.NodeProto]:
    """Return the nodes that depend on ``value``, in topological order."""
    reached = {value}
    found = []
    for node in graph.nodes:
        if reached.intersection(node.input):
            reached.update(name for name in node.output if name)
            found.append(node)
    return found


def static_dims(graph: Graph, value: str, axes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of ``value`` along ``axes``.

    Raises
    ------
    UnsupportedOpError
        When one of them is not a fixed number.
    """
    shape = graph.shape(value)
    sizes = tuple(shape[axis] for axis in axes)
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedOpError(
            f"value {value!r} has shape {shape}: its gradient needs fixed sizes along axes {list(axes)}. "
            "Give the model's input a fixed height and width, then export again."
        )
    return tuple(int(size) for size in sizes if size is not None)


def _inferable(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return nodes of the same type and shape in place of one that ONNX infers no shape for, or an incomplete one."""
    if operator(node) == "GroupNormalization":
        return [helper.make_node("Identity", node.input[:1], node.output)]
    if operator(node) == "Range":
        return _open_range(graph, node)
    axes = attribute(node, "axes")
    sizes = graph.constants.get(node.input[3]) if operator(node) == "Resize" and len(node.input) == 4 else None
    rank = graph.rank(node.input[0]) if sizes is not None else None
    if not axes or sizes is None or rank is None:
        return [node]
    # Inference forgets the name of the batch: one pixel, spread over the new size, keeps it.
    name = node.output[0]
    whole = np.ones(rank, np.int64)
    whole[list(axes)] = sizes
    bounds = {f"{name}/start": np.zeros(len(axes)), f"{name}/end": np.ones(len(axes)), f"{name}/axes": np.array(axes)}
    graph.constants |= {key: array.astype(np.int64) for key, array in bounds.items()}
    graph.constants[f"{name}/sizes"] = whole
    return [
        helper.make_node("Slice", [node.input[0], *bounds], [f"{name}/pixel"]),
        helper.make_node("Expand", [f"{name}/pixel", f"{name}/sizes"], node.output),
    ]


def _open_range(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return nodes that make a row of open length: inference would write a Range out, if it took all the memory."""
    known = [graph.type(name).dtype for name in node.input if graph.rank(name) is not None]
    zero = numpy_helper.from_array(np.zeros(1, known[0] if known else np.int64))
    length = f"{node.output[0]}/length"
    return [
        helper.make_node("RandomUniform", [], [f"{length}/drawn"], shape=[1]),
        helper.make_node("Cast", [f"{length}/drawn"], [length], to=onnx.TensorProto.INT64),
        helper.make_node("ConstantOfShape", [length], node.output, value=zero),
    ]


def _rename_key(mapping: dict[str, Any], old: str, new: str) -> None:
    if old in mapping:
        items = [(new if key == old else key, value) for key, value in mapping.items()]
        mapping.clear()
        mapping.update(items)


def _content(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    """Return what makes two small arrays equal; a large one has no bytes."""
    return array.dtype.str, array.shape, array.tobytes() if array.size <= _INFERENCE_CONSTANT_SIZE else b""


def _steers_shapes(array: Array) -> bool:
    return array.size <= _INFERENCE_CONSTANT_SIZE and array.ndim <= 1


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """Copy a node without remarks: exporters note the source code that it came from, with its path."""
    clone = onnx.NodeProto()
    clone.CopyFrom(node)
    clone.ClearField("doc_string")
    clone.ClearField("metadata_props")
    return clone


def _constant_value(node: onnx.NodeProto) -> Array:
    if len(node.attribute) != 1:
        raise ModelError(f"constant {node.output[0]!r} has {len(node.attribute)} values instead of one")
    value = node.attribute[0]
    if value.name == "value":
        return numpy_helper.to_array(value.t)
    kinds: dict[str, Any] = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if value.name not in kinds:
        raise ModelError(f"constant {node.output[0]!r} has the unsupported form {value.name!r}")
    return np.asarray(helper.get_attribute_value(value), dtype=kinds[value.name])


def _has_shape(info: onnx.ValueInfoProto) -> bool:
    return bool(info.type.tensor_type.HasField("shape"))


def _type_of(info: onnx.ValueInfoProto) -> TensorType:
    tensor = info.type.tensor_type
    if not tensor.elem_type:
        raise ModelError(f"value {info.name!r} is not a tensor")
    return TensorType(helper.tensor_dtype_to_np_dtype(tensor.elem_type), tuple(map(_dim, tensor.shape.dim)))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    # Some exporters write 0 or -1 for "any size".
    return dim.dim_value if dim.dim_value > 0 else dim.dim_param or None


def _value_info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(type_.dtype), list(type_.shape))
