"""Keras models and files into a clean `Graph` of the forward pass.

The models are traced as a function whose weights are *arguments*: the converter then never sees 500 MB of constants,
and the process stays below 3 GB; passing the model itself takes more than 21 GB. The weights are added as NumPy
arrays afterwards, and the remaining ops on them (Reshape, Squeeze, Transpose, BatchNorm arithmetic) are folded.

TensorFlow and tf2onnx are imported here, when a Keras model arrives, and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...errors import FastcamError, MissingExtraError, ModelError
from ...graph import Graph, from_model, needed_nodes, static_dims
from ...labels import read_labels
from ...notes import Note
from ...preprocessing import LAYOUTS, Guess, find_families
from .imported import (
    EXAMPLE_SIZES,
    TARGET_OPSET,
    ImportedModel,
    ImportOptions,
    Sample,
    logging_from,
    sample_images,
    settle_signature,
)
from .keras_calls import LayerCall, choose_output, name_tensors, recorded_calls
from .keras_files import load_keras_file, load_saved_model
from .precision import widen_to_float32, widening_note


def is_keras(model: object) -> bool:
    """Return whether a model is a Keras 3 model, without importing Keras."""
    return any(base.__module__.startswith(("keras.", "keras_")) for base in type(model).__mro__)


def read_keras(path: Path, options: ImportOptions) -> ImportedModel:
    """Import a .keras, .h5 or .hdf5 file; raises ModelError, MissingExtraError."""
    with _keras_extra():
        import keras
    imported = import_keras(load_keras_file(keras, path, options.custom_objects), options)
    try:
        labels = read_labels(path)
    except RecursionError as error:
        raise ModelError(f"{path}: its class names are nested too deeply: it is damaged") from error
    if labels is not None:
        imported.classes, imported.preprocessing = labels.classes, labels.preprocessing
    return imported


def read_saved_model(folder: Path, options: ImportOptions) -> ImportedModel:
    """Import a SavedModel folder; raises ModelError, MissingExtraError."""
    with _keras_extra():
        import keras
        import tensorflow as tf
    return import_keras(load_saved_model(keras, tf, folder), options)


def import_keras(model: Any, options: ImportOptions) -> ImportedModel:
    """Import a Keras model; raises ModelError, MissingExtraError."""
    with _keras_extra():
        import keras
        import tensorflow as tf
        import tf2onnx
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"Keras runs on {keras.backend.backend()!r} here: export needs its TensorFlow backend. "
            "Save the model, set KERAS_BACKEND=tensorflow, and export the saved file."
        )
    outputs = getattr(model, "outputs", None) or []
    options.check_scores(tuple(outputs[0].shape) if len(outputs) == 1 else None)
    variables = [model.trainable_variables, model.non_trainable_variables]
    specs = [
        [tf.TensorSpec(variable.shape, variable.dtype, name=f"{kind}_{index}") for index, variable in enumerate(group)]
        for kind, group in zip(("trainable", "fixed"), variables, strict=True)
    ]
    image = tf.TensorSpec(_image_shape(keras, model, options), tf.float32, name=_input_name(model))
    calls: list[LayerCall] = []

    def forward(images: Any, trainable: Any, fixed: Any) -> Any:
        calls.clear()
        values = list(zip([*variables[0], *variables[1]], [*trainable, *fixed], strict=True))
        scope = keras.StatelessScope(values)
        with recorded_calls(keras, calls), _inlined_functions(tf), scope, tf.name_scope(_SCOPE):
            outputs = model(images, training=False)
        return choose_output(keras, outputs, calls, getattr(model, "output_names", None) or [], options.output)

    signature = [image, *specs]
    function = tf.function(forward, input_signature=signature, autograph=False)
    with logging_from(logging.WARNING, tf2onnx.__name__), _whole_einsums(), _traceable(model):
        proto, _ = tf2onnx.convert.from_function(
            function, input_signature=signature, opset=TARGET_OPSET, custom_op_handlers={"Erfc": (_convert_erfc, [])}
        )
    _refuse_foreign_ops(proto)
    sample = _sample(tf, function, image.shape[1:], variables) if model.dtype == "float32" else None
    graph = from_model(proto)
    arguments = zip([*specs[0], *specs[1]], [*variables[0], *variables[1]], strict=True)
    # Tensors that layers hold outside their variables (Normalization's mean) become further inputs.
    captures = function.get_concrete_function().graph.captures
    known = {spec.name: variable for spec, variable in arguments} | {inner.name: outer for outer, inner in captures}
    for name, value in known.items():
        if graph.inputs.pop(name, None) is not None:
            graph.constants[name] = np.asarray(value)
    notes = _widen(graph, calls)
    _size_resizes(graph)
    notes += settle_signature(graph, ImportOptions())
    tensors = name_tensors(calls)
    layers = _name_values(graph, {layer: _source_tensor(tensor).name for layer, tensor in tensors.items()})
    graph.maps = _map_sizes(keras, {layers[layer]: tensor for layer, tensor in tensors.items() if layer in layers})
    return ImportedModel(
        graph, "keras", layers, guess=_guessed_preprocessing(graph, layers), notes=notes, sample=sample
    )


@contextlib.contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Raise an error that says which model TensorFlow or the converter rejects, and why."""
    try:
        yield
    except FastcamError:
        raise
    except Exception as error:  # layers, TensorFlow and the converter each raise their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        by_values = type(error).__name__ == "OperatorNotAllowedInGraphError"
        advice = (
            "remove the branches that depend on the values of the image"
            if by_values
            else ("replace the layer that the reason names, or give an .onnx file")
        )
        raise ModelError(
            f"TensorFlow cannot trace the Keras model {getattr(model, 'name', '')!r} ({type(error).__name__}: "
            f"{(lines[0] if by_values else lines[-1])[:300]}): {advice}"
        ) from error


