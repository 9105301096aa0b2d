"""A model as a graph that can be queried and edited.

All edits go through the methods of `Graph`, which keep its indices (which node computes a value, which nodes read
it, which names are taken) up to date: no index can go stale, and every edit takes time in proportion to what it
changes, not to the size of the graph. The nodes themselves are `onnx.NodeProto`: read their fields freely, but never
write them.

The weights are stored separately from the nodes as NumPy arrays, outside any protobuf message: VGG16 is
passed around, shape-inferred and rewritten as a few kilobytes of nodes, and its 537 MB are neither copied nor
serialised until the file is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, shape_inference

from .arrays import Array
from .batch_sizes import is_multiple, name_batch_sizes
from .errors import ModelError, UnsupportedOpError

Dim = int | str | None

_T = TypeVar("_T")

# Shape arithmetic (Reshape, Slice, Pad ...) reads small constants; inference needs only the values of these.
_INFERENCE_CONSTANT_SIZE = 64

# Ops that the checker rejects, and importers replace.
_WITHDRAWN = ("GroupNormalization",)

_DEFAULT_DOMAINS = ("", "ai.onnx")


class TensorType(NamedTuple):
    """Element type and shape of a value; a dimension is a number, a symbol, or None if nothing is known."""

    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]


def _inferred(message: onnx.ModelProto) -> dict[str, TensorType]:
    try:
        model = shape_inference.infer_shapes(message, data_prop=True)
    except Exception as error:  # the C++ checker throws several unrelated types
        raise ModelError(f"shape inference rejected the model: {error}") from error
    # For an output declared without a shape, inference returns a second, empty entry: keep the informative one.
    types = {info.name: _type_of(info) for info in model.graph.output if _has_shape(info)}
    return types | {info.name: _type_of(info) for info in model.graph.value_info if _has_shape(info)}


class _Link:
    """A node's place in a circular list."""

    __slots__ = ("after", "before", "node")

    def __init__(self, node: onnx.NodeProto | None = None) -> None:
        self.node = node
        self.before: _Link = self
        self.after: _Link = self


