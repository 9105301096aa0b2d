"""`export`: one .onnx file that gives scores, activations and the gradients that explain them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import (
    check_classes,
    check_flag,
    check_lengths,
    check_names,
    check_pair,
    check_path,
    check_text,
    checked,
    optional,
)
from ..errors import ArgumentError, FastcamError, ModelError
from ..files import check_writable
from ..graph import Graph, static_dims
from ..labels import class_names
from ..metadata import EVIDENCE, FITS, IMAGE_GRADIENTS, PRECISIONS, SCORE_ACTIVATIONS, SCORES, Metadata
from ..notes import Note
from ..preprocessing import CONTENTS, LAYOUTS, Layout, Preprocessing
from .classifier import Classifier, open_classifier
from .drawing import DrawingPlan
from .evidence import BUILDERS, add_evidence
from .expectation import NO_SELFTEST, expect
from .float16 import halve, round_weights
from .importers import ImportedModel, ImportOptions, ModelSource
from .importers.imported import image_layout
from .outputs import Asked, add_explanation, forward_outputs
from .pixels import find_preprocessing
from .probabilities import Settled, settle_names, settle_scores
from .score_kinds import ScoreRequest
from .trial import Trial
from .writer import write_model

PreprocessingSpec = str | Preprocessing | Mapping[str, Any]


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes
    ----------
    path : Path
    layer : str
        The explained layer, the first of several; "" for a file without gradients.
    layers : tuple of str
        All explained layers.
    candidates : tuple of str
        Layers that could be explained, from the last to the first.
    classes : tuple of str or None
        Names by class index, None if they are unknown.
    class_count : int
    input_name : str
    input_shape : tuple
        As the model takes images; a string is a dynamic dimension.
    input_layout : "NHWC" or "NCHW"
    preprocessing : Preprocessing or None
        None if the file does not say how to turn a picture into the model's input.
    outputs : tuple of str
    bytes : int
        Size on disk, external data included.
    notes : tuple of Note
        What was changed, guessed or left unchanged: sentences, each with a ``kind``. They are also
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


@checked(
    path=check_path,
    layer=optional(check_names),
    output=optional(check_text),
    input_size=optional(check_lengths),
    token_grid=optional(check_pair),
    classes=optional(check_classes),
    score=check_text,
    fit=optional(check_text),
    gradients=optional(check_text),
    evidence=check_names,
    precision=check_text,
    draw=optional(check_text),
    method=check_text,
    signed=check_flag,
    picture=optional(check_text),
    target=check_text,
    raw_outputs=check_flag,
    contrast=check_flag,
    score_activation=optional(check_text),
)
def export(
    model: ModelSource,
    path: str | os.PathLike[str],
    *,
    layer: str | Sequence[str] | None = None,
    output: str | None = None,
    input_size: tuple[int, ...] | None = None,
    example_input: Any = None,
    token_grid: tuple[int, int] | None = None,
    classes: Sequence[str] | Mapping[Any, Any] | str | os.PathLike[str] | None = None,
    preprocess: PreprocessingSpec | None = None,
    score: str = "classes",
    fit: str | None = None,
    gradients: str | None = None,
    evidence: str | Sequence[str] = (),
    precision: str = "fp32",
    score_activation: str | None = None,
    draw: str | None = None,
    method: str = "gradcam",
    signed: bool = False,
    picture: str | None = None,
    target: str = "default",
    raw_outputs: bool = False,
    contrast: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Write a network as an ONNX file that explains itself: a classifier, regression, segmenter or detector.

    The file runs in any ONNX runtime. Inputs: the images, and optionally ``target`` (N,K) int64, the classes to explain
    (absent or -1: the top one). Outputs: ``logits`` (N,classes) before softmax or sigmoid, ``activations`` (N,C,h,w) of
    the explained layer, ``weights`` (N,K,C), the mean over h,w of d logits[n,target] / d activations (Selvaraju et al.
    2017, eq. 1), all float32. The same model and arguments give the same bytes.

    Parameters
    ----------
    model : keras.Model, torch.nn.Module, onnx.ModelProto, or path
        A path ends in .keras, .h5, .hdf5, .onnx or .pt (TorchScript), or names a SavedModel folder.
    path : path
        The .onnx file to write; replaced only once the new one is complete. Above 2 GB the weights go to a file of
        their own in the same folder, ``path`` + ".<hash>.data".
    layer : str or sequence of str, optional
        The layer to explain: a Keras layer, path of a torch module ("layer4.1"), ONNX value or node name. By default
        the last one with a spatial map, after its activation. Several layers are explained in one file: the first by
        the outputs above, the next ones by ``activations_1`` and ``weights_1``, ``activations_2`` and ``weights_2`` ...
    output : str, optional
        The output that holds the scores, for models with several; or any value inside the model.
    input_size : tuple of int, optional
        Height and width of the images, in pixels, for a model with dynamic ones; (time,) of series, and (depth, height,
        width) of volumes.
    example_input : torch.Tensor, optional
        A batch to trace a torch module with: images (N,3,H,W), series (N,C,T) or volumes (N,C,D,H,W).
    token_grid : (int, int), optional
        Patches along height and width, for a layer of a transformer, (N,tokens,C), where the model does not determine
        it: the patches come last, row by row, after class and register tokens.
    classes : sequence of str, mapping, or path, optional
        Names by class index: a list; a mapping of indices to names or of names to indices (``id2label``,
        ``class_indices``); or the path of a UTF-8 file with one name per line, or with one of these as JSON. A binary
        classifier with one score takes two names, or one for class 1. By default the names stored in the model by
        `finetune`, Ultralytics, Custom Vision or Hugging Face.
    preprocess : str, Preprocessing, or mapping, optional
        How a picture becomes the model's input: a name that `Preprocessing.of` knows, or a mapping of order, mean and
        scale. By default it is what `finetune` stored in its file; "none" where the model itself starts with
        arithmetic that makes sense only for pixels of 0..255; or a guess, which ``notes`` explain: what the published
        weights of the model's architecture expect (keras.applications, torchvision, timm). Otherwise it is unknown,
        and only preprocessed batches can be explained.
    score : {"classes", "values", "segmentation", "boxes", "embedding"}
        What the model's outputs mean, and so what a target is:

        - "classes": a class. The softmax or sigmoid at the end is removed.
        - "values": a number (N,M) of a regression, as it is; ``classes`` names them.
        - "segmentation": a class of one score per pixel, (N,C,H,W) or (N,H,W,C). Its score is the mean logit over the
          pixels where it is predicted (SEG-GRAD-CAM, Vinogradova et al. 2020). The default layer is the last of the
          smallest maps.
        - "boxes": a box of a detector, (anchor, class), before any suppression: see `fastcam.Explainer`. Its score is
          the class's logit; with an objectness, that of the product. Layouts: YOLOv5 to v11, YOLOX, v10 and
          other sorted ones, DETR, SSD, and files that end in NonMaxSuppression. The default layers are the maps that
          the heads read; ``layer="context"`` is the end of the backbone.
        - "embedding": the cosine similarity of the output (N,D) to references, given at the call.
    fit : {"stretch", "letterbox"}, optional
        How pictures of other proportions become the input: stretched; or scaled as a whole, and surrounded by grey
        (the default for boxes).
    gradients : {"none", "pooled", "full", "image"}, optional
        "full" (the default for boxes) adds the output ``gradients`` (N,K,C,h,w), d logits[n,target] / d activations,
        for every layer. "image" also adds ``image_gradients`` (N,K, and the image's axes), d logits[n,target] /
        d image, which methods at the image need. "none" writes only the scores, of any model with scores, also where no
        layer has a map or an op has no gradient: methods that ask for nothing else, "rise" and "occlusion", explain it.
    evidence : str or sequence of str
        Further outputs, which single methods need: "guided_gradients" (N,K, and the image's axes) for "guidedbackprop"
        and "guidedgradcam", in networks with ReLU; "bias_maps" (N,K,H,W) for "fullgrad"; in transformers whose tokens
        all attend to each other "rollout_maps" (N,K,h,w) for "attentionrollout", and "legrad_maps" (N,K,h,w) for
        "legrad"; "curvatures" (N,K,C) for "shapleycam"; and "image_gradients", as with ``gradients="image"``.
    precision : {"fp32", "fp16"}
        "fp16" makes the network compute in float16, for GPUs: half the file size and half the memory traffic.
        Inputs, outputs and gradients (those of the float16 network) stay float32, and so do ops that float16 would harm
        (`float16.FLOAT32_OPS`).
    score_activation : {"softmax", "sigmoid", "none", "probabilities"}, optional
        What turns the scores into probabilities, for a model that ends in raw scores: "softmax" if exactly one class
        applies to an image, "sigmoid" if several may apply or for one score of a binary classifier, "probabilities" if
        the scores are probabilities already, "none" for no probabilities. By default the softmax or sigmoid at the end
        of the model, which is removed; where there is none, no probabilities are shown. One score z with "sigmoid"
        becomes two logits (-z, z), whose sigmoids add up to 1, so that both classes can be explained.
    draw : {None, "heatmaps", "overlays"}
        Draw in the graph, so that any ONNX runtime needs one run and no fastcam code. "heatmaps" replaces
        ``activations`` and ``weights`` by ``maps`` (N,K,h,w), the weighted sum over channels, and ``heatmaps``
        (N,K,H,W) float32 of the input's size: its positive part, divided by its maximum and resized bilinearly, 0..1.
        "overlays" adds ``overlays`` (N,K,H,W,3) uint8: the heatmaps in colour (jet), blended half and half over
        the pictures.
    method : str
        How to draw: "gradcam", "gradcam++", "xgradcam", "hirescam" or "layercam".
    signed : bool
        Whether to keep the evidence against a class: heatmaps of -1..1, divided by the largest magnitude.
    picture : {None, "input", "any"}
        Let a file that draws take uint8 ``pictures`` (N,H,W,3), RGB, instead of preprocessed floats: of the input's
        size, or of any size, resized in the graph within one level of Pillow's antialiased bilinear filter.
    target : {"default", "required"}
        "default" lets callers omit ``target``, as an input with a default value, which only ONNX Runtime fully
        supports: several other runtimes then always explain the top class. "required" makes it an ordinary input. A
        class that does not exist then fails alone: its entry of ``targets`` is -1 and its heatmap is NaN.
    raw_outputs : bool
        Whether a file that draws also gives ``activations``, ``weights`` and, with ``gradients="full"``,
        ``gradients``.
    contrast : bool
        Whether a file that draws has one heatmap per image, (N,1,H,W): that of the first target rather than the others,
        y_1 - mean(y_2 .. y_K). With one target it is that target's. For "gradcam", "xgradcam" and "hirescam".
    custom_objects : mapping of str to class or function, optional
        Your own layers and functions that a Keras file names.
    inputs : mapping of str to array, optional
        Values of the model's inputs apart from the image (age, metadata), by name; they become constants of the file.

    Returns
    -------
    ExportResult

    Raises
    ------
    ModelError
        The model cannot be read, or its outputs do not fit ``score``. Subclasses: LayerError (no such layer, or no
        spatial map), UnsupportedOpError (no gradient rule for an op between the layer and the logits).
    ArgumentError
        Another argument is wrong.
    MissingExtraError
        A package that the model needs is not installed: tensorflow or tf2onnx for Keras, torch or onnxscript for torch.
    WriteError
        The file cannot be written; an existing one of that name is left untouched.

    Examples
    --------
    >>> result = fastcam.export(keras_model, "dogs.onnx", classes=["beagle", "pug"])  # doctest: +SKIP
    """
    destination = Path(path)
    layers = _layer_names(layer)
    if destination.suffix.lower() != ".onnx":
        raise ArgumentError(f"export path {str(path)!r} must end in .onnx")
    _check_choice("score", score, SCORES)
    _check_choice("fit", fit, (None, *FITS))
    _check_choice("gradients", gradients, (None, *_GRADIENTS))
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("score_activation", score_activation, (None, *SCORE_ACTIVATIONS))
    plan = DrawingPlan(draw, method, signed, picture, target, raw_outputs, contrast)
    has_boxes = score == "boxes"
    gradients, fit = gradients or ("full" if has_boxes else "pooled"), fit or ("letterbox" if has_boxes else "stretch")
    outputs, gradients = _wanted_outputs(evidence, gradients)
    _check_kind(score, fit, precision, draw, gradients, layers)
    _check_evidence(outputs, score, precision, draw, gradients)
    chosen_preprocessing = None if preprocess is None else Preprocessing.of(preprocess)
    names = None if classes is None else class_names(classes)
    check_writable(destination)

    name_count = None if names is None else len(names)
    known = name_count if score == "classes" else None
    options = ImportOptions(output, input_size, example_input, known, custom_objects, inputs, all_outputs=has_boxes)
    with _understood():
        request = ScoreRequest(score, score_activation, name_count, name_count is not None)
        classifier = open_classifier(model, layers, options, token_grid, request, wants_layers=gradients != "none")
        graph, imported = classifier.graph, classifier.imported
        names, notes = _known_names(names, classifier)
        scores = _settle(classifier, score, score_activation, names)
        class_count = _class_count(classifier)
        layout = _input_layout(graph, imported)
        if len(layout) != 4:
            _check_signals(layout, score, outputs, draw or picture, preprocess)
        preprocessing, guesses = _preprocessing(chosen_preprocessing, classifier, layout)
        notes += [*_notes(imported, precision), *scores.notes, *guesses]
        _check_channels(graph, layout, preprocessing)
        plan.check(classifier.layers, preprocessing)
        if precision == "fp16":
            notes += round_weights(graph)
        _explain(classifier, outputs, gradients, plan, layout, token_grid)
        graph.prune()
        graph.infer_types()
        if precision == "fp16":
            halve(graph, forward_outputs(classifier.layers))
        plan.apply(graph, layout, preprocessing)

    input_name = next(name for name in graph.inputs if name != "target")
    metadata = Metadata(
        layers=tuple(classifier.layers),
        candidates=tuple(classifier.candidates),
        classes=None if scores.names is None else tuple(scores.names),
        input_layout=layout if plan.picture is None else "NHWC",
        preprocessing=preprocessing,
        score_activation=scores.activation,
        framework=imported.framework,
        precision=precision,
        notes=tuple(notes),
        method=plan.method if plan.draw else None,
        signed=plan.signed,
        picture=plan.picture,
        contrast=plan.contrast,
        score=score,
        fit=fit,
        box_classes=classifier.scores.class_count or 0,
        mask_size=classifier.scores.mask_size,
        evidence=outputs,
        map_shapes=tuple(classifier.map_shapes),
    )
    trial = Trial(
        input_name,
        graph.shape(input_name),
        classifier.score_activation,
        precision,
        takes_target=plan.target == "required",
        sample=imported.sample if score in ("classes", "values") else None,
        layers=classifier.layers if score in ("classes", "values") and "weights" in graph.outputs else (),
    )
    metadata, size = _write(graph, destination, metadata, trial)
    return ExportResult(
        path=destination,
        layer=next(iter(metadata.layers), ""),
        layers=metadata.layers,
        candidates=metadata.candidates,
        classes=metadata.classes,
        class_count=class_count,
        input_name=input_name,
        input_shape=graph.shape(input_name),
        input_layout=metadata.input_layout,
        preprocessing=metadata.preprocessing,
        outputs=tuple(graph.outputs),
        bytes=size,
        notes=metadata.notes,
    )


