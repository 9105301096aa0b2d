"""What an explained model's file says about itself: the only module that knows the metadata keys."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from .errors import ArgumentError, FileFormatError
from .notes import Note
from .preprocessing import Layout, Preprocessing

FORMAT_VERSION = "1"
# Files that draw their own heatmaps or take pictures: readers of version 1 would miss outputs or misread the input.
DRAWING_VERSION = "2"
# Files whose scores are not those of classes, or whose pictures keep their proportions.
SCORES_VERSION = "3"
# Files without layers and gradients, which older readers would expect.
SCORES_ONLY_VERSION = "4"
# Files that take series or volumes.
SIGNALS_VERSION = "5"
READABLE_VERSIONS = (FORMAT_VERSION, DRAWING_VERSION, SCORES_VERSION, SCORES_ONLY_VERSION, SIGNALS_VERSION)

# Ranks that the input `target` can request: -1 the top class, -2 the second. TensorRT sorts at most 3840 classes, and
# nobody looks at a hundred maps.
MAXIMUM_RANK = 100

# A larger fixed batch is a mistake or an attack: `target` alone would fill the memory.
LARGEST_BATCH = 2**16

PRECISIONS = ("fp32", "fp16")

# Sizes of the uint8 pictures that a file may take: the model's input size, or any.
PICTURES = ("input", "any")

# What turns logits into probabilities. "probabilities": the logits are probabilities already; "none": unknown.
SCORE_ACTIVATIONS = ("softmax", "sigmoid", "none", "probabilities")

# What is explained: a class of the picture, a value, the region of a class, a box, or the similarity to a reference.
SCORES = ("classes", "values", "segmentation", "boxes", "embedding")

# Inputs that some kinds of scores have besides the images and the target: regions to explain instead of the predicted
# ones, and embeddings to compare with.
MASK, REFERENCE = "mask", "reference"

# How a picture of other proportions becomes the input: stretched, or scaled as a whole and surrounded by grey.
FITS = ("stretch", "letterbox")

_PREFIX = "fastcam."
_LARGEST_SIDE = 2**15


# Outputs for single methods, which run the model again, and their ranks: the session for other methods leaves them out.
# The gradients of the scores in the model's input; those of guided backpropagation; the maps of FullGrad; attention
# rollout; LeGrad; and the second-order term of Shapley-CAM.
IMAGE_GRADIENTS = "image_gradients"
EVIDENCE = {
    IMAGE_GRADIENTS: 5,
    "guided_gradients": 5,
    "bias_maps": 4,
    "rollout_maps": 4,
    "legrad_maps": 4,
    "curvatures": 3,
}


class LayerOutputs(NamedTuple):
    """Names of the outputs of one explained layer."""

    activations: str
    weights: str
    gradients: str


def layer_outputs(position: int) -> LayerOutputs:
    """Return the outputs of layer number ``position``: the first has plain names, the next ones a number."""
    suffix = f"_{position}" if position else ""
    return LayerOutputs(*(f"{name}{suffix}" for name in LayerOutputs._fields))


@dataclass(frozen=True)
class Metadata:
    """Facts about an explained model that its graph does not contain.

    Attributes
    ----------
    layers : tuple of str
        The explained layers, by the names that they had in the source model; none in a file that gives only scores.
    candidates : tuple of str
        Layers that could have been explained, from the last to the first.
    classes : tuple of str or None
        Names by index.
    input_layout : "NHWC" or "NCHW"
    preprocessing : Preprocessing or None
        None if it is unknown how a picture becomes the model's input.
    score_activation : {"softmax", "sigmoid", "none", "probabilities"}
        What turns the logits into probabilities, see `SCORE_ACTIVATIONS`.
    framework : str
        Where the model came from: "keras" or "onnx".
    precision : {"fp32", "fp16"}
        What the network computes in; its gradients are always float32.
    notes : tuple of Note
        What `export` changed, guessed or left unchanged.
    method : str or None
        The method by which the file draws its own ``maps`` and ``heatmaps``; None if it draws none.
    signed : bool
        Whether ``heatmaps`` keep the evidence against a class: -1..1 instead of 0..1.
    picture : {None, "input", "any"}
        Whether the input is uint8 pictures (N,H,W,3), and their size.
    contrast : bool
        Whether the file draws one heatmap per image, of the first target rather than the others.
    score : {"classes", "values", "segmentation", "boxes", "embedding"}
        What a target is.
    fit : {"stretch", "letterbox"}
        How pictures of other proportions than the input's are fitted to it.
    box_classes : int
        Number of classes of a detector, whose table of scores has an entry for each anchor and class; else 0.
    mask_size : (int, int) or None
        Height and width of the scores of a segmentation, and so of the input ``mask``.
    evidence : tuple of str
        The outputs for single methods that the file has, see `EVIDENCE`.
    map_shapes : tuple of tuple of int
        Of each layer of a network for series or volumes: the shape of its map, (t,) or (d,h,w). The outputs hold
        (N,C,1,t) and (N,C,d*h,w).
    """

    layers: tuple[str, ...]
    candidates: tuple[str, ...]
    classes: tuple[str, ...] | None
    input_layout: Layout
    preprocessing: Preprocessing | None
    score_activation: str
    framework: str
    precision: str = "fp32"
    notes: tuple[Note, ...] = ()
    method: str | None = None
    signed: bool = False
    picture: str | None = None
    contrast: bool = False
    score: str = "classes"
    fit: str = "stretch"
    box_classes: int = 0
    mask_size: tuple[int, int] | None = None
    evidence: tuple[str, ...] = ()
    map_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def takes_pictures(self) -> bool:
        """Whether the input is pictures, rather than series or volumes."""
        return len(self.input_layout) == 4

    @property
    def overflow_advice(self) -> str:
        """What to do if a value is not finite."""
        if self.precision == "fp16":
            return 'float16 ends at 65504; export the model with precision="fp32"'
        return "check the model"

    def to_properties(self) -> dict[str, str]:
        """Return the entries of the file's ``metadata_props``, always in the same order."""
        drawing = {
            "method": self.method or "",
            "signed": "true" if self.signed else "",
            "picture": self.picture or "",
            "contrast": "true" if self.contrast else "",
        }
        drawing = {key: value for key, value in drawing.items() if value}
        scores = {"score": self.score, "fit": self.fit, "box_classes": str(self.box_classes)}
        if self.mask_size is not None:
            scores["mask_size"] = json.dumps(self.mask_size)
        scores = scores if (self.score, self.fit) != ("classes", "stretch") else {}
        needed = SCORES_VERSION if scores else DRAWING_VERSION if drawing else FORMAT_VERSION
        needed = needed if self.layers else SCORES_ONLY_VERSION
        entries = {
            "format_version": needed if self.takes_pictures else SIGNALS_VERSION,
            "package_version": importlib.metadata.version("fastcam"),
            "framework": self.framework,
            "layers": json.dumps(self.layers, ensure_ascii=False),
            "candidates": json.dumps(self.candidates, ensure_ascii=False),
            "classes": json.dumps(self.classes, ensure_ascii=False),
            "input_layout": self.input_layout,
            "preprocessing": "null" if self.preprocessing is None else self.preprocessing.to_json(),
            "score_activation": self.score_activation,
            "precision": self.precision,
            "notes": json.dumps([[note.kind, note] for note in self.notes], ensure_ascii=False),
            **drawing,
            **scores,
            **({"evidence": json.dumps(self.evidence)} if self.evidence else {}),
            **({"map_shapes": json.dumps(self.map_shapes)} if self.map_shapes else {}),
        }
        return {_PREFIX + key: value for key, value in entries.items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], name: str) -> Metadata:
        """Read the entries of the file called ``name``.

        Raises
        ------
        FileFormatError
            The file was not made by `fastcam.export`, or by a version that is too new, or an entry is damaged.
        """
        version = properties.get(_PREFIX + "format_version")
        if version is None:
            raise FileFormatError(f"{name}: this ONNX file does not explain itself: run fastcam.export on it first")
        if version not in READABLE_VERSIONS:
            raise FileFormatError(
                f"{name}: written in format {version}; this version of fastcam reads {', '.join(READABLE_VERSIONS)}. "
                "Update fastcam, or export the model again"
            )
        known = _DEFAULTS | dict(properties)
        if known.get(_PREFIX + IMAGE_GRADIENTS):
            # Files from before there were others.
            known[_PREFIX + "evidence"] = json.dumps([IMAGE_GRADIENTS])
        found = cls(**{key: _entry(known, key, read, name) for key, read in _READERS.items()})
        if not found.layers and version not in (SCORES_ONLY_VERSION, SIGNALS_VERSION):
            raise FileFormatError(f"{name}: its metadata entry 'fastcam.layers' is empty: export the model again")
        return found


