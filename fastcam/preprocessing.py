"""How pixels become the model's input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from .arguments import shown
from .errors import ArgumentError

Layout = Literal["NHWC", "NCHW", "NTC", "NCT", "NDHWC", "NCDHW"]

# Of pictures, series and volumes: with the channels first, and last.
LAYOUTS: Mapping[int, tuple[Layout, Layout]] = {
    3: ("NCT", "NTC"),
    4: ("NCHW", "NHWC"),
    5: ("NCDHW", "NDHWC"),
}
# What an input of this rank holds.
CONTENTS: Mapping[int, str] = {3: "series", 4: "pictures", 5: "volumes"}


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the model's input: ``(pixels[order] - mean) * scale``.

    Parameters
    ----------
    order
        "RGB" or "BGR", the channel order of the model's input.
    mean, scale
        Three floats each, in the channel order of the model's input; pixels are float32 0..255.

    Raises
    ------
    ArgumentError
        If the order is neither of these, a field does not hold three finite numbers, or a scale is 0.
    """

    order: Literal["RGB", "BGR"]
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]

    def __post_init__(self) -> None:
        order: object = self.order
        if not isinstance(order, str) or order not in ("RGB", "BGR"):
            raise ArgumentError(f"order must be 'RGB' or 'BGR', not {shown(self.order)}")
        for field in ("mean", "scale"):
            object.__setattr__(self, field, _three_floats(field, getattr(self, field)))
        if 0 in self.scale:
            raise ArgumentError(f"scale {self.scale} would erase a channel. Give non-zero numbers")

    @property
    def name(self) -> str | None:
        """Name of this preprocessing in `KNOWN`, or None."""
        return next((name for name, known in KNOWN.items() if known == self), None)

    @classmethod
    def of(cls, spec: str | Preprocessing | Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing described by a name, a mapping, or a Preprocessing.

        Parameters
        ----------
        spec
            One of the names below, a Preprocessing, or a mapping with the keys "order", "mean" and "scale".

            =====================  ===========================================================================
            "vgg16" or "caffe"     BGR minus (103.939, 116.779, 123.68): VGG and ResNet of keras.applications
            "imagenet" or "torch"  RGB / 255, minus (.485, .456, .406), divided by (.229, .224, .225):
                                   torchvision, most of timm, DenseNet of keras.applications
            "symmetric" or "tf"    RGB scaled to -1..1: MobileNet and Inception of keras.applications,
                                   "inception" mean and deviation of timm
            "clip"                 RGB / 255, minus (.4815, .4578, .4082), divided by (.2686, .2613, .2758),
                                   all digits as published: CLIP (Radford et al. 2021)
            "scale"                RGB scaled to 0..1
            "none"                 RGB 0..255, unchanged
            =====================  ===========================================================================

        Raises
        ------
        ArgumentError
            Unknown name, missing or unknown keys, or values that Preprocessing rejects.
        """
        if isinstance(spec, Preprocessing):
            return spec
        if isinstance(spec, str) and _ALIASES.get(spec, spec) in KNOWN:
            return KNOWN[_ALIASES.get(spec, spec)]
        if isinstance(spec, Mapping) and set(spec) == {"order", "mean", "scale"}:
            return cls(**spec)
        raise ArgumentError(
            f"unknown preprocessing {shown(spec)}. Allowed: {', '.join(map(repr, [*KNOWN, *_ALIASES]))}, "
            "or a mapping {'order': 'RGB' or 'BGR', 'mean': 3 numbers, 'scale': 3 numbers}"
        )

    def to_json(self) -> str:
        """Return it as JSON: equal preprocessings give equal text, floats are exact, and a known name is included."""
        return json.dumps({"name": self.name, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read the text that `to_json` returned; the numbers count, not the name.

        Raises
        ------
        ArgumentError
            The text is not such JSON.
        """
        try:
            fields = json.loads(text)
            return cls.of({key: fields[key] for key in ("order", "mean", "scale")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"{text!r} does not describe a preprocessing ({type(error).__name__}: {error}). "
                'Expected \'{"order": "RGB", "mean": [0, 0, 0], "scale": [1, 1, 1]}\''
            ) from None


def _three_floats(field: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
        raise ArgumentError(f"{field} must be three numbers, not {shown(values)}") from None
    if not all(map(math.isfinite, (first, second, third))):
        raise ArgumentError(f"{field} must be finite, not {values!r}")
    return first, second, third


def standardized(mean: Sequence[float], deviation: Sequence[float]) -> Preprocessing:
    """Return RGB / 255, minus ``mean``, divided by ``deviation``."""
    return Preprocessing(
        "RGB",
        _three_floats("mean", [255 * value for value in mean]),
        _three_floats("scale", [1 / (255 * value) for value in deviation]),
    )


KNOWN: dict[str, Preprocessing] = {
    "vgg16": Preprocessing("BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
    "imagenet": standardized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": standardized((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "scale": Preprocessing("RGB", (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)),
    "symmetric": Preprocessing("RGB", (127.5, 127.5, 127.5), (1 / 127.5, 1 / 127.5, 1 / 127.5)),
    "none": Preprocessing("RGB", (0, 0, 0), (1, 1, 1)),
}

# Names of modes in keras.applications.imagenet_utils.
_ALIASES = {"caffe": "vgg16", "tf": "symmetric", "torch": "imagenet"}


class Guess(NamedTuple):
    """A preprocessing that a model probably expects, and why."""

    preprocessing: Preprocessing
    reason: str


class Landmark(NamedTuple):
    """A layer that every network of a family has: its name, channels (None where they vary) and stride."""

    layer: str
    channels: int | None
    stride: int


class Family(NamedTuple):
    """Networks of keras.applications that expect the same preprocessing.

    Attributes
    ----------
    title : str
        Their common name.
    pattern : str
        Regular expression that the start of their names matches, in lower case.
    preprocessing : str
        What their published weights expect; "none" if the network contains the arithmetic.
    landmarks : tuple of Landmark
        Layers by which a network is recognised, nearest to the image first; empty if the arithmetic identifies it.
    convolutions : int
        Number of convolutions from the image to the first landmark, including its own.
    """

    title: str
    pattern: str
    preprocessing: str
    landmarks: tuple[Landmark, ...] = ()
    convolutions: int = 1

    @property
    def guess(self) -> Guess:
        """What a network with this family's layers probably expects."""
        named = ", ".join(f"{landmark.layer!r}" for landmark in self.landmarks)
        return Guess(
            Preprocessing.of(self.preprocessing),
            f"the network has the layers of keras.applications' {self.title} (among them {named}), whose published "
            "weights expect it",
        )


# The first match wins.
FAMILIES = (
    Family(
        "VGG16 and VGG19",
        "vgg",
        "vgg16",
        (
            Landmark("block1_conv1", 64, 1),
            Landmark("block2_conv2", 128, 2),
            Landmark("block3_conv3", 256, 4),
            Landmark("block5_conv3", 512, 16),
        ),
    ),
    Family(
        "ResNetV2",
        r"resnet\d+v2",
        "symmetric",
        (Landmark("conv1_conv", 64, 2), Landmark("conv2_block1_preact_bn", 64, 4), Landmark("post_bn", 2048, 32)),
    ),
    Family(
        "ResNet",
        "resnet",
        "vgg16",
        (
            Landmark("conv1_conv", 64, 2),
            Landmark("conv1_bn", 64, 2),
            Landmark("conv2_block1_3_bn", 256, 4),
            Landmark("conv5_block3_out", 2048, 32),
        ),
    ),
    Family(
        "InceptionResNetV2",
        "inceptionresnet",
        "symmetric",
        (Landmark("mixed_5b", 320, 8), Landmark("mixed_6a", 1088, 16), Landmark("conv_7b", 1536, 32)),
        convolutions=12,
    ),
    Family(
        "InceptionV3",
        "inception",
        "symmetric",
        (Landmark("mixed0", 256, 8), Landmark("mixed3", 768, 16), Landmark("mixed10", 2048, 32)),
        convolutions=12,
    ),
    Family(
        "Xception",
        "xception",
        "symmetric",
        (
            Landmark("block1_conv1", 32, 2),
            Landmark("block2_sepconv1", 128, 2),
            Landmark("block14_sepconv2", 2048, 32),
        ),
    ),
    Family(
        "NASNet",
        "nasnet",
        "symmetric",
        (
            Landmark("stem_conv1", None, 2),
            Landmark("reduction_conv_1_stem_1", None, 2),
            Landmark("normal_concat_0", None, 8),
            Landmark("normal_concat_3", None, 8),
        ),
    ),
    Family("MobileNetV3", "mobilenetv3", "none"),
    Family(
        "MobileNetV2",
        "mobilenetv2",
        "symmetric",
        (
            Landmark("Conv1", None, 2),
            Landmark("expanded_conv_depthwise", None, 2),
            Landmark("block_16_project", None, 32),
            Landmark("Conv_1", None, 32),
        ),
    ),
    Family(
        "MobileNet",
        "mobilenet",
        "symmetric",
        (
            Landmark("conv1", None, 2),
            Landmark("conv_dw_1", None, 2),
            Landmark("conv_pw_6", None, 16),
            Landmark("conv_pw_13", None, 32),
        ),
    ),
    Family(
        "DenseNet",
        "densenet",
        "imagenet",
        (
            Landmark("conv1_conv", 64, 2),
            Landmark("conv2_block1_1_conv", 128, 4),
            Landmark("conv5_block16_concat", None, 32),
        ),
    ),
    Family("EfficientNet", "efficientnet", "none"),
    Family("ConvNeXt", "convnext", "none"),
)


def find_family(name: str) -> Family | None:
    """Return the family of a network of keras.applications, by its name, ignoring case."""
    return next((family for family in FAMILIES if re.match(family.pattern, name.lower())), None)


def find_families(maps: Mapping[str, tuple[int, int, int]], size: tuple[int, int]) -> Iterator[tuple[str, Family]]:
    """Yield the families of keras.applications whose landmarks a network has, each with its first landmark's layer.

    Parameters
    ----------
    maps : mapping of str to (int, int, int)
        Height, width and channels of the output of each layer, by its name or path ("vgg16/block1_conv1").
    size : (int, int)
        Height and width of the image.
    """
    for family in FAMILIES:
        if not family.landmarks:
            continue
        first = family.landmarks[0].layer
        scopes = {layer.removesuffix(first) for layer in maps if layer == first or layer.endswith(f"/{first}")}
        for scope in sorted(scopes):
            if all(_is_at(landmark, maps.get(scope + landmark.layer), size) for landmark in family.landmarks):
                yield scope + first, family


def _is_at(landmark: Landmark, found: tuple[int, int, int] | None, size: tuple[int, int]) -> bool:
    """Return whether a layer's map has the landmark's channels and stride; unpadded layers lose some pixels."""
    if found is None or landmark.channels not in (None, found[2]):
        return False
    exact = (size[0] / landmark.stride, size[1] / landmark.stride)
    return all(0.6 * whole - 1 <= side <= whole + 1 for whole, side in zip(exact, found, strict=False))
