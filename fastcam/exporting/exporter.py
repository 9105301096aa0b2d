"""`export`: one .onnx file that gives scores, activations and the gradients that explain them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FastcamError, ModelError
from ..files import check_writable
from ..graph import Graph, static_dims
from ..metadata import PRECISIONS, Metadata
from ..notes import Note
from ..preprocessing import Layout, Preprocessing
from .classifier import open_classifier
from .float16 import halve, round_weights
from .importers import ImportedModel, ImportOptions, ModelSource
from .importers.imported import image_layout
from .outputs import add_explanation, forward_outputs
from .pixels import find_preprocessing
from .trial import Trial
from .writer import write_model

PreprocessingSpec = str | Preprocessing | Mapping[str, Any]


@dataclass(frozen=True)
class ExportResult:
    """What `export` made.

    Attributes
    ----------
    path : Path
    layer : str
        The explained layer, the first of several.
    layers : tuple of str
        All explained layers.
    candidates : tuple of str
        Layers that could be explained, from the last to the first.
    classes : tuple of str or None
        Names by class index, None where they are not known.
    class_count : int
    input_name : str
    input_shape : tuple
        As the model takes images; a text is an open dimension.
    input_layout : "NHWC" or "NCHW"
    preprocessing : Preprocessing or None
        None: the file does not say how to turn a picture into the model's input.
    outputs : tuple of str
    bytes : int
        Size on disk, external data included.
    notes : tuple of Note
        What was done to the model, guessed about it, or left as it was: sentences, each with a ``kind``. They are also
        stored in the file.
    """

    path: Path
    layer: str
    layers: tuple[str, ...]
    candidates: tuple[str, ...]
    classes: tuple[str, ...] | None
    class_count: int
    input_name: str
    input_shape: tuple[int | str | None, ...]
    input_layout: Layout
    preprocessing: Preprocessing | None
    outputs: tuple[str, ...]
    bytes: int
    notes: tuple[Note, ...]


def export(
    model: ModelSource,
    path: str | os.PathLike[str],
    *,
    layer: str | Sequence[str] | None = None,
    output: str | None = None,
    input_size: tuple[int, int] | None = None,
    example_input: Any = None,
    token_grid: tuple[int, int] | None = None,
    classes: Sequence[str] | str | os.PathLike[str] | None = None,
    preprocess: PreprocessingSpec | None = None,
    gradients: str = "pooled",
    precision: str = "fp32",
    custom_objects: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Write a classifier as an ONNX file that explains itself.

    The file runs in any ONNX runtime. Inputs: the images, and optionally ``target`` (N,K) int64, the classes to explain
    (absent or -1: the top one). Outputs: ``logits`` (N,classes) before softmax or sigmoid, ``activations`` (N,C,h,w) of
    the explained layer, ``weights`` (N,K,C), the mean over h,w of d logits[n,target] / d activations (Selvaraju et al.
    2017, eq. 1), all float32. The same model and arguments give the same bytes.

    Parameters
    ----------
    model : keras.Model, torch.nn.Module, onnx.ModelProto, or path
        A path ends in .keras, .h5 or .onnx.
    path : path
        The .onnx file to write; replaced only once the new one is complete. Above 2 GB the weights go to a file of
        their own beside it, ``path`` + ".<hash>.data".
    layer : str or sequence of str, optional
        The layer to explain: a Keras layer, path of a torch module ("layer4.1"), ONNX value or node name. By default
        the last one with a spatial map, after its activation. Several layers are explained in one file: the first by
        the outputs above, the next ones by ``activations_1`` and ``weights_1``, ``activations_2`` and ``weights_2`` ...
    output : str, optional
        The output that holds the scores, for models with several.
    input_size : (int, int), optional
        Height and width of the images, in pixels, for a model that leaves them open.
    example_input : torch.Tensor, optional
        An image batch (N,3,H,W) to trace a torch module with.
    token_grid : (int, int), optional
        Patches along height and width, for a layer of a transformer, (N,tokens,C), where the model does not tell: the
        patches come last, row by row, after class and register tokens.
    classes : sequence of str, or path, optional
        Names by class index; a path names a UTF-8 text file of one name a line. By default those that `finetune`
        stored in its file.
    preprocess : str, Preprocessing, or mapping, optional
        How a picture becomes the model's input: "vgg16", "imagenet", "scale", "symmetric", "none", or a mapping of
        order, mean and scale. By default it is what `finetune` stored in its file, or taken from architectures that
        fastcam knows (keras.applications VGG16 and VGG19), and is "none" where the model itself starts with the
        arithmetic.
    gradients : {"pooled", "full"}
        "full" adds the output ``gradients`` (N,K,C,h,w), d logits[n,target] / d activations, for every layer.
    precision : {"fp32", "fp16"}
        "fp16" lets the network compute in float16, for GPUs: half the file, and half the memory traffic. Inputs,
        outputs and the gradients, those of the float16 network, stay float32, and so does what float16 would harm
        (`float16.FLOAT32_OPS`).
    custom_objects : mapping of str to class or function, optional
        Layers and functions of your own that a Keras file names.
    inputs : mapping of str to array, optional
        Values of the model's inputs apart from the image (age, metadata), by name; they become constants of the file.

    Returns
    -------
    ExportResult

    Raises
    ------
    ModelError
        The model cannot be read, or is no classifier of one image. Subclasses: LayerError (no such layer, or no
        spatial map), UnsupportedOpError (no gradient rule for an op between the layer and the logits).
    ArgumentError
        Another argument is wrong.
    MissingExtraError
        A Keras model, and tensorflow or tf2onnx is not installed; a torch module, and torch or onnxscript is not.
    WriteError
        The file cannot be written; an older one of that name is left as it was.

    Examples
    --------
    >>> result = fastcam.export(keras_model, "dogs.onnx", classes=["beagle", "pug"])  # doctest: +SKIP
    """
    destination = Path(path)
    layers = _layer_names(layer)
    if destination.suffix.lower() != ".onnx":
        raise ArgumentError(f"export path {str(path)!r} must end in .onnx")
    if gradients not in tuple(_GRADIENTS):
        raise ArgumentError(f"gradients={gradients!r} is not known; choose one of {', '.join(map(repr, _GRADIENTS))}")
    if precision not in tuple(PRECISIONS):
        raise ArgumentError(f"precision={precision!r} is not known; choose one of {', '.join(map(repr, PRECISIONS))}")
    for name, sides in (("input_size", input_size), ("token_grid", token_grid)):
        if sides is not None and not _is_size(sides):
            raise ArgumentError(f"{name}={sides!r}: give (height, width), at least 1 each")
    chosen_preprocessing = None if preprocess is None else Preprocessing.of(preprocess)
    names = _class_names(classes)
    check_writable(destination)

    with _understood():
        classifier = open_classifier(
            model, layers, ImportOptions(output, input_size, example_input, custom_objects, inputs), token_grid
        )
        graph, imported = classifier.graph, classifier.imported
        names = list(imported.classes) if names is None and imported.classes is not None else names
        class_count = _class_count(graph, names)
        layout = _input_layout(graph, imported)
        notes = _notes(imported, precision)
        preprocessing = chosen_preprocessing or imported.preprocessing
        if preprocessing is None:
            preprocessing, guesses = find_preprocessing(graph, _channels(graph, layout), imported.guess)
            notes += guesses
        _check_channels(graph, layout, preprocessing)
        if precision == "fp16":
            notes += round_weights(graph)
        add_explanation(graph, classifier.layers, full=_GRADIENTS[gradients])
        graph.prune()
        graph.infer_types()
        if precision == "fp16":
            halve(graph, forward_outputs(classifier.layers))

    input_name = next(iter(graph.inputs))
    metadata = Metadata(
        layers=tuple(classifier.layers),
        candidates=tuple(classifier.candidates),
        classes=None if names is None else tuple(names),
        input_layout=layout,
        preprocessing=preprocessing,
        score_activation=classifier.score_activation,
        framework=imported.framework,
        precision=precision,
        notes=tuple(notes),
    )
    trial = Trial(input_name, graph.shape(input_name), classifier.score_activation, precision, imported.sample)

    def complete(path: Path) -> dict[str, str]:
        nonlocal metadata
        metadata = dataclasses.replace(metadata, notes=(*metadata.notes, *trial.run(path)))
        return metadata.to_properties()

    size = write_model(graph, destination, {}, complete)
    return ExportResult(
        path=destination,
        layer=metadata.layers[0],
        layers=metadata.layers,
        candidates=metadata.candidates,
        classes=metadata.classes,
        class_count=class_count,
        input_name=input_name,
        input_shape=graph.shape(input_name),
        input_layout=layout,
        preprocessing=metadata.preprocessing,
        outputs=tuple(graph.outputs),
        bytes=size,
        notes=metadata.notes,
    )