def _explain(
    classifier: Classifier,
    outputs: Sequence[str],
    gradients: str,
    plan: DrawingPlan,
    layout: Layout,
    grid: tuple[int, int] | None,
) -> None:
    """Add the target, and the outputs that explain its scores, to the classifier's graph."""
    graph, table = classifier.graph, classifier.scores.table
    image = next(iter(graph.inputs))
    targets = add_explanation(
        graph,
        classifier.layers,
        full=gradients == "full" or plan.needs_gradients,
        image=image if IMAGE_GRADIENTS in outputs else None,
        required=plan.target == "required",
        table=table,
    )
    further = [name for name in outputs if name in BUILDERS]
    add_evidence(graph, further, Asked(graph.outputs[0], table, *targets, image, layout, grid))


def _write(graph: Graph, destination: Path, metadata: Metadata, trial: Trial) -> tuple[Metadata, int]:
    """Write the file once a trial run has passed; return the metadata, completed by what that showed, and the bytes."""
    selftest = expect(graph, destination.parent, metadata) if metadata.method else None
    properties = selftest.to_properties() if selftest else {}
    if metadata.method and selftest is None:
        metadata = dataclasses.replace(metadata, notes=(*metadata.notes, NO_SELFTEST))

    def complete(path: Path) -> dict[str, str]:
        nonlocal metadata
        # Files that take pictures have been run for their self-test.
        notes = trial.run(path) if metadata.picture is None else []
        metadata = dataclasses.replace(metadata, notes=(*metadata.notes, *notes))
        return metadata.to_properties() | properties

    size = write_model(graph, destination, {}, complete)
    return metadata, size


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise ArgumentError(f"{name}={value!r} is not known; choose one of {known}")


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


