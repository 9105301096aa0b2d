"""Load files of Keras 2 and 3, and SavedModel folders, as Keras models.

A file of a few kilobytes may claim any size. The claim is compared with the contents before Keras sees the file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import FastcamError, ModelError
from ...labels import MEMBER as LABELS
from .quarantine import QUARANTINE, CrashError

# Weights compress by less: float32 noise not at all, quantised or pruned weights somewhat.
_LARGEST_RATIO = 64
# Small files may be mostly zeros.
_SMALL = 2**26
# Elements of an image.
_LARGEST_INPUT = 2**28
# Entries of a layer's configuration, each of which needs at least that many weights.
_SIZES = ("filters", "units", "input_dim", "output_dim", "num_heads", "key_dim", "value_dim")


def load_keras_file(keras: Any, path: Path, custom_objects: Mapping[str, Any] | None) -> Any:
    """Load a .keras, .h5 or .hdf5 file.

    Parameters
    ----------
    keras : module
    path : Path
    custom_objects : mapping of str to class or function, optional
        The caller's own layers and functions, by their names in the file.

    Raises
    ------
    ModelError
        The file is damaged, claims more than it holds, or holds code or layers that Keras does not know.
    """
    try:
        _check_claims(path)
        with keras.utils.custom_object_scope({**_of_keras_2(keras), **(custom_objects or {})}):
            return _load(keras, path)
    except FastcamError:
        raise
    except Exception as error:  # zipfile, h5py, json and Keras each raise their own
        raise ModelError(f"{path}: Keras cannot load this model: {_reason(error)}{_advice(error)}") from error


def _load(keras: Any, path: Path) -> Any:
    """Load a Keras file.

    Keras reads the weights of a .keras archive into memory before it assigns them: a third copy, which takes VGG16 to
    3.2 GB. If they are extracted to disk first, the peak is 2.7 GB.
    """
    members = _archive_members(path)
    if members - {LABELS} != {"metadata.json", "config.json", "model.weights.h5"}:
        return keras.models.load_model(path, compile=False)
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        config = {**json.loads(archive.read("config.json")), "compile_config": None}
        model = keras.models.model_from_json(json.dumps(config))
        model.load_weights(archive.extract("model.weights.h5", folder))
    return model


def _archive_members(path: Path) -> set[str]:
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def _of_keras_2(keras: Any) -> dict[str, Any]:
    """Return the layers that Keras 2 files name and that Keras 3 lacks or gives different arguments."""

    class DepthwiseConv2D(keras.layers.DepthwiseConv2D):  # type: ignore[misc]  # keras has no types
        # Keras 2 wrote the groups of its base class, always 1.
        def __init__(self, *args: Any, groups: int = 1, **kwargs: Any) -> None:
            if groups != 1:
                raise ValueError(f"DepthwiseConv2D with groups={groups}")
            super().__init__(*args, **kwargs)

    return {
        "DepthwiseConv2D": DepthwiseConv2D,
        # From the package efficientnet: a dropout with a noise shape; it does nothing at inference.
        "FixedDropout": keras.layers.Dropout,
        "relu6": keras.activations.relu6,
        "swish": keras.activations.silu,
    }


def _check_claims(path: Path) -> None:
    """Compare the sizes that a file claims with its own; raise ModelError."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        _check_hdf5(path, path, size)
        return
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        claimed = sum(member.file_size for member in archive.infolist())
        _refuse_bomb(path, claimed, size, "its members unpack to")
        weights = next((name for name in archive.namelist() if name.endswith(".weights.h5")), None)
        elements = None
        if weights is not None:
            elements = _check_hdf5(path, Path(archive.extract(weights, folder)), size)
        if "config.json" in archive.namelist():
            _check_config(path, json.loads(archive.read("config.json")), elements)


def _refuse_bomb(path: Path, claimed: int, size: int, what: str) -> None:
    if claimed > _LARGEST_RATIO * size + _SMALL:
        raise ModelError(f"{path}: {what} {claimed} bytes in a file of {size}: it is damaged or malicious")


def _check_hdf5(path: Path, weights: Path, size: int) -> int | None:
    """Check the sizes in the headers of an HDF5 file; return how many numbers it holds.

    A child process reads the file first: the HDF5 library crashes on some damaged files.
    """
    try:
        found = json.loads(QUARANTINE(f"{__name__}:read_hdf5", str(weights).encode(), size=size))
    except CrashError as error:
        raise ModelError(f"{path}: the HDF5 library crashes on this file: it is damaged") from error
    except ModelError as error:
        raise ModelError(f"{path}: the HDF5 library cannot read this file: {error}") from error
    if found is None:
        return None
    _refuse_bomb(path, found["claimed"], size, "its arrays claim")
    if found["config"] is not None:
        _check_config(path, json.loads(found["config"]), found["elements"])
    return int(found["elements"])