def _layer_names(layer: object) -> list[str | None]:
    if layer is None or isinstance(layer, str):
        return [layer]
    names = list(layer) if isinstance(layer, Iterable) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            f"layer={layer!r}: give the name of a layer, a list of names, or None for the last one with a map"
        )
    return [str(name) for name in names]


def _notes(imported: ImportedModel, precision: str) -> list[Note]:
    return [note for note in imported.notes if precision == "fp32" or note.kind != "widened"]


def _is_size(size: object) -> bool:
    return (
        isinstance(size, tuple | list) and len(size) == 2 and all(type(length) is int and length > 0 for length in size)
    )


def _class_names(classes: Sequence[str] | str | os.PathLike[str] | None) -> list[str] | None:
    if classes is None:
        return None
    if isinstance(classes, str | os.PathLike):
        try:
            # Editors put a mark before the first line, and an empty one after the last.
            return Path(classes).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except (OSError, ValueError) as error:
            raise ArgumentError(f"classes={str(classes)!r} is not a readable UTF-8 text file: {error}") from error
    if not isinstance(classes, Iterable):
        raise ArgumentError(f"classes={classes!r}: give a list of names, or the path of a text file")
    items: list[object] = list(classes)
    names = [item for item in items if isinstance(item, str) and item.isprintable()]
    if len(names) != len(items):
        wrong = next(item for item in items if not isinstance(item, str) or not item.isprintable())
        raise ArgumentError(f"classes must be names, got {wrong!r} ({type(wrong).__name__})")
    return names


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Turn what a malformed model makes Python raise into a ModelError; errors with a reason of their own pass."""
    try:
        yield
    except (FastcamError, KeyboardInterrupt):
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model is malformed, or of a kind that fastcam does not know ({type(error).__name__}: {error}). "
            "Check it with onnx.checker.check_model(model, full_check=True)"
        ) from error


def _check_channels(graph: Graph, layout: Layout, preprocessing: Preprocessing | None) -> None:
    """Refuse a preprocessing that would fail at the first picture."""
    if (
        _channels(graph, layout) == 1
        and preprocessing
        and (len(set(preprocessing.mean)) > 1 or len(set(preprocessing.scale)) > 1)
    ):
        raise ArgumentError(
            f"the model takes greyscale images, and {preprocessing} differs between red, green and blue"
        )


def _channels(graph: Graph, layout: Layout) -> int:
    (channels,) = static_dims(graph, next(iter(graph.inputs)), [layout.index("C")])
    return channels


def _class_count(graph: Graph, names: Sequence[str] | None) -> int:
    (count,) = static_dims(graph, graph.outputs[0], [1])
    if names is not None and len(names) != count:
        raise ArgumentError(f"{len(names)} class names for a model of {count} classes")
    return count


def _input_layout(graph: Graph, imported: ImportedModel) -> Layout:
    """Return where the channels are: by the weights, else the axis of size 1 or 3, else as the framework has them."""
    shape = next(iter(graph.inputs.values())).shape
    fits: dict[Layout, bool] = {"NCHW": shape[1] in (1, 3), "NHWC": shape[3] in (1, 3)}
    habits: list[Layout] = ["NHWC", "NCHW"] if imported.framework == "keras" else ["NCHW", "NHWC"]
    layout = image_layout(graph) or next((habit for habit in habits if fits[habit]), None)
    if layout is None:
        raise ModelError(f"the input has shape {shape}: neither axis 1 nor axis 3 holds 1 or 3 channels of an image")
    return layout


_GRADIENTS = {"pooled": False, "full": True}