def _entry(properties: Mapping[str, str], key: str, read: Any, name: str) -> Any:
    try:
        return read(properties[_PREFIX + key])
    except (KeyError, ValueError, TypeError, RecursionError, ArgumentError) as error:
        raise FileFormatError(
            f"{name}: its metadata entry {_PREFIX + key!r} is missing or damaged ({error!r}): export the model again"
        ) from error


def _names(text: str) -> tuple[str, ...]:
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of names")
    return tuple(names)


def _optional_names(text: str) -> tuple[str, ...] | None:
    return None if text == "null" else _names(text)


def _preprocessing(text: str) -> Preprocessing | None:
    return None if text == "null" else Preprocessing.from_json(text)


def _size(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in json.loads(text))
    if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
        raise ValueError("not a size")
    return height, width


def _map_shapes(text: str) -> tuple[tuple[int, ...], ...]:
    shapes = tuple(tuple(int(side) for side in shape) for shape in json.loads(text))
    if not all(0 < side <= _LARGEST_SIDE**2 for shape in shapes for side in shape):
        raise ValueError("not shapes")
    return shapes


def _one_of(*allowed: str) -> Any:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is none of {', '.join(allowed)}")
        return text

    return read


def _flag(text: str) -> bool:
    return bool(_one_of("", "true")(text))


