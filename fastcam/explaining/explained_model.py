"""An explained model as its session shows it: checked names, types and shapes, and the file's metadata."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ArgumentError, FileFormatError
from ..files import file_state
from ..metadata import EVIDENCE, IMAGE_GRADIENTS, LARGEST_BATCH, MASK, REFERENCE, Metadata, layer_outputs
from .methods import METHODS, Method, Reads, find_method

if TYPE_CHECKING:
    import onnxruntime

    from .openvino import OpenVinoSession

DEFAULT_METHOD = "gradcam"
# Pixels of one heatmap: a gigabyte of float32.
LARGEST_HEATMAP = 2**28
# Numbers in one image of the input: a quarter of a gigabyte of float32; a call holds several of them.
_LARGEST_INPUT = 2**26

# Element type and rank of the outputs: those of the file, and those of every layer.
_OUTPUTS = {"logits": ("float", 2), "targets": ("int64", 2)}
_PER_TARGET = (
    "targets",
    "weights",
    "gradients",
    "maps",
    "heatmaps",
    "overlays",
    "boxes",
    "box",
    "similarity",
    *EVIDENCE,
)
_LAYER_OUTPUTS = {"activations": ("float", 4), "weights": ("float", 3)}
# For a file that draws its own heatmaps.
_DRAWN_OUTPUTS = {"maps": ("float", 4), "heatmaps": ("float", 4)}
# For a detector.
_BOX_OUTPUTS = {"boxes": ("float", 3), "box_scores": ("float", 2), "box_classes": ("int64", 2)}
_SIMILARITY = {"similarity": ("float", 2)}
# A further input, by the kind of scores.
_EXTRA_INPUTS = {"segmentation": MASK, "embedding": REFERENCE}
_DESCRIPTIONS = {"boxes": _BOX_OUTPUTS, "embedding": _SIMILARITY}
# By which a kind of scores is explained if no method is named. The mean gradient of a box says which class, not where.
_DEFAULT_METHODS = {"boxes": "hirescam"}


class Value(NamedTuple):
    """An input or output of the file; ``shape`` holds numbers, and a name or None for a dynamic dimension."""

    name: str
    type: str
    shape: tuple[Any, ...]


class ExplainedModel:
    """Facts about a file that a session has opened.

    Attributes
    ----------
    path : Path
    metadata : Metadata
    inputs, outputs : dict of str to Value
        Inputs (except the target) and outputs.
    input_name : str
    image_shape : tuple of int
        Shape of one image of the model's input.
    extra : {"mask", "reference", None}
        A further input, which callers may omit.
    fixed_batch : int or None
        Number of images that the file takes; None for any.
    class_count : int
        Number of classes, or values.
    table_size : int
        Number of scores of an image: as many, except for a detector, which has one for each anchor and class.
    draws_only : bool
        Whether the file returns the maps that it draws, without activations and weights.
    map_shapes : tuple of tuple of int
        Of each layer: (h,w), (t,) or (d,h,w).
    methods : tuple of str
        Methods by which the file can be explained.
    default_method : str
        The method if none is named.

    Raises
    ------
    FileFormatError
        The file was not made by `fastcam.export`, or was changed.
    """

    def __init__(self, path: Path, session: onnxruntime.InferenceSession | OpenVinoSession) -> None:
        self.path = path
        self._state = file_state(path)
        self.metadata = Metadata.from_properties(_properties(path, session), str(path))
        self.inputs, self.outputs = _signature(path, session)
        self._layer_outputs = [layer_outputs(position) for position in range(len(self.metadata.layers))]
        self.draws_only = self.metadata.method is not None and self._layer_outputs[0].weights not in self.outputs
        self.has_gradients = bool(self._layer_outputs) and all(
            layer.gradients in self.outputs for layer in self._layer_outputs
        )
        self._check_outputs()
        self.extra = _EXTRA_INPUTS.get(self.metadata.score)
        # Sessions list inputs with a default elsewhere.
        self.inputs.pop(self.extra or "", None)
        if len(self.inputs) != 1:
            raise FileFormatError(
                f"{path}: it has {len(self.inputs)} inputs besides the target: export the model again"
            )
        self.input_name, image = next(iter(self.inputs.items()))
        self._check_input(image)
        batch, *sides = image.shape
        self.image_shape: tuple[int, ...] = tuple(sides)
        if self.metadata.picture is not None:
            # The input may be of any size; the heatmaps have the network's.
            self.image_shape = (*self.outputs["heatmaps"].shape[2:], 3)
        self.fixed_batch: int | None = batch if isinstance(batch, int) else None
        if self.fixed_batch is not None and not 0 < self.fixed_batch <= LARGEST_BATCH:
            raise FileFormatError(f"{path}: it takes batches of {self.fixed_batch} images: export the model again")
        self.table_size = int(self.outputs["logits"].shape[1])
        self.class_count = self.metadata.box_classes if self.has_boxes else self.table_size
        if not self.class_count:
            raise FileFormatError(f"{path}: it has no classes: export the model again")
        classes = self.metadata.classes
        if classes is not None and len(classes) != self.class_count:
            raise FileFormatError(
                f"{path}: its metadata entry 'fastcam.classes' holds {len(classes)} names for "
                f"{self.class_count} classes: export the model again"
            )
        self._check_map_shapes()
        self.methods = tuple(self._offered())
        wanted = _DEFAULT_METHODS.get(self.metadata.score, DEFAULT_METHOD)
        self.default_method = wanted if wanted in self.methods else self.methods[0]

    def _offered(self) -> Iterator[str]:
        holds: set[Reads] = set()
        if self.draws_only and self.metadata.method is not None:
            yield self.metadata.method
        elif self._layer_outputs:
            holds |= {"weights", "activations"}
        holds |= {"gradients"} if self.has_gradients else set()
        holds |= set(self.metadata.evidence)
        # Methods that run the network again change its input, which takes floats.
        holds |= {"scores"} if self.metadata.picture is None else set()
        for name, row in METHODS.items():
            changes_input = row.reruns is not None or row.of_image
            takes_floats = self.metadata.picture is None and self.metadata.takes_pictures
            if holds.issuperset(row.reads) and (takes_floats or not changes_input):
                yield name

    def check_unchanged(self) -> None:
        """Raise FileFormatError if the file was replaced since: another session of it would be of another model."""
        if file_state(self.path) != self._state:
            raise FileFormatError(f"{self.path}: the file was replaced since it was opened: open it again")

    @property
    def has_boxes(self) -> bool:
        """Whether the model is a detector."""
        return self.metadata.score == "boxes"

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Outputs that describe the targets: the boxes of a detector, or the similarity to each reference."""
        return tuple(_DESCRIPTIONS.get(self.metadata.score, ()))

    def default_positions(self, method: str) -> Sequence[int]:
        """Return the numbers of the layers that are explained if none is named.

        All of them for a detector, where boxes differ in size, and for methods that multiply the maps of layers.
        """
        several = self.has_boxes or METHODS[method].merge == "product"
        return range(len(self._layer_outputs)) if several else [0]

    def side(self, axis: str) -> int:
        """Return the size of one axis of the image, "H", "W" or "C"."""
        return self.image_shape[self.metadata.input_layout.index(axis) - 1]

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Sizes of the input's axes besides batch and channels: (H,W), (T,) or (D,H,W)."""
        return tuple(self.side(axis) for axis in self.metadata.input_layout if axis not in "NC")

    def output_shape(self, name: str, images: int, maps: int) -> tuple[Any, ...]:
        """Return the shape of an output for this number of images and maps per image; dynamic ones stay names."""
        is_per_target = name in _PER_TARGET or name.partition("_")[0] in _PER_TARGET
        rows = (images, maps) if is_per_target else (images,)
        return (*rows, *self.outputs[name].shape[len(rows) :])

    def fetched(self, positions: Sequence[int], method: str) -> tuple[str, ...]:
        """Return the outputs from which a method explains these layers.

        Logits and targets, then activations and weights or gradients of each layer if the method reads them, then
        the `descriptions`. For a file that returns only its own maps: logits, targets and maps.

        Raises
        ------
        ArgumentError
            There is no such method, or the file lacks what it reads.
        """
        row = find_method(method)
        if method not in self.methods:
            raise ArgumentError(self._refusal(method, row))
        if row.of_image:
            return (*_OUTPUTS, *self.descriptions)
        if self.draws_only:
            return (*_OUTPUTS, "maps")
        second = "gradients" if "gradients" in row.reads and row.reruns is None else "weights"
        layers = [self._layer_outputs[position] for position in positions]
        explained = (name for layer in layers for name in (layer.activations, getattr(layer, second)))
        return (*_OUTPUTS, *explained, *self.descriptions)

    def _refusal(self, method: str, row: Method) -> str:
        """Return why the file cannot be explained by a method, and the way out."""
        if not self.metadata.takes_pictures:
            return (
                f"method={method!r} changes pictures, or needs outputs that files for series and volumes do not hold, "
                f"such as {self.path}: choose from {', '.join(self.methods)}"
            )
        if row.reruns is not None and self.metadata.picture is not None:
            return (
                f"method={method!r} changes the model's input, and {self.path} takes uint8 pictures: export the model "
                "again without picture="
            )
        if self.draws_only:
            return (
                f"{self.path} draws its maps by method={self.methods[0]!r} and holds nothing for {method!r}: "
                f"pass method={self.methods[0]!r}, or export the model again with raw_outputs=True"
            )
        if not self._layer_outputs:
            return (
                f"method={method!r} needs a layer, and {self.path} gives only scores: choose from "
                f'{", ".join(self.methods)}, or export the model again without gradients="none"'
            )
        missing = [name for name in row.reads if name in EVIDENCE and name not in self.metadata.evidence]
        if missing:
            way = 'gradients="image"' if missing == [IMAGE_GRADIENTS] else f"evidence={missing[0]!r}"
            return (
                f"method={method!r} needs the output {missing[0]!r}, which {self.path} does not hold: export the model "
                f"again with {way}"
            )
        return (
            f"method={method!r} needs the full gradients, but {self.path} holds pooled ones: "
            'export the model again with gradients="full"'
        )

    def _check_input(self, image: Value) -> None:
        sides, kind = image.shape[1:], "tensor(float)"
        if self.metadata.picture is not None:
            kind = "tensor(uint8)"
            known = self.metadata.picture == "any" or sides[:2] == self.outputs["heatmaps"].shape[2:]
            sides = (*self.outputs["heatmaps"].shape[2:], *sides[2:]) if known else ()
        whole = len(sides) == len(self.metadata.input_layout) - 1 and all(
            isinstance(side, int) and side > 0 for side in sides
        )
        if image.type != kind or not whole or math.prod(sides) > _LARGEST_INPUT:
            raise FileFormatError(
                f"{self.path}: its input {image.name!r} is {image.type} {list(image.shape)}, "
                "not a batch of pictures: export the model again"
            )

    def _check_map_shapes(self) -> None:
        maps = [] if self.draws_only else [self.outputs[layer.activations].shape[2:] for layer in self._layer_outputs]
        self.map_shapes = tuple(maps) if self.metadata.takes_pictures else self.metadata.map_shapes
        if self.metadata.takes_pictures:
            return
        pixels = [math.prod(sides) if all(isinstance(side, int) for side in sides) else None for sides in maps]
        if [math.prod(shape) for shape in self.map_shapes] != pixels:
            raise FileFormatError(
                f"{self.path}: its metadata entry 'fastcam.map_shapes' does not fit its layers: export the model again"
            )

    def _check_outputs(self) -> None:
        expected = dict(_OUTPUTS)
        if self.metadata.method is not None or self.metadata.picture is not None:
            expected |= _DRAWN_OUTPUTS
        expected |= _DESCRIPTIONS.get(self.metadata.score, {})
        for layer in [] if self.draws_only else self._layer_outputs:
            expected |= {getattr(layer, name): type_ for name, type_ in _LAYER_OUTPUTS.items()}
            if self.has_gradients:
                expected[layer.gradients] = ("float", 5)
        expected |= {name: ("float", rank) for name, rank in EVIDENCE.items() if name in self.outputs}
        for name, (kind, rank) in expected.items():
            found = self.outputs.get(name)
            known = found is not None and found.type == f"tensor({kind})" and len(found.shape) == rank
            if not known or (name == "logits" and not isinstance(self.outputs[name].shape[1], int)):
                raise FileFormatError(f"{self.path}: its output {name!r} is missing or changed: export the model again")


def _signature(
    path: Path, session: onnxruntime.InferenceSession | OpenVinoSession
) -> tuple[dict[str, Value], dict[str, Value]]:
    try:
        inputs, outputs = (
            {item.name: Value(item.name, item.type, tuple(item.shape)) for item in items}
            for items in (session.get_inputs(), session.get_outputs())
        )
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: a name in it is damaged ({error}): export the model again") from error
    # If it has no default it counts as an input.
    inputs.pop("target", None)
    return inputs, outputs


def _properties(path: Path, session: onnxruntime.InferenceSession | OpenVinoSession) -> Mapping[str, str]:
    try:
        properties: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: its metadata are damaged ({error}): export the model again") from error
    return properties
