"""Convert networks that compute in 16 or 64 bits to float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from ...arrays import Array
from ...graph import Graph, TensorType
from ...notes import Note

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_DOUBLES = (TensorProto.DOUBLE,)

# Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "softmax_precision")


def widened(graph: Graph) -> list[Note]:
    """Widen a graph that computes in 16 bits, and return the note that says so."""
    return [widening_note("16 bits")] if widen_to_float32(graph) else []


def widening_note(computed_in: str) -> Note:
    """Return the note for a network that computed in 16 bits; ``computed_in`` is the name of its type."""
    return Note("widened", f"The model computes in {computed_in}: it is exported in float32.")


def widen_to_float32(graph: Graph) -> bool:
    """Make a graph compute in float32 what it computes in float16 or bfloat16.

    Casts between them become casts from float32 to float32, which are dropped with the other no-ops. Weights
    that are float32 already keep every bit.

    Parameters
    ----------
    graph : Graph
        Changed in place: inputs, constants and the attributes that name or hold a 16-bit float.

    Returns
    -------
    bool
        False if the graph has none.
    """
    return _to_float32(graph, _HALVES)


def narrowed(graph: Graph) -> list[Note]:
    """Make a graph with float64 images compute in float32, in place; return the note that says so.

    ONNX Runtime has no float64 convolutions.
    """
    if not any(type_.dtype == np.float64 for type_ in graph.inputs.values()):
        return []
    _to_float32(graph, _DOUBLES)
    return [Note("widened", "The model computes in float64: it is exported in float32.")]


def _to_float32(graph: Graph, kinds: tuple[int, ...]) -> bool:
    """Replace element types by float32, in place; return whether the graph has any of them."""
    dtypes = tuple(map(helper.tensor_dtype_to_np_dtype, kinds))
    constants, defaults = (_cast(arrays, dtypes) for arrays in (graph.constants, graph.defaults))
    inputs = {
        name: TensorType(np.dtype(np.float32), type_.shape) if type_.dtype in dtypes else type_
        for name, type_ in graph.inputs.items()
    }
    found = any(constants[name] is not graph.constants[name] for name in constants) or inputs != graph.inputs
    graph.constants, graph.defaults, graph.inputs = constants, defaults, inputs
    for node in graph.nodes:
        for attribute in node.attribute:
            found |= _cast_attribute(attribute, kinds)
    if found:
        # The known types of the outputs would be mistaken for their declaration.
        graph.types = {}
        graph.infer_types()
    return found


def _cast(arrays: dict[str, Array], dtypes: tuple[np.dtype[Any], ...]) -> dict[str, Array]:
    return {name: array.astype(np.float32) if array.dtype in dtypes else array for name, array in arrays.items()}


def _cast_attribute(attribute: AttributeProto, kinds: tuple[int, ...]) -> bool:
    if attribute.name in _TYPE_ATTRIBUTES and attribute.i in kinds:
        attribute.i = TensorProto.FLOAT
        return True
    if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in kinds:
        cast = numpy_helper.to_array(attribute.t).astype(np.float32)
        attribute.t.CopyFrom(numpy_helper.from_array(cast, attribute.t.name))
        return True
    return False