def _sample(tf: Any, function: Any, shape: Any, variables: Any) -> Sample | None:
    """Return the traced function's scores for some images, or None if these are large or it cannot run here."""
    images = sample_images(shape)
    if images is None:
        return None
    values = [[variable.value for variable in group] for group in variables]
    try:
        return Sample(np.asarray(function(tf.constant(images), *values)))
    except Exception:  # noqa: BLE001  # a model of a fixed batch size, which the exported file shows
        return None


def _widen(graph: Graph, calls: list[LayerCall]) -> list[Note]:
    """Widen whatever computes in 16 bits; return the note that says so."""
    half_dtypes = sorted({call.half_dtype for call in calls if call.half_dtype})
    if not widen_to_float32(graph) and not half_dtypes:
        return []
    return [widening_note(" and ".join(half_dtypes) or "16 bits")]


def _size_resizes(graph: Graph) -> None:
    """Give every Resize its original size: the converter writes the scale, and 24 * float32(17 / 24) is below 17."""
    for node in graph.nodes:
        scales = graph.constants[node.input[2]] if node.op_type == "Resize" and len(node.input) == 3 else np.ones(0)
        axes = [axis for axis, scale in enumerate(scales) if scale != 1]
        if not axes:
            continue
        try:
            before = static_dims(graph, node.input[0], axes)
        except ModelError as error:
            raise ModelError(
                f"the model resizes a picture ({node.output[0]!r}) whose size is computed while it runs: use "
                "keras.layers.Resizing without crop_to_aspect_ratio"
            ) from error
        sizes = np.array([round(size * float(scales[axis])) for axis, size in zip(axes, before, strict=True)], np.int64)
        graph.set_inputs(node, [*node.input[:2], "", graph.emit_constant(sizes, stem="sizes")])
        graph.set_attributes(node, axes=axes)
        graph.infer_types()


def _refuse_foreign_ops(model: onnx.ModelProto) -> None:
    """The converter passes TensorFlow ops that it does not know through under their own names."""
    foreign = {node.op_type for node in model.graph.node if not node.domain and not onnx.defs.has(node.op_type)}
    if foreign:
        raise ModelError(
            f"tf2onnx has no ONNX for TensorFlow's {', '.join(sorted(foreign))}: replace the layers that use it"
        )


def _image_shape(keras: Any, model: Any, options: ImportOptions) -> tuple[int | None, ...]:
    """Return the shape of a batch of images, with everything fixed except the batch."""
    input_size = options.input_size
    shapes = _input_shapes(keras, model)
    if not shapes and options.example_input is not None:
        shapes = [tuple(np.shape(options.example_input))]
    if not shapes:
        raise ModelError(
            "the Keras model does not know its input: build it with keras.Input((height, width, channels)), "
            "or pass a batch of images as example_input"
        )
    if len(shapes) != 1:
        raise ModelError(f"the Keras model has {len(shapes)} inputs: fastcam explains one image input")
    (shape,) = shapes
    if len(shape) not in LAYOUTS:
        raise ModelError(
            f"the Keras model's input has shape {shape}: fastcam explains pictures (N,H,W,C), series (N,T,C) and "
            "volumes (N,D,H,W,C)"
        )
    if input_size is not None:
        shape = _with_size(shape, input_size, first=1 if keras.config.image_data_format() == "channels_last" else 2)
    if None in shape[1:]:
        raise ModelError(
            f"the Keras model's input has shape {shape}: give input_size={EXAMPLE_SIZES[len(shape) - 1]}, or another "
            "size, or build it with a fixed shape"
        )
    return (None, *shape[1:])


def _input_shapes(keras: Any, model: Any) -> list[tuple[int | None, ...]]:
    """Return the shape of every input: as declared, or as a subclassed model saw it in its first call."""
    inputs = getattr(model, "inputs", None) or []
    for tensor in inputs:
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise ModelError(
                f"the Keras model's input {tensor.name!r} is {tensor.dtype}, but fastcam needs float32 images: "
                'build the model with keras.Input(shape, dtype="float32")'
            )
    if inputs or not isinstance(model, keras.Model) or not model.built:
        return [tuple(tensor.shape) for tensor in inputs]
    shapes: list[tuple[int | None, ...]] = []
    keras.tree.map_shape_structure(lambda shape: shapes.append(tuple(shape)), model.get_build_config() or {})
    return shapes


