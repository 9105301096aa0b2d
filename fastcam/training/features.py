"""The frozen backbone's features of all photos: computed once for all epochs, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import replacing, writing
from .fitting import set_random_state
from .networks import Recipe, augmentations
from .photos import TRAINING, VALIDATION, Photo, Photos, load_batches
from .record import FEATURES, STAGED, digest_values
from .settings import Settings

# float32 (N,C), and the labels, int64 (N,).
Features = tuple[NDArray[np.float32], NDArray[np.int64]]


def compute_features(
    recipe: Recipe,
    network: Any,
    photos: Photos,
    settings: Settings,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Features]:
    """Return features and labels of both parts; the training part also has those of altered copies.

    Features that an earlier training stored in ``folder`` are reused; those for other photos, weights or settings
    are removed.

    Parameters
    ----------
    recipe : Recipe
    network : keras.Model
        The frozen backbone without its head.
    photos : Photos
    settings : Settings
    folder : Path
        The training's folder, with the staged photos.
    progress : callable
        Called with the number of finished photos and the total.

    Raises
    ------
    WriteError
    """
    keras = recipe.keras
    pooled = keras.Model(network.input, keras.layers.GlobalAveragePooling2D()(network.output))
    extractor = recipe.prepend(pooled)
    alter = keras.Sequential(augmentations(keras))
    # Pass 0 uses the unaltered photos, every other pass one altered copy of each.
    passes = [(VALIDATION, 0), *((TRAINING, number) for number in range(settings.augmentations + 1))]
    of_part: dict[str, Sequence[Photo]] = {TRAINING: photos.train, VALIDATION: photos.val}
    total = sum(len(of_part[part]) for part, _ in passes)
    weights = digest_values(network.get_weights())
    arrays: dict[str, list[NDArray[np.float32]]] = {TRAINING: [], VALIDATION: []}
    kept = set()
    done = 0
    for part, number in passes:
        names = [photo.staged.name for photo in of_part[part]]
        altering = [settings.seed, number] if number else None
        made_of = [weights, asdict(recipe.preprocessing), names, settings.batch_size, altering]
        path = folder / FEATURES / f"{digest_values(made_of)[:32]}.npy"
        kept.add(path)
        found = _read_array(path, (len(names), *pooled.output_shape[1:]))
        if found is None:
            batches = load_batches(keras, folder / STAGED, part, recipe.side, settings.batch_size, settings.seed)
            batches = batches.map(lambda images, _: images)
            if number:
                set_random_state(alter, settings.seed, number)
                # Whatever the argument, Keras predicts in inference mode, where nothing is altered.
                batches = batches.map(partial(alter, training=True))
            span = range(done, done + len(names))
            found = _predict(keras, extractor, batches, span, settings.batch_size, lambda done: progress(done, total))
            _write_array(path, found)
        else:
            progress(done + len(names), total)
        arrays[part].append(found)
        done += len(names)
    for path in (folder / FEATURES).iterdir():
        if path not in kept:
            path.unlink()
    labels = {part: np.array([photo.label for photo in members]) for part, members in of_part.items()}
    return {part: (np.concatenate(found), np.tile(labels[part], len(found))) for part, found in arrays.items()}


def _predict(
    keras: Any, network: Any, batches: Any, photos: range, batch_size: int, progress: Callable[[int], None]
) -> NDArray[np.float32]:
    def report(batch: int, logs: object) -> None:
        progress(min(photos.start + (batch + 1) * batch_size, photos.stop))

    callback = keras.callbacks.LambdaCallback()
    callback.on_predict_batch_end = report
    found: NDArray[np.float32] = network.predict(batches, verbose=0, callbacks=[callback])
    return found


def _read_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Read features; None if they are missing or damaged."""
    try:
        found: NDArray[np.float32] = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _write_array(path: Path, array: NDArray[np.float32]) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.save(file, array)
