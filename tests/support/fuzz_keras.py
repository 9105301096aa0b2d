"""Mutated Keras files given to the importer, .keras and .h5: see `fuzzing`."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

from fuzzing import Attempt, fuzz
from mutations import flip_bytes

import fastcam

_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3.5, 2**31, 2**62, "", "relu", "nonsense"),
    *([], [1, 2], {}, {"class_name": "Dense"}),
)


def _network() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    image = keras.Input((12, 12, 3))
    x = layers.Conv2D(4, 3, padding="same")(image)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Concatenate()([x, layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)])
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(x)))
    return keras.Model(image, layers.Dense(3, activation="softmax")(x))


def _change_config(config: Any, pick: random.Random) -> None:
    """Change, drop or copy one entry, somewhere in nested lists and mappings."""
    places: list[tuple[Any, Any]] = []
    open_ = [config]
    while open_:
        one = open_.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        places += [(one, key) for key in keys]
        open_ += [one[key] for key in keys]
    if not places:
        return
    holder, key = pick.choice(places)
    if pick.random() < 0.3:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(pick.choice([*_VALUES, pick.choice(places)[0]]))


def _mutated_archive(data: bytes, pick: random.Random) -> bytes:
    """Return a .keras file with one member changed."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(changed, "w") as target:
        broken = pick.choice(["config.json", "config.json", "metadata.json", "model.weights.h5"])
        for name in source.namelist():
            content = source.read(name)
            if name == broken and name.endswith(".json"):
                config = json.loads(content)
                for _ in range(pick.choice([1, 1, 3])):
                    _change_config(config, pick)
                content = json.dumps(config).encode()
            elif name == broken:
                content = flip_bytes(content, pick)
            target.writestr(name, content)
    return changed.getvalue()


def _mutate_legacy(path: Path, data: bytes, pick: random.Random) -> None:
    """Write a .h5 file with another description of the network."""
    import h5py

    path.write_bytes(data)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        _change_config(config, pick)
        file.attrs["model_config"] = json.dumps(config)


def prepare(folder: Path) -> Attempt:
    """Return what exports a mutation."""
    network = _network()
    network.save(folder / "good.keras")
    network.save(folder / "good.h5")
    good = {suffix: (folder / f"good{suffix}").read_bytes() for suffix in (".keras", ".h5")}

    def attempt(seed: int, pick: random.Random) -> bool:
        suffix = pick.choice([".keras", ".keras", ".h5"])
        path = folder / f"in{suffix}"
        kind = pick.random()
        if kind < 0.3:
            path.write_bytes(flip_bytes(good[suffix], pick))
        elif suffix == ".keras":
            path.write_bytes(_mutated_archive(good[suffix], pick))
        else:
            _mutate_legacy(path, good[suffix], pick)
        fastcam.export(path, folder / "out" / "out.onnx")
        return True

    return attempt


if __name__ == "__main__":
    fuzz(prepare)