def read_hdf5(name: bytes) -> bytes:
    """Read all of an HDF5 file that may crash the library; return, as JSON, what it claims and Keras' configuration.

    Chunks are read last, and only if the sizes in the headers are plausible: those of other arrays are mere bytes.
    """
    import h5py

    path = Path(name.decode())
    if not h5py.is_hdf5(path):
        return b"null"
    arrays: list[Any] = []

    def visit(_: str, item: Any) -> None:
        for key in item.attrs:
            item.attrs[key]
        if isinstance(item, h5py.Dataset):
            arrays.append(item)

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
        sizes = [math.prod(array.shape or ()) for array in arrays]
        claimed = sum(count * array.dtype.itemsize for count, array in zip(sizes, arrays, strict=True))
        if claimed <= _LARGEST_RATIO * path.stat().st_size + _SMALL:
            for array in arrays:
                if array.chunks is not None:
                    array[()]
        config = file.attrs.get("model_config")
    text = config.decode() if isinstance(config, bytes) else config
    return json.dumps({"claimed": claimed, "elements": sum(sizes), "config": text}).encode()


def _check_config(path: Path, config: Any, elements: int | None) -> None:
    for key, value in _entries(config):
        if key in _SIZES and elements is not None and isinstance(value, int) and value > max(elements, 2**16):
            raise ModelError(f"{path}: a layer has {key}={value}, but the file holds {elements} weights: it is damaged")
        if key in ("batch_shape", "batch_input_shape", "shape") and isinstance(value, list):
            image = math.prod(side for side in value if isinstance(side, int) and side > 0)
            if image > _LARGEST_INPUT:
                raise ModelError(f"{path}: an input of shape {value} is larger than any image: it is damaged")


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested dicts and lists, without recursion: the file determines their depth."""
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _reason(error: Exception) -> str:
    """Return the end of a Keras error message; before it, Keras prints the layer's configuration."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else "no reason given"
    return f"{type(error).__name__}: {text.removeprefix('Exception encountered: ').rstrip('.')[:300]}"


def _advice(error: Exception) -> str:
    text = str(error)
    return next((f". {advice}" for words, advice in _ADVICE.items() if words in text), f". {_LOAD_IT_YOURSELF}")


_LOAD_IT_YOURSELF = "Load it yourself, and pass the model to export"
_ADVICE = {
    "No model config": "It holds weights only: build the model, call its load_weights, and pass the model to export",
    "ambda": "It holds Python code (a Lambda layer), which export does not run: if you trust the file, pass "
    "keras.models.load_model(path, safe_mode=False) to export",
    "Could not locate": 'Name the class that the file asks for, for example custom_objects={"MyLayer": MyLayer}, or '
    "load it yourself and pass the model to export",
    "Unknown": 'Name what the file asks for, for example custom_objects={"MyLayer": MyLayer}, or load it yourself and '
    "pass the model to export",
    "safe_mode": "It holds Python code, which export does not run: if you trust the file, pass "
    "keras.models.load_model(path, safe_mode=False) to export",
}


def load_saved_model(keras: Any, tf: Any, folder: Path) -> Any:
    """Load a SavedModel folder as a Keras model that wraps its serving signature.

    Raises
    ------
    ModelError
        TensorFlow cannot load it, or no signature takes one batch of images.
    """
    try:
        loaded = tf.saved_model.load(os.fspath(folder))
        signatures = dict(loaded.signatures)
    except Exception as error:  # TensorFlow raises its own
        raise ModelError(f"{folder}: TensorFlow cannot load this SavedModel: {_reason(error)}") from error
    for name in sorted(signatures, key=lambda name: (name != "serving_default", name)):
        specs = list(signatures[name].structured_input_signature[1].values())
        if len(specs) == 1 and specs[0].shape.rank == 4:
            images = keras.Input(tuple(specs[0].shape)[1:], name="images", dtype=specs[0].dtype.name)
            outputs = keras.layers.TFSMLayer(os.fspath(folder), call_endpoint=name)(images)
            return keras.Model(images, outputs)
    raise ModelError(f"{folder}: none of its signatures {sorted(signatures)} takes one batch of images (N,H,W,C)")