class _NodeOrder:
    """Nodes in a doubly linked list: insertion and removal anywhere take constant time."""

    def __init__(self) -> None:
        self._end = _Link()
        self._links: dict[int, _Link] = {}
        self._snapshot: tuple[onnx.NodeProto, ...] | None = ()

    def __contains__(self, node: onnx.NodeProto) -> bool:
        return id(node) in self._links

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[onnx.NodeProto]:
        link = self._end.after
        while link.node is not None:
            yield link.node
            link = link.after

    def snapshot(self) -> tuple[onnx.NodeProto, ...]:
        """Return the nodes in order; rebuilt only after a change."""
        if self._snapshot is None:
            self._snapshot = tuple(self)
        return self._snapshot

    def insert_before(self, place: onnx.NodeProto | None, node: onnx.NodeProto) -> None:
        """Insert ``node`` before ``place``; None means at the end."""
        if node in self:
            raise ValueError(f"node {node.name!r} is already part of the graph")
        following = self._end if place is None else self._links[id(place)]
        link = self._links[id(node)] = _Link(node)
        link.before, link.after = following.before, following
        link.before.after = following.before = link
        self._snapshot = None

    def following(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the node after ``node``; None for the last."""
        return self._links[id(node)].after.node

    def remove(self, node: onnx.NodeProto) -> None:
        """Remove ``node``."""
        link = self._links.pop(id(node))
        link.before.after, link.after.before = link.after, link.before
        self._snapshot = None


class Graph:
    """Nodes in topological order, with their constants and the types of their values.

    Parameters
    ----------
    nodes : iterable of onnx.NodeProto
        In topological order. The graph owns them from here on.
    constants, inputs, outputs, opset, types, defaults, domains, maps
        As the attributes.

    Attributes
    ----------
    constants : dict of str to ndarray
        The weights, by value name. Arrays are shared, never modified in place.
    inputs : dict of str to TensorType
    outputs : list of str
    opset : int
        Version of the default ONNX operator set.
    types : dict of str to TensorType
        Results of the last shape inference, by value name; `infer_types` refreshes them.
    defaults : dict of str to ndarray
        Values of the inputs that a caller may omit.
    domains : dict of str to int
        Versions of further operator sets.
    maps : dict of str to tuple of int
        Height, width and channels of the values that are known to be maps, whatever the order of their axes.
    """

    def __init__(
        self,
        nodes: Iterable[onnx.NodeProto] = (),
        constants: Mapping[str, Array] | None = None,
        inputs: Mapping[str, TensorType] | None = None,
        outputs: Iterable[str] = (),
        opset: int = 18,
        *,
        types: Mapping[str, TensorType] | None = None,
        defaults: Mapping[str, Array] | None = None,
        domains: Mapping[str, int] | None = None,
        maps: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> None:
        self.constants: dict[str, Array] = dict(constants or {})
        self.inputs: dict[str, TensorType] = dict(inputs or {})
        self.outputs: list[str] = list(outputs)
        self.opset = opset
        self.types: dict[str, TensorType] = dict(types or {})
        self.defaults: dict[str, Array] = dict(defaults or {})
        self.domains: dict[str, int] = dict(domains or {})
        self.maps: dict[str, tuple[int, int, int]] = dict(maps or {})
        # Every name that a node has ever read or written, the next number of each stem, and the small constants by
        # value.
        self._seen: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._small: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._set_nodes(nodes)

    def copy(self, **changes: Any) -> Graph:
        """Return a graph with its own nodes that shares the arrays; ``changes`` replace arguments of `Graph`."""
        parts: dict[str, Any] = {
            "nodes": self.nodes,
            "constants": self.constants,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "opset": self.opset,
            "types": self.types,
            "defaults": self.defaults,
            "domains": self.domains,
            "maps": self.maps,
        } | changes
        return Graph(**{**parts, "nodes": [_copy(node) for node in parts["nodes"]]})

    # Queries

    @property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """The current nodes in topological order."""
        return self._order.snapshot()

    def holds(self, node: onnx.NodeProto) -> bool:
        """Return whether ``node`` is (still) part of the graph."""
        return node in self._order

    def producer(self, value: str) -> onnx.NodeProto | None:
        """Return the node that computes ``value``; None for inputs and constants."""
        return self._producers.get(value)

    def readers(self, value: str) -> list[onnx.NodeProto]:
        """Return the nodes that read ``value``, each once, in the order in which they started reading it."""
        return list({id(node): node for node in self._uses.get(value, {}).values()}.values())

    def only_reader(self, value: str) -> onnx.NodeProto | None:
        """Return the only node that reads ``value``; None if none or several do, or if it is an output of the graph."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def producers(self) -> Mapping[str, onnx.NodeProto]:
        """Return the producer of every computed value, as a view that follows all edits."""
        return MappingProxyType(self._producers)

    def type(self, value: str) -> TensorType:
        """Return the type of ``value``.

        Raises
        ------
        ModelError
            Shape inference could not determine it.
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
        """Return the number of dimensions of ``value``, or None if inference could not determine it."""
        if value in self.constants:
            return self.constants[value].ndim
        known = self.types.get(value) or self.inputs.get(value)
        return None if known is None else len(known.shape)

    def dtype(self, value: str) -> np.dtype[Any] | None:
        """Return the element type of ``value``, or None if inference could not determine it."""
        return self.type(value).dtype if self.rank(value) is not None else None

    # Edits

    def append(self, *nodes: onnx.NodeProto) -> None:
        """Add nodes at the end."""
        self._insert(None, nodes)

    def insert_before(self, place: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Insert nodes before the node ``place``."""
        self._insert(place, nodes)

    def insert_after(self, place: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Insert nodes after the node ``place``."""
        self._insert(self._order.following(place), nodes)

    def remove(self, *nodes: onnx.NodeProto) -> None:
        """Remove nodes; readers of their outputs must read other values by the next `check` or `prune`."""
        for node in nodes:
            self._order.remove(node)
            for output in node.output:
                if self._producers.get(output) is node:
                    del self._producers[output]
            for index, name in enumerate(node.input):
                self._drop_use(name, node, index)

    def replace(self, node: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Replace a node by several; they may compute values with the same names."""
        following = self._order.following(node)
        self.remove(node)
        self._insert(following, nodes)

    def rewrite(self, node: onnx.NodeProto, op: str, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
        """Replace a node by one with another op that computes the same values, keeping its name; return it."""
        new = helper.make_node(op, inputs, list(node.output), name=node.name, **attributes)
        self.replace(node, new)
        return new

    def set_input(self, node: onnx.NodeProto, index: int, value: str) -> None:
        """Make a node read ``value`` as its input number ``index``."""
        self._drop_use(node.input[index], node, index)
        node.input[index] = value
        self._add_use(value, node, index)

    def set_inputs(self, node: onnx.NodeProto, values: Iterable[str]) -> None:
        """Replace all inputs of a node."""
        for index, name in enumerate(node.input):
            self._drop_use(name, node, index)
        del node.input[:]
        node.input.extend(values)
        for index, name in enumerate(node.input):
            self._add_use(name, node, index)

    def set_output(self, node: onnx.NodeProto, index: int, value: str) -> None:
        """Rename output number ``index`` of a node to ``value``; readers of the old name keep reading it."""
        if self._producers.get(node.output[index]) is node:
            del self._producers[node.output[index]]
        node.output[index] = value
        self._add_output(value, node)

    def set_attributes(self, node: onnx.NodeProto, **values: Any) -> None:
        """Set attributes of a node; None removes one."""
        kept = [item for item in node.attribute if item.name not in values]
        new = [helper.make_attribute(name, value) for name, value in values.items() if value is not None]
        del node.attribute[:]
        node.attribute.extend([*kept, *new])

    def replace_by_constants(self, node: onnx.NodeProto, arrays: Iterable[Array]) -> None:
        """Remove a node and make its outputs constants."""
        self.constants.update({name: array for name, array in zip(node.output, arrays, strict=True) if name})
        self.remove(node)

    def rename(self, old: str, new: str) -> None:
        """Give the value ``old`` the name ``new`` everywhere."""
        self.rename_all({old: new})

    def rename_all(self, names: Mapping[str, str]) -> None:
        """Rename values everywhere, all at once: two may swap names."""
        nodes = {id(node): node for old in names if (node := self._producers.get(old)) is not None}
        for old in names:
            self._producers.pop(old, None)
        for node in nodes.values():
            for index, name in enumerate(node.output):
                node.output[index] = names.get(name, name)
                self._add_output(node.output[index], node)
        self.replace_all_uses(names)
        self.constants, self.inputs, self.defaults = (
            _renamed(mapping, names) for mapping in (self.constants, self.inputs, self.defaults)
        )
        self.types.update([(new, self.types.pop(old)) for old, new in names.items() if old in self.types])
        self.maps.update([(new, self.maps.pop(old)) for old, new in names.items() if old in self.maps])

    def replace_uses(self, old: str, new: str, *, outputs: bool = True) -> None:
        """Make every reader of ``old``, optionally including the graph's outputs, read ``new`` instead."""
        self.replace_all_uses({old: new}, outputs=outputs)

    def replace_all_uses(self, names: Mapping[str, str], *, outputs: bool = True) -> None:
        """Make the readers of several values read others instead, all at once; see `replace_uses`."""
        moved = [(new, self._uses.pop(old)) for old, new in names.items() if old != new and old in self._uses]
        for new, uses in moved:
            for (_, index), node in uses.items():
                node.input[index] = new
            self._uses.setdefault(new, {}).update(uses)
            self._seen.add(new)
        if outputs:
            self.outputs = [names.get(name, name) for name in self.outputs]

    def detach(self, value: str, made: str, read: str) -> onnx.NodeProto:
        """Free the name ``value``: its producer writes ``made`` instead, and its readers read ``read``.

        Returns
        -------
        onnx.NodeProto
            The producer, after which nodes between the two can be inserted.
        """
        producer = self._producers[value]
        self.replace_uses(value, read)
        self.set_output(producer, list(producer.output).index(value), made)
        return producer

    def prune(self) -> None:
        """Drop what the outputs do not need, and sort the nodes into an order that depends only on the outputs."""
        self._set_nodes(needed_nodes(self, self.outputs))
        self.constants = {name: a for name, a in self.constants.items() if name in self._uses or name in self.outputs}
        self.types = {name: type_ for name, type_ in self.types.items() if name in self._producers}

    def emit(self, op: str, *inputs: str, stem: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the name of its value."""
        output = self.unused_name(stem or f"{op}_out")
        self.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def append_copy(self, node: onnx.NodeProto, inputs: Sequence[str], stem: str) -> list[str]:
        """Append a copy of a node that reads other values, and return the names of its outputs; "" stays ""."""
        outputs = [self.unused_name(f"{stem}/{output}") if output else "" for output in node.output]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        self.append(helper.make_node(node.op_type, inputs, outputs, name=outputs[0], domain=node.domain, **attributes))
        return outputs

    def append_copies(self, nodes: Sequence[onnx.NodeProto], names: Mapping[str, str], stem: str) -> dict[str, str]:
        """Append copies of nodes that read other values, by name; return what became of ``names`` and the outputs."""
        found = dict(names)
        for node in nodes:
            outputs = self.append_copy(node, [found.get(name, name) for name in node.input], stem)
            found.update(zip(node.output, outputs, strict=True))
        return found

    def emit_constant(self, array: npt.ArrayLike, *, stem: str = "constant") -> str:
        """Add a constant and return its name; an equal small constant is shared."""
        value = np.asarray(array)
        key = _content(value)
        known = self.constants.get(self._small.get(key, ""))
        # A pass may have changed the value of the name since.
        if key[2] and known is not None and _content(known) == key:
            return self._small[key]
        name = self.unused_name(stem)
        self.constants[name] = value
        if key[2]:
            self._small[key] = name
        return name

    def emit_integers(self, *numbers: int) -> str:
        """Add a constant of rank 1, int64, such as axes or a shape; see `emit_constant`."""
        return self.emit_constant(np.array(numbers, np.int64))

    def emit_integer(self, number: int) -> str:
        """Add an int64 scalar; see `emit_constant`."""
        return self.emit_constant(np.int64(number))

    def emit_number(self, number: float) -> str:
        """Add a float32 scalar; see `emit_constant`."""
        return self.emit_constant(np.float32(number))

    def unused_name(self, stem: str) -> str:
        """Return ``stem``, or ``stem`` with the first number that makes it a unique value name."""
        name, number = stem, self._numbers.get(stem, 1)
        while name in self._seen or name in self.constants or name in self.inputs:
            name, number = f"{stem}_{number}", number + 1
        self._numbers[stem] = number
        self._seen.add(name)
        return name

    def _set_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        self._order = _NodeOrder()
        self._producers: dict[str, onnx.NodeProto] = {}
        # Per value: the nodes that read it, by node identity and input position.
        self._uses: dict[str, dict[tuple[int, int], onnx.NodeProto]] = {}
        self._insert(None, nodes)

    def _insert(self, place: onnx.NodeProto | None, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            self._order.insert_before(place, node)
            for output in node.output:
                self._add_output(output, node)
            for index, name in enumerate(node.input):
                self._add_use(name, node, index)

    def _add_output(self, value: str, node: onnx.NodeProto) -> None:
        if value:
            self._producers[value] = node
            self._seen.add(value)

    def _add_use(self, value: str, node: onnx.NodeProto, index: int) -> None:
        if value:
            self._uses.setdefault(value, {})[id(node), index] = node
            self._seen.add(value)

    def _drop_use(self, value: str, node: onnx.NodeProto, index: int) -> None:
        uses = self._uses.get(value, {})
        uses.pop((id(node), index), None)
        if value and not uses:
            self._uses.pop(value, None)

    # Checks, inference, messages

    def check(self) -> None:
        """Raise ModelError if a node violates ONNX's rules for its op, or reads a value that nothing computes."""
        context = onnx.checker.C.CheckerContext()
        context.ir_version = onnx.IR_VERSION
        context.opset_imports = {"": self.opset, **self.domains}
        known = {*self.inputs, *self.constants, *self._producers}
        for node in self.nodes:
            if operator(node) in _WITHDRAWN:
                continue
            try:
                onnx.checker.check_node(node, context)
            except onnx.checker.ValidationError as error:
                raise ModelError(f"node {node.name!r} ({node.op_type}) is not valid ONNX: {error}") from error
            missing = [name for name in node.input if name and name not in known]
            if missing:
                raise ModelError(f"node {node.name!r} ({node.op_type}) reads {missing}, which nothing computes")
        if not known.issuperset(self.outputs):
            raise ModelError(f"nothing computes the outputs {sorted(set(self.outputs) - known)}")

    def infer_types(self) -> None:
        """Refresh `types` by ONNX shape inference, without passing it the weights."""
        self.types = _inferred(self._without_weights())
        batch = next((type_.shape[0] for type_ in self.inputs.values() if type_.shape), None)
        if not isinstance(batch, str):
            return
        shapes = {name: type_.shape for name, type_ in {**self.inputs, **self.types}.items()}
        shapes |= {name: array.shape for name, array in self.constants.items()}
        better = name_batch_sizes(self.nodes, shapes, batch)
        for name, type_ in self.types.items():
            if not better.keys().isdisjoint(type_.shape):
                self.types[name] = type_._replace(shape=tuple(better.get(str(size), size) for size in type_.shape))

    def _without_weights(self) -> onnx.ModelProto:
        """Return the graph as a message in which the large constants are inputs."""
        known = {name: array for name, array in self.constants.items() if _steers_shapes(array)}
        assumed = {
            name: TensorType(array.dtype, array.shape) for name, array in self.constants.items() if name not in known
        }
        nodes: list[onnx.NodeProto] = []
        for node in self.nodes:
            stand_ins, constants = _inferable(self, node)
            nodes += stand_ins
            known |= constants
        message = self._message(nodes, {**self.inputs, **assumed})
        message.graph.initializer.extend(_tensors({**known, **self.defaults}))
        return message

    def to_model(self, *, metadata: Mapping[str, str] | None = None, name: str = "fastcam") -> onnx.ModelProto:
        """Return the graph as a message that holds its weights (a copy of them)."""
        model = self.skeleton(metadata=metadata, name=name)
        model.graph.initializer.extend(_tensors({**self.constants, **self.defaults}))
        return model

    def skeleton(self, *, metadata: Mapping[str, str] | None = None, name: str = "fastcam") -> onnx.ModelProto:
        """Return the graph as a message without its weights."""
        model = self._message(self.nodes, self.inputs, name)
        helper.set_model_props(model, dict(metadata or {}))
        return model

    def _message(
        self, nodes: Iterable[onnx.NodeProto], inputs: Mapping[str, TensorType], name: str = "fastcam"
    ) -> onnx.ModelProto:
        proto = helper.make_graph(
            list(nodes),
            name,
            [_value_info(key, type_) for key, type_ in inputs.items()],
            [self._output_info(key) for key in self.outputs],
        )
        return helper.make_model(
            proto,
            opset_imports=[helper.make_opsetid(domain, n) for domain, n in {"": self.opset, **self.domains}.items()],
            producer_name="fastcam",
            ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)]),
        )

    def _output_info(self, name: str) -> onnx.ValueInfoProto:
        known = self.types.get(name) or self.inputs.get(name)
        if known is None:
            return onnx.ValueInfoProto(name=name)
        # Names given by inference are not declarations: the next inference may know more.
        shape = tuple(None if str(size).startswith("unk__") or is_multiple(size) else size for size in known.shape)
        return _value_info(name, TensorType(known.dtype, shape))


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
        Further constants by name, which are inputs of the message.

    Raises
    ------
    ModelError
        The message holds no graph, or its weights cannot be read.
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
                f"node {node.name!r} ({node.op_type}) contains a subgraph: fastcam explains networks without "
                "control flow. Export the model again with fixed conditions"
            )
    if graph.sparse_initializer:
        raise ModelError("the model has sparse weights: export it again with dense ones")


