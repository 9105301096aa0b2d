"""`finetune`: a pretrained network and a folder of photos make a classifier; Keras trains it.

    photos -> staged photos -> features of the frozen backbone, once -> head -> last blocks -> .keras file

Everything that takes long is kept in a folder beside the result, so that an interrupted training goes on where it was,
and ends with the same weights: what is random depends on the seed and the epoch, never on what ran before.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, MissingExtraError, ModelError, WriteError
from ..files import LOCK, check_writable, locked, replacing, writing
from ..labels import Labels, write_labels
from ..preprocessing import Preprocessing
from .backbones import Backbone, find_backbone, find_blocks
from .figures import write_confusion_matrix, write_learning_curves
from .fitting import Phase, Row, fit, set_random_state
from .photos import TRAINING, VALIDATION, Photo, Photos, check_folders, stage_photos

Step = Literal["photos", "features", "head", "blocks", "network"]
Features = tuple[NDArray[np.float32], NDArray[np.int64]]

RECORD = "training.json"
CURVES, CONFUSION = "curves.png", "confusion.png"
_NEW, _RUNNING, _FAILED, _DONE = "new", "running", "failed", "done"


@dataclass(frozen=True)
class TrainingProgress:
    """How far `finetune` has come.

    Attributes
    ----------
    step : {"photos", "features", "head", "blocks", "network"}
        What is done: reading photos, the backbone's features of photos, epochs of the head, of the last blocks, or of
        the whole network.
    done, total : int
        Photos or epochs.
    logs : mapping of str to float
        After an epoch "loss", "accuracy", "val_loss" and "val_accuracy"; otherwise empty.
    """

    step: Step
    done: int
    total: int
    logs: Mapping[str, float]


@dataclass(frozen=True)
class TrainingResult:
    """What `finetune` made.

    Attributes
    ----------
    path : Path
        The .keras file.
    folder : Path
        Holds training.json (every setting and figure), curves.png, confusion.png, and what the next training with the
        same photos need not compute again.
    classes : tuple of str
    accuracy : float
        Share of the photos held out for testing whose class is found, 0..1. The best epoch was chosen on the same
        photos.
    confusion : tuple of tuples of int
        Number of photos by class (row) and found class (column).
    history : mapping of str to tuple of mappings
        For each step of training one mapping an epoch: "loss", "accuracy", "val_loss", "val_accuracy", "seconds".
    photos, held_out : int
        Photos to learn from, and to test on.
    skipped : tuple of str
        Files that are no readable pictures, each with the reason.
    seconds : mapping of str to float
        Time of every step, as far as this run did it.
    """

    path: Path
    folder: Path
    classes: tuple[str, ...]
    accuracy: float
    confusion: tuple[tuple[int, ...], ...]
    history: Mapping[str, tuple[Row, ...]]
    photos: int
    held_out: int
    skipped: tuple[str, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Settings:
    """The arguments of `finetune` that the result depends on; raises ArgumentError."""

    backbone: str
    weights: str | None
    size: int | None
    hidden: tuple[int, ...]
    dropout: float
    epochs: int
    learning_rate: float
    unfreeze: int
    fine_epochs: int
    fine_learning_rate: float
    batch: int
    patience: int
    augmentations: int
    class_weights: bool
    validation: float
    seed: int

    def __post_init__(self) -> None:
        _check_integers(self, 1, "epochs", "fine_epochs", "batch", "patience")
        _check_integers(self, 0, "unfreeze", "augmentations", "seed")
        if self.size is not None:
            _check_integers(self, 1, "size")
        for units in self.hidden:
            if not _is_integer(units) or units < 1:
                raise ArgumentError(f"hidden={self.hidden!r}: give the number of units of each layer, 1 or more")
        for name, low, high in (
            ("learning_rate", 0, math.inf),
            ("fine_learning_rate", 0, math.inf),
            ("validation", 0, 1),
        ):
            value = getattr(self, name)
            if not _is_number(value) or not low < value < high:
                raise ArgumentError(f"{name}={value!r}: give a number above {low}" + (" and below 1" * (high == 1)))
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout={self.dropout!r}: give a number from 0 to below 1")
        if self.weights is None and self.unfreeze:
            raise ArgumentError("weights=None trains the whole network from the start: leave unfreeze out")


def _check_integers(settings: _Settings, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not _is_integer(value) or value < least:
            raise ArgumentError(f"{name}={value!r}: give a whole number, {least} or more")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finetune(
    data_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: str = "vgg16",
    weights: str | os.PathLike[str] | None = "imagenet",
    size: int | None = None,
    hidden: Sequence[int] = (),
    dropout: float = 0.2,
    epochs: int = 30,
    learning_rate: float = 1e-3,
    unfreeze: int = 0,
    fine_epochs: int = 10,
    fine_learning_rate: float = 1e-5,
    batch: int = 32,
    patience: int = 5,
    augmentations: int = 4,
    class_weights: bool = True,
    validation: float = 0.2,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Fine-tune a network of keras.applications on a folder of photos.

    The network's own classifier is replaced by global average pooling and fully connected layers for the classes that
    the folder holds. They are trained first, on features that the frozen network computes once for all epochs; then, if
    asked, together with the network's last blocks. The file that is written is a plain Keras model, and `export` finds
    the names of the classes and the preprocessing in it.

    Training sets the seeds of Python, NumPy and TensorFlow, and TensorFlow's deterministic ops, for the whole process.

    Parameters
    ----------
    data_dir : path
        Holds one folder of photos for each class, named after it, or folders "train" and "val" of such.
    out : path
        The .keras file to write. ``out`` without its suffix + ".training" is the folder of what belongs to it.
    backbone : str
        Any classifier of keras.applications: "vgg16", "resnet50", "mobilenetv2", "efficientnetb0" ...
    weights : "imagenet", path or None
        What the backbone knows: Keras' ImageNet weights, which it downloads; a file of them, for a machine without
        internet (the one whose name ends in notop); None for nothing: the whole network is then trained from the start.
    size : int, optional
        Height and width of the network's input, in pixels; by default what its ImageNet weights were trained with.
    hidden : sequence of int
        Units of fully connected ReLU layers before the last one.
    dropout : float
        Share of the last layer's inputs that are left out while it learns, 0..1.
    epochs, fine_epochs : int
        At most so many, of the head (or of the whole network, without weights) and of the last blocks.
    learning_rate, fine_learning_rate : float
        Adam's, for the same.
    unfreeze : int
        How many of the backbone's last blocks learn, too; a block is what computes on maps of one size (block5 of a
        VGG16). BatchNorm layers stay as they are.
    batch : int
        Photos a step.
    patience : int
        Training ends after so many epochs without a lower loss on the photos that are held out.
    augmentations : int
        Altered copies of each photo (mirrored, moved, turned, zoomed, brightness, contrast) that the head learns from,
        beside the photo itself. Blocks see another copy each epoch. 0: nothing is altered.
    class_weights : bool
        Whether classes of few photos count as much as those of many.
    validation : float
        Share of each class that is held out for testing, 0..1, where the folder has no "val".
    seed : int
        The same photos, settings, versions and machine give the same weights.
    resume : bool
        Go on with a training that was interrupted.
    progress : callable, optional
        Called with a `TrainingProgress` after photos and epochs.

    Returns
    -------
    TrainingResult
        With the weights of the epoch that had the lowest loss on the photos held out.

    Raises
    ------
    ArgumentError
        An argument is wrong, the folder holds no photos of two or more classes, or the interrupted training had others.
    ModelError
        The weights cannot be had or do not fit, or the loss became infinite.
    MissingExtraError
        tensorflow or matplotlib is not installed.
    WriteError
        A file cannot be written, another training writes the same one, or there is an interrupted one and ``resume`` is
        not set.

    Examples
    --------
    >>> result = fastcam.finetune("photos", "dogs.keras", unfreeze=1)  # doctest: +SKIP
    >>> fastcam.export("dogs.keras", "dogs.onnx")  # doctest: +SKIP
    """
    settings = _Settings(
        backbone,
        None if weights is None else os.fspath(weights),
        size,
        tuple(hidden),
        dropout,
        epochs,
        learning_rate,
        unfreeze,
        fine_epochs,
        fine_learning_rate,
        batch,
        patience,
        augmentations,
        class_weights,
        validation,
        seed,
    )
    data, destination = Path(data_dir), Path(out)
    if destination.suffix.lower() != ".keras":
        raise ArgumentError(f"out={str(out)!r} must end in .keras")
    check_writable(destination)
    folder = destination.with_suffix(".training")
    if folder.resolve().is_relative_to(data.resolve()):
        raise ArgumentError(f"out={str(out)!r} lies in the folder of the photos: choose another place")
    if data.resolve().is_relative_to(folder.resolve()):
        raise ArgumentError(f"data_dir={str(data)!r} lies in {folder}, where the training keeps its own files: move it")
    check_folders(data)
    keras = _import_keras()
    chosen = find_backbone(keras, settings.backbone)
    _claim(folder)
    with locked(folder):
        return _Training(keras, settings, chosen, folder, progress or _say_nothing).run(data, destination, resume)


