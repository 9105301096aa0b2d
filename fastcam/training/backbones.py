"""The networks of keras.applications as backbones: their preprocessing, their input size and their weights."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, ModelError, suggest
from ..preprocessing import find_family

# Side of the photos, by the start of the network's name; the first match wins.
_SIDES = (
    ("inception|xception", 299),
    ("nasnetlarge", 331),
    (r"efficientnet(v2)?b1", 240),
    (r"efficientnet(v2)?b2", 260),
    (r"efficientnet(v2)?b3", 300),
    ("efficientnetb4", 380),
    ("efficientnetb5", 456),
    ("efficientnetb6", 528),
    ("efficientnetb7", 600),
    ("efficientnetv2s", 384),
    ("efficientnetv2[ml]", 480),
    ("", 224),
)


@dataclass(frozen=True)
class Backbone:
    """A network of keras.applications.

    Attributes
    ----------
    name : str
        As in Keras: "VGG16".
    preprocessing : str
        Name of its preprocessing, for `Preprocessing.of`.
    side : int
        Height and width of its input, pixels.
    """

    name: str
    preprocessing: str
    side: int

    def build(self, keras: Any, weights: str | os.PathLike[str] | None, side: int) -> Any:
        """Return the network without its head.

        Raises
        ------
        ArgumentError
            The network does not support inputs of this size.
        ModelError
            The weights cannot be downloaded or read, or belong to another network.
        """
        build = getattr(keras.applications, self.name)
        options = {"include_top": False, "input_shape": (side, side, 3)}
        downloads = weights == "imagenet"
        try:
            network = self._downloaded(build, options) if downloads else build(weights=None, **options)
        except ModelError:
            raise
        except ValueError as error:
            raise ArgumentError(f"size={side}: {self.name} cannot be built for this size: {error}") from None
        if weights is not None and not downloads:
            self._load(network, Path(weights))
        return network

    def _downloaded(self, build: Any, options: dict[str, Any]) -> Any:
        try:
            return build(weights="imagenet", **options)
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - Keras passes on the exceptions of urllib and h5py
            found = re.search(r"https?://\S+/([^\s:/]+\.h5)", str(error))
            file = f"{found[1]!r} (from {found[0]})" if found else "its weights"
            raise ModelError(
                f"the ImageNet weights of {self.name} cannot be downloaded ({error}). Download {file} on a machine "
                "with internet access, copy it here, and pass its path as weights"
            ) from None

    def _load(self, network: Any, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"weights {str(path)!r}: no such file")
        try:
            with warnings.catch_warnings():
                # Keras would only warn, and leave the rest of the network unchanged.
                warnings.filterwarnings("error", "Skipping nested container")
                network.load_weights(path)
        except Exception as error:  # noqa: BLE001 - h5py and Keras raise exceptions of many types
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"weights {str(path)!r} do not fit {self.name} without its head: {reason}. Pass the file for the same "
                "network whose name ends in notop"
            ) from None


def find_backbone(keras: Any, name: str) -> Backbone:
    """Return the backbone of this name; case, dashes and underscores do not matter.

    Raises
    ------
    ArgumentError
        keras.applications has no network of that name.
    """
    known = {
        found.lower(): found
        for found in dir(keras.applications)
        if found[0].isupper() and callable(getattr(keras.applications, found))
    }
    plain = re.sub(r"[-_ ]", "", str(name)).lower()
    if plain not in known:
        raise ArgumentError(f"backbone={name!r}: {suggest(plain, known)}known are {', '.join(sorted(known.values()))}")
    family = find_family(plain)
    if family is None:
        raise ArgumentError(f"backbone={name!r}: how its photos are preprocessed is not known to fastcam")
    side = next(side for pattern, side in _SIDES if re.match(pattern, plain))
    return Backbone(known[plain], family.preprocessing, side)


def find_blocks(network: Any) -> list[list[Any]]:
    """Return the layers with weights, grouped into blocks whose feature maps have one size, from first to last.

    Layers with a single value per channel (squeeze-and-excitation) belong to the block that they scale.
    """
    blocks: dict[tuple[int, ...], list[Any]] = {}
    size: tuple[int, ...] = ()
    for layer in network.layers:
        shape = tuple(layer.output.shape)
        if len(shape) == 4 and shape[1:3] != (1, 1):
            size = shape[1:3]
        if layer.weights:
            blocks.setdefault(size, []).append(layer)
    return list(blocks.values())