def operator(node: onnx.NodeProto) -> str:
    """Return the op of a node, prefixed with its domain unless that is ONNX's default."""
    return str(node.op_type if node.domain in _DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}")


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, text decoded, or ``default`` if it is absent."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def needed_nodes(graph: Graph, outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that ``outputs`` depend on, in the order of a depth-first walk from them.

    Raises
    ------
    ModelError
        A value depends on itself.
    """
    order: list[onnx.NodeProto] = []
    entered: set[int] = set()
    finished: set[int] = set()
    for output in outputs:
        stack = [(graph.producer(output), False)]
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
            stack.extend((graph.producer(name), False) for name in reversed(node.input) if name)
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


def nodes_between(graph: Graph, value: str, outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that depend on ``value`` and that ``outputs`` depend on, in topological order."""
    needed = {id(node) for node in needed_nodes(graph, outputs)}
    return [node for node in dependents(graph, value) if id(node) in needed]


def split_graph(graph: Graph, value: str) -> tuple[Graph, Graph]:
    """Cut a graph at ``value``; the halves share its arrays.

    Returns
    -------
    features : Graph
        The inputs -> ``value``, and every other value that the head also reads.
    head : Graph
        Those values -> the outputs.
    """
    head_nodes = nodes_between(graph, value, graph.outputs)
    made_in_head = {name for node in head_nodes for name in node.output}
    read = dict.fromkeys(name for node in head_nodes for name in node.input if name)
    crossing = [name for name in read if name not in made_in_head and name not in graph.constants and name != value]
    cut = [value, *crossing]
    features = graph.copy(outputs=cut)
    head = graph.copy(nodes=head_nodes, inputs={name: graph.type(name) for name in cut})
    for half in (features, head):
        half.prune()
    return features, head