def _claim(folder: Path) -> None:
    """Make the folder of a training, or find that it is one: what lies in a folder of somebody else's stays there.

    Raises
    ------
    WriteError
        It cannot be made, or holds files and is no training's.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
        if not (folder / RECORD).exists():
            foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
            if foreign:
                raise WriteError(
                    f"{folder}: was not made by a training, and holds {foreign[0]!r}: move it, or choose another out"
                )
            _write_json(folder / RECORD, {"state": _NEW})


def _say_nothing(progress: TrainingProgress) -> None:
    pass


def _import_keras() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        # Without tensorflow, Keras names another package; matplotlib draws at the end: too late to find it missing.
        for name in ("tensorflow", "matplotlib"):
            importlib.import_module(name)
        import keras
    except ImportError as error:
        raise MissingExtraError(
            f'training needs tensorflow and matplotlib ({error}): pip install "fastcam[train]"'
        ) from error
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"Keras runs on {keras.backend.backend()!r} here, and fastcam trains with TensorFlow: set "
            "KERAS_BACKEND=tensorflow"
        )
    return keras


class _Training:
    """One training, in its folder."""

    def __init__(
        self,
        keras: Any,
        settings: _Settings,
        backbone: Backbone,
        folder: Path,
        progress: Callable[[TrainingProgress], None],
    ) -> None:
        self.keras = keras
        self.settings = settings
        self.folder = folder
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.backbone = backbone
        self.side = settings.size or backbone.side
        self.preprocessing = Preprocessing.of(backbone.preprocessing)

    def run(self, data: Path, destination: Path, resume: bool) -> TrainingResult:
        """Do what is left to do, and write the result."""
        with self._timed("photos"):
            photos = stage_photos(
                data,
                self.folder / "photos",
                self.side,
                self.settings.validation,
                self.settings.seed,
                lambda done, total: self.progress(TrainingProgress("photos", done, total, {})),
            )
        self._make_deterministic()
        network = self.backbone.build(self.keras, self.settings.weights, self.side)
        self._check_unfreeze(network)
        self._check_space(network)
        facts = self._facts(data, photos, network)
        self._open_record(facts, resume)
        try:
            return self._make(photos, network, destination, facts)
        except ModelError:
            # There is nothing to go on with: other settings are needed.
            _write_json(self.folder / RECORD, {"state": _FAILED, **facts})
            raise

    def _make(self, photos: Photos, network: Any, destination: Path, facts: dict[str, Any]) -> TrainingResult:
        model, head = self._models(network, len(photos.classes))
        history = self._fit_all(photos, network, model, head)
        confusion = self._confusion(photos, self._on_photos(model))
        write_learning_curves(history, self.folder / CURVES)
        write_confusion_matrix(confusion, photos.classes, self.folder / CONFUSION)
        self._save(model, destination, photos.classes)
        result = TrainingResult(
            path=destination,
            folder=self.folder,
            classes=photos.classes,
            accuracy=float(np.trace(confusion) / confusion.sum()),
            confusion=tuple(tuple(map(int, row)) for row in confusion),
            history={step: tuple(rows) for step, rows in history.items()},
            photos=len(photos.train),
            held_out=len(photos.val),
            skipped=photos.skipped,
            seconds={step: round(seconds, 3) for step, seconds in self.seconds.items()},
        )
        self._close_record(facts, result)
        return result

    # The record

    def _facts(self, data: Path, photos: Photos, network: Any) -> dict[str, Any]:
        """Return everything that the result depends on, as JSON types."""
        return {
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "side": self.side,
            "classes": list(photos.classes),
            "photos_sha256": _digest([photo.staged.name for photo in (*photos.train, *photos.val)]),
            "weights_sha256": _digest(network.get_weights()),
            "versions": {name: version(name) for name in ("fastcam", "keras", "numpy")},
            "data": str(data),
            "counts": {
                name: [sum(photo.label == label for photo in part) for label in range(len(photos.classes))]
                for name, part in ((TRAINING, photos.train), (VALIDATION, photos.val))
            },
            "held_out": [str(photo.source) for photo in photos.val],
            "skipped": list(photos.skipped),
        }

    def _open_record(self, facts: dict[str, Any], resume: bool) -> None:
        """Begin, or go on, and refuse to destroy or to mix."""
        earlier = _read_record(self.folder / RECORD)
        if earlier.get("state") == _RUNNING:
            if not resume:
                raise WriteError(
                    f"{self.folder}: holds an interrupted training: go on with resume=True (--resume), or remove the "
                    "folder"
                )
            differing = [
                name
                for name in ("settings", "side", "photos_sha256", "weights_sha256", "versions")
                if earlier.get(name) != facts[name]
            ]
            if differing:
                raise ArgumentError(
                    f"{self.folder}: the interrupted training had other {_differences(earlier, facts, differing)}: "
                    "give the same, or remove the folder"
                )
        else:
            with writing(self.folder):
                for step in ("head", "blocks", "network"):
                    shutil.rmtree(self.folder / step, ignore_errors=True)
        _write_json(self.folder / RECORD, {"state": _RUNNING, **facts})

    def _close_record(self, facts: dict[str, Any], result: TrainingResult) -> None:
        found = {name: getattr(result, name) for name in ("accuracy", "confusion", "history", "seconds")}
        _write_json(self.folder / RECORD, {"state": _DONE, **facts, **found})
        for step in result.history:
            shutil.rmtree(self.folder / step, ignore_errors=True)

    @contextlib.contextmanager
    def _timed(self, step: Step) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - begin

    # The networks

    def _make_deterministic(self) -> None:
        import tensorflow as tf

        self.keras.utils.set_random_seed(self.settings.seed)
        tf.config.experimental.enable_op_determinism()

    def _models(self, network: Any, class_count: int) -> tuple[Any, Any]:
        """Return the whole model, and its head by itself, which takes features; they share their layers."""
        layers = self.keras.layers
        hidden = [
            layers.Dense(units, activation="relu", name=f"head_dense_{number}")
            for number, units in enumerate(self.settings.hidden, start=1)
        ]
        dropout = layers.Dropout(self.settings.dropout, name="head_dropout")
        dense = [*hidden, dropout, layers.Dense(class_count, activation="softmax", name="predictions")]
        pooled = layers.GlobalAveragePooling2D(name="head_pool")(network.output)
        features = self.keras.Input(pooled.shape[1:])
        return self.keras.Model(network.input, _applied(dense, pooled)), self.keras.Model(
            features, _applied(dense, features)
        )

    def _on_photos(self, network: Any, *, augmented: bool = False) -> Any:
        """Return ``network`` behind what turns photos of 0..255 into its input, and alters them while it learns."""
        photos = self.keras.Input((self.side, self.side, 3))
        value = _applied(self._augmentations(), photos) if augmented else photos
        if self.preprocessing.order == "BGR":
            value = self.keras.ops.flip(value, axis=-1)
        mean, scale = (np.array(values, np.float32) for values in (self.preprocessing.mean, self.preprocessing.scale))
        return self.keras.Model(photos, network((value - mean) * scale))

    def _augmentations(self) -> list[Any]:
        layers = self.keras.layers
        return [
            layers.RandomFlip("horizontal"),
            layers.RandomTranslation(0.1, 0.1),
            layers.RandomRotation(0.04),
            layers.RandomZoom(0.15),
            layers.RandomBrightness(0.15, value_range=(0, 255)),
            layers.RandomContrast(0.2, value_range=(0, 255)),
        ]

    def _check_unfreeze(self, network: Any) -> None:
        count = len(find_blocks(network))
        if self.settings.unfreeze > count:
            raise ArgumentError(
                f"unfreeze={self.settings.unfreeze}: {self.backbone.name} has {count} blocks, of maps of one size each"
            )

    def _check_space(self, network: Any) -> None:
        """Refuse before a day of training what could not be kept: HDF5 does not survive a full disk."""
        # The best weights, those of the last two epochs with Adam's two averages, and the model.
        needed = 8 * sum(array.nbytes for array in network.get_weights())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise WriteError(
                f"{self.folder}: has {free / 1e6:.0f} MB of free space, and training {self.backbone.name} may take "
                f"{needed / 1e6:.0f} MB there: make room, or choose another out"
            )

    def _unfreeze(self, network: Any) -> None:
        """Let the last blocks learn, but for BatchNorm: its statistics would follow every small batch."""
        learning = {id(layer) for block in find_blocks(network)[-self.settings.unfreeze :] for layer in block}
        network.trainable = True
        for layer in network.layers:
            is_norm = isinstance(layer, self.keras.layers.BatchNormalization)
            layer.trainable = id(layer) in learning and not is_norm

    # The photos

    def _photos_of(self, part: str, *, shuffle: bool = False) -> Any:
        return self.keras.utils.image_dataset_from_directory(
            self.folder / "photos" / part,
            image_size=(self.side, self.side),
            batch_size=self.settings.batch,
            shuffle=shuffle,
            seed=self.settings.seed,
            verbose=False,
        )

    def _features(self, network: Any, photos: Photos) -> dict[str, Features]:
        """Return features and labels of both parts, those of altered copies included; computed once, then read."""
        pooled = self.keras.Model(network.input, self.keras.layers.GlobalAveragePooling2D()(network.output))
        extractor = self._on_photos(pooled)
        alter = self.keras.Sequential(self._augmentations())
        passes = [(VALIDATION, 0), *((TRAINING, number) for number in range(self.settings.augmentations + 1))]
        of_part: dict[str, Sequence[Photo]] = {TRAINING: photos.train, VALIDATION: photos.val}
        total = sum(len(of_part[part]) for part, _ in passes)
        weights = _digest(network.get_weights())
        arrays: dict[str, list[NDArray[np.float32]]] = {TRAINING: [], VALIDATION: []}
        kept = set()
        done = 0
        for part, number in passes:
            names = [photo.staged.name for photo in of_part[part]]
            altering = [self.settings.seed, number] if number else None
            made_of = [weights, asdict(self.preprocessing), names, self.settings.batch, altering]
            path = self.folder / "features" / f"{_digest(made_of)[:32]}.npy"
            kept.add(path)
            found = _read_array(path, (len(names), *pooled.output_shape[1:]))
            if found is None:
                batches = self._photos_of(part).map(lambda images, _: images)
                if number:
                    set_random_state(alter, self.settings.seed, number)
                    # Keras predicts as at inference, where nothing is altered, whatever a model says.
                    batches = batches.map(partial(alter, training=True))
                found = self._predict(extractor, batches, range(done, done + len(names)), total)
                with writing(path):
                    path.parent.mkdir(exist_ok=True)
                with replacing(path) as file:
                    np.save(file, found)
            else:
                self.progress(TrainingProgress("features", done + len(names), total, {}))
            arrays[part].append(found)
            done += len(names)
        for path in (self.folder / "features").iterdir():
            if path not in kept:
                path.unlink()
        labels = {part: np.array([photo.label for photo in members]) for part, members in of_part.items()}
        return {part: (np.concatenate(found), np.tile(labels[part], len(found))) for part, found in arrays.items()}

    def _predict(self, network: Any, batches: Any, photos: range, total: int) -> NDArray[np.float32]:
        def say(batch: int, logs: object) -> None:
            done = min(photos.start + (batch + 1) * self.settings.batch, photos.stop)
            self.progress(TrainingProgress("features", done, total, {}))

        callback = self.keras.callbacks.LambdaCallback()
        callback.on_predict_batch_end = say
        found: NDArray[np.float32] = network.predict(batches, verbose=0, callbacks=[callback])
        return found

    # Training

    def _fit_all(self, photos: Photos, network: Any, model: Any, head: Any) -> dict[str, list[Row]]:
        """Train step by step; return the figures of every epoch by step."""
        if self.settings.weights is None:
            return {"network": self._fit_on_photos("network", photos, model)}
        network.trainable = False
        with self._timed("features"):
            features = self._features(network, photos)
        history = {"head": self._fit_head(photos, head, features)}
        if self.settings.unfreeze:
            self._unfreeze(network)
            history["blocks"] = self._fit_on_photos("blocks", photos, model)
        return history

    def _fit_head(self, photos: Photos, head: Any, features: Mapping[str, Features]) -> list[Row]:
        import tensorflow as tf

        slices = {part: tf.data.Dataset.from_tensor_slices(found) for part, found in features.items()}
        count = len(slices[TRAINING])
        batches = slices[TRAINING].shuffle(count, seed=self.settings.seed)
        return self._fit("head", photos, head, batches.batch(self.settings.batch), slices[VALIDATION].batch(1024))

    def _fit_on_photos(self, step: Step, photos: Photos, model: Any) -> list[Row]:
        network = self._on_photos(model, augmented=self.settings.augmentations > 0)
        return self._fit(step, photos, network, self._photos_of(TRAINING, shuffle=True), self._photos_of(VALIDATION))

    def _fit(self, step: Step, photos: Photos, network: Any, batches: Any, validation: Any) -> list[Row]:
        settings = self.settings
        fine = step == "blocks"
        phase = Phase(
            step=step,
            epochs=settings.fine_epochs if fine else settings.epochs,
            steps=len(batches),
            learning_rate=settings.fine_learning_rate if fine else settings.learning_rate,
            patience=settings.patience,
            class_weight=_class_weights(photos) if settings.class_weights else {},
            seed=settings.seed,
        )

        def say(done: int, row: Row) -> None:
            self.progress(TrainingProgress(step, done, phase.epochs, row))

        with self._timed(step):
            return fit(self.keras, network, phase, batches.repeat(), validation, self.folder / step, say)

    # The result

    def _confusion(self, photos: Photos, network: Any) -> NDArray[np.int64]:
        found = network.predict(self._photos_of(VALIDATION), verbose=0).argmax(axis=1)
        counts = np.zeros((len(photos.classes), len(photos.classes)), np.int64)
        np.add.at(counts, ([photo.label for photo in photos.val], found), 1)
        return counts

    def _save(self, model: Any, destination: Path, classes: tuple[str, ...]) -> None:
        """Write the model and its labels; the file appears complete or not at all."""
        temporary = self.folder / "model.keras"
        with writing(temporary):
            model.save(temporary)
            write_labels(temporary, Labels(classes, self.preprocessing))
        with replacing(destination) as file, temporary.open("rb") as saved:
            shutil.copyfileobj(saved, file)
        temporary.unlink()


def _applied(layers: Sequence[Any], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def _class_weights(photos: Photos) -> dict[int, float]:
    """Return how much a photo of each class counts, 1 on average over the photos."""
    counts = np.bincount([photo.label for photo in photos.train], minlength=len(photos.classes))
    return {label: float(counts.sum() / (len(counts) * count)) for label, count in enumerate(counts)}


def _digest(parts: Sequence[Any]) -> str:
    """Return the SHA-256 of arrays and JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return digest.hexdigest()


def _read_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Read features, if they are there and whole."""
    try:
        found: NDArray[np.float32] = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape else None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WriteError(f"{path}: cannot be read ({error}): remove {path.parent} to begin anew") from error
    if not isinstance(found, dict):
        raise WriteError(f"{path}: is no record of a training: remove {path.parent} to begin anew")
    return found


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(facts, indent=1).encode())


def _differences(earlier: Mapping[str, Any], facts: Mapping[str, Any], names: Sequence[str]) -> str:
    """Say what differs, settings one by one."""
    if names[0] != "settings":
        return {"photos_sha256": "photos", "weights_sha256": "weights"}.get(names[0], names[0])
    before, now = earlier.get("settings", {}), facts["settings"]
    changed = [f"{name} was {before.get(name)!r}, not {now[name]!r}" for name in now if before.get(name) != now[name]]
    return f"settings ({', '.join(changed)})"