def _check_kind(
    score: str, fit: str, precision: str, draw: str | None, gradients: str, layers: Sequence[str | None]
) -> None:
    """Reject combinations that no file can have."""
    if draw is not None and (score, fit) != ("classes", "stretch"):
        raise ArgumentError(
            f"draw={draw!r} draws the heatmaps of classes, over stretched pictures: omit it for score={score!r}, "
            f"fit={fit!r}"
        )
    if score == "boxes" and precision != "fp32":
        raise ArgumentError(f'precision={precision!r}: a file with score="boxes" computes in fp32')
    if gradients == "none" and (list(layers) != [None] or draw is not None or score not in ("classes", "values")):
        raise ArgumentError(
            'gradients="none" writes the scores of classes or values, and no layer: omit layer= and draw=, or give '
            "another gradients="
        )


def _wanted_outputs(evidence: str | Sequence[str], gradients: str) -> tuple[tuple[str, ...], str]:
    """Return the further outputs that are asked for, in the order of `EVIDENCE`, and the gradients of the layers."""
    names = [evidence] if isinstance(evidence, str) else list(evidence)
    for name in names:
        _check_choice("evidence", name, tuple(EVIDENCE))
    if gradients == "image":
        names, gradients = [*names, IMAGE_GRADIENTS], "full"
    return tuple(name for name in EVIDENCE if name in names), gradients