def _with_size(shape: tuple[int | None, ...], size: tuple[int, ...], first: int) -> tuple[int | None, ...]:
    """Fill in height and width where ``shape`` is dynamic; elsewhere they must match."""
    fixed = (*shape[:first], *size, *shape[first + len(size) :])
    if len(size) != len(shape) - 2 or any(old not in (None, new) for old, new in zip(shape, fixed, strict=True)):
        raise ModelError(f"input_size={size} does not fit the Keras model's input of shape {shape}")
    return fixed


def _input_name(model: Any) -> str:
    inputs = getattr(model, "inputs", None)
    return str(inputs[0].name).split(":")[0] if inputs else "images"


@contextlib.contextmanager
def _keras_extra() -> Iterator[None]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f'exporting a Keras model needs tensorflow and tf2onnx ({error}): pip install "fastcam[keras]"'
        ) from error


@contextlib.contextmanager
def _inlined_functions(tf: Any) -> Iterator[None]:
    """Inline nested functions while tracing: the converter does not look into calls (Keras' depthwise Conv)."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _convert_erfc(context: Any, node: Any, name: str, _: Any) -> None:
    """1 - erf(x): ONNX has only Erf, and TensorFlow writes GELU with Erfc."""
    one = context.make_const(f"{name}/one", np.array(1, np.float32))
    node.type = "Erf"
    context.insert_new_node_on_output("Sub", node.output[0], f"{name}/Sub", inputs=[one.output[0], node.output[0]])


@contextlib.contextmanager
def _whole_einsums() -> Iterator[None]:
    """Keep attention's Einsum as it is: the converter would expand it with sizes computed from the batch."""
    optimizers = importlib.import_module("tf2onnx.optimizer")._optimizers  # noqa: SLF001  # there is no option for it
    kept = dict(optimizers)
    optimizers.pop("einsum_optimizer", None)
    try:
        yield
    finally:
        optimizers.clear()
        optimizers.update(kept)


def _source_tensor(tensor: Any) -> Any:
    """Skip the Identity ops that the converter removes (Keras wraps swish in one)."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def _name_values(graph: Graph, tensors: dict[str, str]) -> dict[str, str]:
    """Name each value after the layer that computed it, and strip the converter's running numbers from all names.

    Returns the value of every layer; layers that pass a value through share it.
    """
    layer_of: dict[str, str] = {}
    for layer, tensor in tensors.items():
        layer_of.setdefault(tensor, layer)
    graph.prune()
    taken = set(graph.inputs)
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        for output in node.output:
            renamed[output] = _claim(layer_of.get(output) or _stem(output), taken)
        node.name = renamed[node.output[0]]
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            if name in graph.constants and name not in renamed:
                renamed[name] = _claim(f"{node.name}/{_INPUT_ROLES.get((node.op_type, index), index)}", taken)
    graph.rename_all(renamed)
    graph.infer_types()
    return {layer: renamed[tensor] for layer, tensor in tensors.items() if tensor in renamed}


# A scope around the model's own: its name (a private class's, say) may not be valid for an outermost scope.
_SCOPE = "model"


def _stem(output: str) -> str:
    """Return a converted value's name without the model's scope and the converter's running numbers."""
    return re.sub(rf"^{_SCOPE}/[^/]+/|(__\d+)?(:\d+)?$", "", output)


def _map_sizes(keras: Any, tensors: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Return height, width and channels of every layer's map. The converter may permute axes, not resize them."""
    if keras.config.image_data_format() != "channels_last":
        return {}
    shapes = {value: tuple(tensor.shape)[1:] for value, tensor in tensors.items() if tensor.shape.rank == 4}
    return {value: shape for value, shape in shapes.items() if all(isinstance(size, int) for size in shape)}


_INPUT_ROLES = {
    ("Conv", 1): "kernel",
    ("Conv", 2): "bias",
    ("MatMul", 1): "kernel",
    ("Add", 1): "bias",
}


def _claim(stem: str, taken: set[str]) -> str:
    """Return ``stem``, numbered if it is already in use, and reserve it."""
    name, number = stem, 1
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name)
    return name


def _guessed_preprocessing(graph: Graph, layers: dict[str, str]) -> Guess | None:
    """Return the preprocessing of the family of keras.applications whose network reads the image, if one does."""
    image = next(iter(graph.inputs.values())).shape
    sides = [side for side in image[1:3] if isinstance(side, int)]
    if len(sides) != 2:
        return None
    maps = {layer: graph.maps[value] for layer, value in layers.items() if value in graph.maps}
    for stem, family in find_families(maps, (sides[0], sides[1])):
        # The family's first layers must read the image directly.
        convolutions = [node for node in needed_nodes(graph, [layers[stem]]) if node.op_type == "Conv"]
        if len(convolutions) == family.convolutions:
            return family.guess
    return None
