"""How pixels become the model's input."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .arguments import shown
from .errors import ArgumentError

Layout = Literal["NHWC", "NCHW"]


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
        Another order, not three finite numbers, or a scale of 0.
    """

    order: Literal["RGB", "BGR"]
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not isinstance(self.order, str) or self.order not in ("RGB", "BGR"):
            raise ArgumentError(f"order must be 'RGB' or 'BGR', not {shown(self.order)}")
        for field in ("mean", "scale"):
            object.__setattr__(self, field, _three_floats(field, getattr(self, field)))
        if 0 in self.scale:
            raise ArgumentError(f"scale {self.scale} would erase a channel. Give non-zero numbers")

    @property
    def name(self) -> str | None:
        """Name in the table of known ones, or None."""
        return next((name for name, known in _KNOWN.items() if known == self), None)

    @classmethod
    def of(cls, spec: str | Preprocessing | Mapping[str, Any]) -> Preprocessing:
        """Make a preprocessing from a name, a mapping, or one that is already made.

        Parameters
        ----------
        spec
            One of the names below, a Preprocessing, or a mapping with the keys "order", "mean" and "scale".

            ==============  =======================================================================================
            "vgg16"         BGR minus (103.939, 116.779, 123.68): Keras' VGG and ResNet ("caffe")
            "imagenet"      RGB / 255, minus (.485, .456, .406), over (.229, .224, .225): torchvision, Keras' "torch"
            "scale"         RGB to 0..1
            "symmetric"     RGB to -1..1: Keras' "tf"
            "none"          RGB 0..255 as it is
            ==============  =======================================================================================

        Raises
        ------
        ArgumentError
            Unknown name, missing or unknown keys, or values that Preprocessing refuses.
        """
        if isinstance(spec, Preprocessing):
            return spec
        if isinstance(spec, str) and spec in _KNOWN:
            return _KNOWN[spec]
        if isinstance(spec, Mapping) and set(spec) == {"order", "mean", "scale"}:
            return cls(**spec)
        raise ArgumentError(
            f"unknown preprocessing {shown(spec)}. Allowed: {', '.join(map(repr, _KNOWN))}, "
            "or a mapping {'order': 'RGB' or 'BGR', 'mean': 3 numbers, 'scale': 3 numbers}"
        )

    def to_json(self) -> str:
        """Write as JSON: the same text for the same preprocessing, every float exact, with its name where known."""
        return json.dumps({"name": self.name, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read what `to_json` wrote; the numbers count, not the name.

        Raises
        ------
        ArgumentError
            The text is not such JSON.
        """
        try:
            fields = json.loads(text)
            return cls.of({key: fields[key] for key in ("order", "mean", "scale")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArgumentError(f"no preprocessing in {text!r} ({type(error).__name__}: {error})") from None


def _three_floats(field: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
        raise ArgumentError(f"{field} must be three numbers, not {shown(values)}") from None
    if not all(map(math.isfinite, (first, second, third))):
        raise ArgumentError(f"{field} must be finite, not {values!r}")
    return first, second, third


_KNOWN: dict[str, Preprocessing] = {
    "vgg16": Preprocessing("BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
    "imagenet": Preprocessing(
        "RGB", (255 * 0.485, 255 * 0.456, 255 * 0.406), (1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225))
    ),
    "scale": Preprocessing("RGB", (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)),
    "symmetric": Preprocessing("RGB", (127.5, 127.5, 127.5), (1 / 127.5, 1 / 127.5, 1 / 127.5)),
    "none": Preprocessing("RGB", (0, 0, 0), (1, 1, 1)),
}