def _check_evidence(outputs: Sequence[str], score: str, precision: str, draw: str | None, gradients: str) -> None:
    """Reject combinations of further outputs that no file can have."""
    if not outputs:
        return
    asked = " and ".join('gradients="image"' if name == IMAGE_GRADIENTS else f"evidence={name!r}" for name in outputs)
    if precision != "fp32" or draw is not None:
        raise ArgumentError(f"{asked} is for files that compute in fp32 and do not draw: omit precision= and draw=")
    if gradients == "none":
        raise ArgumentError(f'{asked} needs gradients, which gradients="none" leaves out: omit one of them')
    for name in ("legrad_maps", "curvatures"):
        if name in outputs and score not in ("classes", "values"):
            raise ArgumentError(f"evidence={name!r} is for classes and values: omit it for score={score!r}")


def _settle(classifier: Classifier, score: str, wanted: str | None, names: list[str] | None) -> Settled:
    """Return the activation and names of the scores; boxes hold probabilities."""
    if score == "classes":
        return settle_scores(classifier.graph, classifier.score_activation, wanted, names)
    if wanted is not None and score != "boxes":
        raise ArgumentError(f"score_activation={wanted!r}: scores of kind {score!r} have no probabilities: omit it")
    return settle_names("probabilities" if score == "boxes" else "none", names, _class_count(classifier))