def static_dims(graph: Graph, value: str, axes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of ``value`` along ``axes``.

    Raises
    ------
    UnsupportedOpError
        One of them is not a fixed number.
    """
    shape = graph.shape(value)
    sizes = tuple(shape[axis] for axis in axes)
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedOpError(
            f"value {value!r} has shape {shape}: its gradient needs fixed sizes along axes {list(axes)}. "
            "Give the model's input a fixed height and width, then export again."
        )
    return tuple(int(size) for size in sizes if size is not None)


def _inferable(graph: Graph, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Return nodes with the same type and shape, and their constants, in place of one that ONNX handles badly."""
    if operator(node) == "GroupNormalization":
        return [helper.make_node("Identity", node.input[:1], node.output)], {}
    if operator(node) == "Range":
        return _open_range(graph, node), {}
    if operator(node) == "Expand" and all(name in graph.constants for name in node.input):
        return _drawn_expand(graph, node), {}
    axes = attribute(node, "axes")
    sizes = graph.constants.get(node.input[3]) if operator(node) == "Resize" and len(node.input) == 4 else None
    rank = graph.rank(node.input[0]) if sizes is not None else None
    if not axes or sizes is None or rank is None:
        return [node], {}
    # Inference loses the name of the batch: expanding one pixel to the new size keeps it.
    name = node.output[0]
    whole = np.ones(rank, np.int64)
    whole[list(axes)] = sizes
    bounds = {f"{name}/start": np.zeros(len(axes)), f"{name}/end": np.ones(len(axes)), f"{name}/axes": np.array(axes)}
    nodes = [
        helper.make_node("Slice", [node.input[0], *bounds], [f"{name}/pixel"]),
        helper.make_node("Expand", [f"{name}/pixel", f"{name}/sizes"], node.output),
    ]
    return nodes, {key: array.astype(np.int64) for key, array in {**bounds, f"{name}/sizes": whole}.items()}


def _drawn_expand(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return an Expand of random numbers: inference would materialise one of integers, whatever its size."""
    value = graph.constants[node.input[0]]
    drawn, kind = f"{node.output[0]}/drawn", helper.np_dtype_to_tensor_dtype(value.dtype)
    uniform = helper.make_node("RandomUniform", [], [f"{drawn}/float"])
    # make_node cannot tell the type of an empty list.
    uniform.attribute.append(helper.make_attribute("shape", list(value.shape), attr_type=onnx.AttributeProto.INTS))
    return [
        uniform,
        helper.make_node("Cast", [f"{drawn}/float"], [drawn], to=kind),
        helper.make_node("Expand", [drawn, node.input[1]], node.output),
    ]


def _open_range(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return nodes for a row of dynamic length: inference would materialise a Range, whatever its size."""
    known = [graph.type(name).dtype for name in node.input if graph.rank(name) is not None]
    zero = numpy_helper.from_array(np.zeros(1, known[0] if known else np.int64))
    length = f"{node.output[0]}/length"
    return [
        helper.make_node("RandomUniform", [], [f"{length}/drawn"], shape=[1]),
        helper.make_node("Cast", [f"{length}/drawn"], [length], to=onnx.TensorProto.INT64),
        helper.make_node("ConstantOfShape", [length], node.output, value=zero),
    ]


def _renamed(mapping: dict[str, _T], names: Mapping[str, str]) -> dict[str, _T]:
    """Return a mapping with new keys in the same order."""
    if mapping.keys().isdisjoint(names):
        return mapping
    return {names.get(key, key): value for key, value in mapping.items()}


def _tensors(arrays: Mapping[str, Array]) -> Iterator[onnx.TensorProto]:
    return (numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in arrays.items())


def _content(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    """Return a key that is equal for equal small arrays; for a large one it omits the bytes."""
    return array.dtype.str, array.shape, array.tobytes() if array.size <= _INFERENCE_CONSTANT_SIZE else b""


def _steers_shapes(array: Array) -> bool:
    return array.size <= _INFERENCE_CONSTANT_SIZE and array.ndim <= 1


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """Copy a node without its metadata: exporters record the source code that it came from, with its path."""
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