def _evidence(text: str) -> tuple[str, ...]:
    return tuple(_one_of(*EVIDENCE)(name) for name in _names(text))


def _notes(text: str) -> tuple[Note, ...]:
    return tuple(Note(kind, note) for kind, note in json.loads(text))


_READERS: dict[str, Any] = {
    "layers": _names,
    "candidates": _names,
    "classes": _optional_names,
    "input_layout": _one_of(*get_args(Layout)),
    "preprocessing": _preprocessing,
    "score_activation": _one_of(*SCORE_ACTIVATIONS),
    "framework": str,
    "precision": _one_of(*PRECISIONS),
    "notes": _notes,
    "method": lambda text: text or None,
    "signed": _flag,
    "picture": lambda text: _one_of("", *PICTURES)(text) or None,
    "contrast": _flag,
    "score": _one_of(*SCORES),
    "fit": _one_of(*FITS),
    "box_classes": lambda text: min(int(text), 2**31),
    "mask_size": lambda text: _size(text) if text else None,
    "evidence": _evidence,
    "map_shapes": _map_shapes,
}
# Older files of this format lack these entries.
_DEFAULTS = {
    _PREFIX + key: value
    for key, value in {
        "precision": "fp32",
        "notes": "[]",
        "method": "",
        "signed": "",
        "picture": "",
        "contrast": "",
        "score": "classes",
        "fit": "stretch",
        "box_classes": "0",
        "mask_size": "",
        "evidence": "[]",
        "map_shapes": "[]",
    }.items()
}
