"""The networks of a training: the classifier and its head, and the layers between photos and their input."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, MissingExtraError, ModelError, WriteError
from ..preprocessing import Preprocessing
from .backbones import Backbone, find_blocks
from .settings import Settings


def import_keras() -> Any:
    """Return the module keras.

    Raises
    ------
    MissingExtraError
        tensorflow, keras or matplotlib is not installed.
    ModelError
        Keras is configured for another framework.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        # Without tensorflow, Keras would name another package. matplotlib is needed only at the end, which is too late
        # to find it missing.
        for name in ("tensorflow", "matplotlib"):
            importlib.import_module(name)
        import keras
    except ImportError as error:
        raise MissingExtraError(
            f'training needs tensorflow and matplotlib ({error}): pip install "fastcam[train]"'
        ) from error
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"Keras uses the backend {keras.backend.backend()!r}, but fastcam trains with TensorFlow: set "
            "KERAS_BACKEND=tensorflow"
        )
    return keras


def make_deterministic(keras: Any, seed: int) -> None:
    """Set the seeds of Python, NumPy and TensorFlow, and choose TensorFlow's deterministic ops."""
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def check_unfreeze(network: Any, backbone: Backbone, count: int) -> None:
    """Raise ArgumentError if the backbone has fewer blocks than should be trained."""
    blocks = len(find_blocks(network))
    if count > blocks:
        raise ArgumentError(
            f"unfreeze={count}: {backbone.name} has {blocks} blocks, each with feature maps of one size"
        )


def check_space(network: Any, backbone: Backbone, folder: Path) -> None:
    """Raise WriteError now if the weights will not fit on the disk: HDF5 does not survive a full one."""
    # The best weights, those of the last two epochs with Adam's two averages, and the model.
    needed = 8 * sum(array.nbytes for array in network.get_weights())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"{folder}: has {free / 1e6:.0f} MB of free space, but training {backbone.name} may need "
            f"{needed / 1e6:.0f} MB: free some space, or choose another out"
        )


@dataclass(frozen=True)
class Recipe:
    """How photos become the input of a network.

    Attributes
    ----------
    keras : module
    side : int
        Height and width of the input, pixels.
    preprocessing : Preprocessing
    """

    keras: Any
    side: int
    preprocessing: Preprocessing

    def prepend(self, network: Any, *, augmented: bool = False) -> Any:
        """Return ``network`` with photos of 0..255 as input, randomly altered during training if ``augmented``."""
        photos = self.keras.Input((self.side, self.side, 3))
        value = _apply(augmentations(self.keras), photos) if augmented else photos
        if self.preprocessing.order == "BGR":
            value = self.keras.ops.flip(value, axis=-1)
        mean, scale = (np.array(values, np.float32) for values in (self.preprocessing.mean, self.preprocessing.scale))
        return self.keras.Model(photos, network((value - mean) * scale))


def augmentations(keras: Any) -> list[Any]:
    """Return new layers that alter photos of 0..255 at random."""
    layers = keras.layers
    return [
        layers.RandomFlip("horizontal"),
        layers.RandomTranslation(0.1, 0.1),
        layers.RandomRotation(0.04),
        layers.RandomZoom(0.15),
        layers.RandomBrightness(0.15, value_range=(0, 255)),
        layers.RandomContrast(0.2, value_range=(0, 255)),
    ]


def build_models(keras: Any, network: Any, settings: Settings, class_count: int) -> tuple[Any, Any]:
    """Return the whole classifier, and its head, which takes features; they share their layers."""
    layers = keras.layers
    hidden = [
        layers.Dense(units, activation="relu", name=f"head_dense_{number}")
        for number, units in enumerate(settings.hidden, start=1)
    ]
    dropout = layers.Dropout(settings.dropout, name="head_dropout")
    dense = [*hidden, dropout, layers.Dense(class_count, activation="softmax", name="predictions")]
    pooled = layers.GlobalAveragePooling2D(name="head_pool")(network.output)
    features = keras.Input(pooled.shape[1:])
    return keras.Model(network.input, _apply(dense, pooled)), keras.Model(features, _apply(dense, features))


def unfreeze_blocks(keras: Any, network: Any, count: int) -> None:
    """Make the last blocks trainable, except BatchNorm, whose statistics would follow every small batch."""
    learning = {id(layer) for block in find_blocks(network)[-count:] for layer in block}
    network.trainable = True
    for layer in network.layers:
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = id(layer) in learning and not is_norm


def _apply(layers: Sequence[Any], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value