def _class_count(classifier: Classifier) -> int:
    return classifier.scores.class_count or static_dims(classifier.graph, classifier.graph.outputs[0], [1])[0]


def _known_names(names: list[str] | None, classifier: Classifier) -> tuple[list[str] | None, list[Note]]:
    """Return the caller's class names, or the model's own if there is one for each score."""
    imported = classifier.imported
    if names is not None or imported.classes is None:
        return names, []
    count = _class_count(classifier)
    if len(imported.classes) != count and (len(imported.classes), count) != (2, 1):
        text = f"The model holds {len(imported.classes)} class names for {count} scores: they were ignored."
        return None, [Note("classes", text)]
    return list(imported.classes), []


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Turn Python errors caused by a malformed model into a ModelError; let errors of fastcam pass."""
    try:
        yield
    except (FastcamError, KeyboardInterrupt):
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model is malformed, or of a kind that fastcam does not support ({type(error).__name__}: {error}). "
            "Check it with onnx.checker.check_model(model, full_check=True)"
        ) from error


def _preprocessing(
    chosen: Preprocessing | None, classifier: Classifier, layout: Layout
) -> tuple[Preprocessing | None, list[Note]]:
    """Return how a picture becomes the input, and notes on it if it was guessed."""
    known = chosen or classifier.imported.preprocessing
    if known is not None or len(layout) != 4:
        return known, []
    return find_preprocessing(classifier.graph, _channels(classifier.graph, layout), classifier.imported.guess)


def _check_channels(graph: Graph, layout: Layout, preprocessing: Preprocessing | None) -> None:
    """Reject a preprocessing that would fail on the first picture."""
    if (
        _channels(graph, layout) == 1
        and preprocessing
        and (len(set(preprocessing.mean)) > 1 or len(set(preprocessing.scale)) > 1)
    ):
        raise ArgumentError(
            f"the model takes greyscale images, but {preprocessing} differs between red, green and blue"
        )


def _channels(graph: Graph, layout: Layout) -> int:
    (channels,) = static_dims(graph, next(iter(graph.inputs)), [layout.index("C")])
    return channels


def _input_layout(graph: Graph, imported: ImportedModel) -> Layout:
    """Return the channel axis: by the weights, else the axis of size 1 or 3, else the framework's default."""
    shape = next(iter(graph.inputs.values())).shape
    layouts = LAYOUTS[len(shape)]
    habits = reversed(layouts) if imported.framework == "keras" else layouts
    layout = image_layout(graph) or next((habit for habit in habits if shape[habit.index("C")] in (1, 3)), None)
    if layout is None:
        last = len(shape) - 1
        raise ModelError(
            f"the input has shape {shape}: neither axis 1 nor axis {last} holds 1 or 3 channels of an image"
        )
    return layout


def _check_signals(layout: Layout, score: str, outputs: Sequence[str], drawing: str | None, preprocess: object) -> None:
    """Reject what only files that take pictures can have."""
    contents = CONTENTS[len(layout)]
    if score not in ("classes", "values"):
        raise ArgumentError(f"the model takes {contents}: score={score!r} is for models that take pictures")
    if outputs or drawing is not None or preprocess is not None:
        raise ArgumentError(
            f"the model takes {contents}: preprocess=, draw=, picture= and outputs for single methods are for models "
            "that take pictures: omit them"
        )


_GRADIENTS = ("none", "pooled", "full", "image")
