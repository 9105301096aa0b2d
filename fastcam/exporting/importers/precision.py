"""Networks that compute in 16 bits, widened to float32."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from ...graph import Array, Graph, TensorType
from ...notes import Note

_HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_HALF_DTYPES = tuple(helper.tensor_dtype_to_np_dtype(type_) for type_ in _HALF_TYPES)

# Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "softmax_precision")


def widened(graph: Graph) -> list[Note]:
    """Widen a graph that computes in 16 bits, and return the note that says so."""
    return [widening_note("16 bits")] if widen_to_float32(graph) else []


def widening_note(computed_in: str) -> Note:
    """Return the note of a network that computed in 16 bits, ``computed_in`` being the name of its type."""
    return Note("widened", f"The model computes in {computed_in}: it is exported in float32.")


def widen_to_float32(graph: Graph) -> bool:
    """Let a graph compute in float32 whatever it computes in float16 or bfloat16.

    Casts between the two become casts from float32 to float32, and go with the other nodes that do nothing. Weights
    that are float32 already keep every bit.

    Parameters
    ----------
    graph : Graph
        Changed in place: inputs, constants and the attributes that name or hold a 16-bit float.

    Returns
    -------
    bool
        False where the graph has none.
    """
    constants, defaults = (_widened(arrays) for arrays in (graph.constants, graph.defaults))
    inputs = {
        name: TensorType(np.dtype(np.float32), type_.shape) if type_.dtype in _HALF_DTYPES else type_
        for name, type_ in graph.inputs.items()
    }
    found = any(constants[name] is not graph.constants[name] for name in constants) or inputs != graph.inputs
    graph.constants, graph.defaults, graph.inputs = constants, defaults, inputs
    for node in graph.nodes:
        for attribute in node.attribute:
            found |= _widen_attribute(attribute)
    if found:
        # What was known of the outputs would be taken for their declaration.
        graph.types = {}
        graph.infer_types()
    return found


def _widened(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: array.astype(np.float32) if array.dtype in _HALF_DTYPES else array for name, array in arrays.items()}


def _widen_attribute(attribute: AttributeProto) -> bool:
    if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _HALF_TYPES:
        attribute.i = TensorProto.FLOAT
        return True
    if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in _HALF_TYPES:
        wide = numpy_helper.to_array(attribute.t).astype(np.float32)
        attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
        return True
    return False
