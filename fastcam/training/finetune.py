"""`finetune`: from a pretrained network and a folder of photos to a classifier, trained by Keras.

    photos -> staged photos -> features of the frozen backbone, once -> head -> last blocks -> .keras file

Everything that takes long is stored in a folder next to the result, so that an interrupted training continues where it
stopped and ends with the same weights: randomness depends on the seed and the epoch, never on what ran before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import check_callable, check_flag, check_path, checked, optional, renamed
from ..errors import ArgumentError, ModelError
from ..files import check_writable, locked, replacing, writing
from ..labels import Labels, write_labels
from ..preprocessing import Preprocessing
from .backbones import find_backbone
from .features import Features, compute_features
from .figures import write_confusion_matrix, write_learning_curves
from .fitting import Phase, Row, fit
from .networks import (
    Recipe,
    build_models,
    check_space,
    check_unfreeze,
    import_keras,
    make_deterministic,
    unfreeze_blocks,
)
from .photos import TRAINING, VALIDATION, Photos, check_folders, load_batches, stage_photos
from .record import (
    CONFUSION,
    CURVES,
    MODEL,
    STAGED,
    check_interrupted,
    claim_folder,
    close_failed,
    close_record,
    gather_facts,
    open_record,
)
from .results import Step, TrainingProgress, TrainingResult
from .settings import Settings


@renamed(batch="batch_size", validation="validation_split")
@checked(data_dir=check_path, out=check_path, resume=check_flag, progress=optional(check_callable))
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
    batch_size: int = 32,
    patience: int = 5,
    augmentations: int = 4,
    class_weights: bool = True,
    validation_split: float = 0.2,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Fine-tune a network of keras.applications on a folder of photos.

    The network's own classifier is replaced by global average pooling and fully connected layers for the classes in the
    folder. These are trained first, on features that the frozen network computes once for all epochs; then, optionally,
    together with the network's last blocks. The result is a plain Keras model in which `export` finds the class names
    and the preprocessing.

    Training sets the seeds of Python, NumPy and TensorFlow, and enables TensorFlow's deterministic ops, for the whole
    process.

    Parameters
    ----------
    data_dir : path
        Contains one folder of photos per class, named after it, or folders "train" and "val" that do.
    out : path
        The .keras file to write. Everything else is written to a folder of the same name with the suffix ".training".
    backbone : str
        Any classifier of keras.applications, for example "vgg16", "resnet50", "mobilenetv2" or "efficientnetb0".
    weights : "imagenet", path or None
        Weights of the backbone: the ImageNet weights, downloaded by Keras; a file of them, for a machine without
        internet access (its name ends in notop); or None for random ones, which trains the whole network from scratch.
    size : int, optional
        Height and width of the network's input, pixels; by default those that its ImageNet weights were trained with.
    hidden : sequence of int
        Units of fully connected ReLU layers before the last layer.
    dropout : float
        Dropout rate before the last layer, 0..1.
    epochs, fine_epochs : int
        Maximum number of epochs for the head (or for the whole network, without weights), and for the last blocks.
    learning_rate, fine_learning_rate : float
        Adam's learning rate in these epochs.
    unfreeze : int
        Number of blocks at the end of the backbone to train after the head. A block consists of the layers whose
        feature maps have the same size (block5 of VGG16). BatchNorm layers stay frozen.
    batch_size : int
        Number of photos in a batch.
    patience : int
        Stop after this many epochs without a lower validation loss.
    augmentations : int
        Number of randomly altered copies of each photo (flip, translation, rotation, zoom, brightness, contrast) that
        the head is trained on, in addition to the photo itself. Blocks see a different copy in every epoch. With 0,
        nothing is altered.
    class_weights : bool
        Whether to weight photos so that every class counts equally.
    validation_split : float
        Fraction of each class to hold out for validation, 0..1, unless the folder has a "val" folder.
    seed : int
        The same seed, photos, settings, versions and machine give the same weights.
    resume : bool
        Continue an interrupted training.
    progress : callable, optional
        Called with a `TrainingProgress` as photos and epochs finish.

    Returns
    -------
    TrainingResult
        The model has the weights of the epoch with the lowest validation loss.

    Raises
    ------
    ArgumentError
        An argument is invalid, the folder does not contain photos of two or more classes, or the interrupted training
        had other arguments.
    ModelError
        The weights are not available or do not fit, or the loss became infinite.
    MissingExtraError
        tensorflow or matplotlib is not installed.
    WriteError
        A file cannot be written, another training is writing it, or the folder contains an interrupted training and
        ``resume`` is not set.

    Examples
    --------
    >>> result = fastcam.finetune("photos", "dogs.keras", unfreeze=1)  # doctest: +SKIP
    >>> fastcam.export("dogs.keras", "dogs.onnx")  # doctest: +SKIP
    """
    settings = Settings(
        backbone=backbone,
        weights=None if weights is None else str(check_path("weights", weights, "'imagenet', a path, or None")),
        size=size,
        hidden=hidden,
        dropout=dropout,
        epochs=epochs,
        learning_rate=learning_rate,
        unfreeze=unfreeze,
        fine_epochs=fine_epochs,
        fine_learning_rate=fine_learning_rate,
        batch_size=batch_size,
        patience=patience,
        augmentations=augmentations,
        class_weights=class_weights,
        validation_split=validation_split,
        seed=seed,
    )
    data, destination = Path(data_dir), Path(out)
    folder = _check_places(data, destination)
    check_folders(data)
    keras = import_keras()
    chosen = find_backbone(keras, settings.backbone)
    claim_folder(folder)
    recipe = Recipe(keras, settings.size or chosen.side, Preprocessing.of(chosen.preprocessing))
    job = _Job(settings, recipe, folder, progress or (lambda step: None), {})
    with locked(folder):
        check_interrupted(folder, resume)
        photos = _stage(job, data)
        make_deterministic(keras, settings.seed)
        network = chosen.build(keras, settings.weights, recipe.side)
        check_unfreeze(network, chosen, settings.unfreeze)
        check_space(network, chosen, folder)
        facts = gather_facts(settings, recipe.side, data, photos, network)
        open_record(folder, facts)
        try:
            return _make(job, photos, network, destination, facts)
        except ModelError:
            # This cannot be continued: other settings are needed.
            close_failed(folder, facts)
            raise


def _check_places(data: Path, destination: Path) -> Path:
    """Return the folder of the training; raises if the result cannot be written, or one folder contains the other."""
    if destination.suffix.lower() != ".keras":
        raise ArgumentError(f"out={str(destination)!r} must end in .keras")
    check_writable(destination)
    folder = destination.with_suffix(".training")
    if folder.resolve().is_relative_to(data.resolve()):
        raise ArgumentError(f"out={str(destination)!r} is in the folder of the photos: choose another place")
    if data.resolve().is_relative_to(folder.resolve()):
        raise ArgumentError(f"data_dir={str(data)!r} is in {folder}, where the training keeps its own files: move it")
    return folder


@dataclass(frozen=True)
class _Job:
    """A training: its settings, its folder, and how it reports; ``seconds`` collects the duration of each step."""

    settings: Settings
    recipe: Recipe
    folder: Path
    progress: Callable[[TrainingProgress], None]
    seconds: dict[Step, float]

    @contextlib.contextmanager
    def timed(self, step: Step) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - begin

    def counter(self, step: Step) -> Callable[[int, int], None]:
        """Return a function that reports the number of finished photos."""
        return lambda done, total: self.progress(TrainingProgress(step, done, total, {}))

    def batches(self, part: str, *, shuffle: bool = False) -> Any:
        """Return the staged photos of a part."""
        settings = self.settings
        return load_batches(
            self.recipe.keras,
            self.folder / STAGED,
            part,
            self.recipe.side,
            settings.batch_size,
            settings.seed,
            shuffle=shuffle,
        )


def _stage(job: _Job, data: Path) -> Photos:
    settings = job.settings
    with job.timed("photos"):
        return stage_photos(
            data,
            job.folder / STAGED,
            job.recipe.side,
            settings.validation_split,
            settings.seed,
            job.counter("photos"),
        )


def _make(job: _Job, photos: Photos, network: Any, destination: Path, facts: Mapping[str, Any]) -> TrainingResult:
    """Train, and write the result."""
    model, head = build_models(job.recipe.keras, network, job.settings, len(photos.classes))
    history = _fit_all(job, photos, network, model, head)
    confusion = _confusion(photos, job.recipe.prepend(model).predict(job.batches(VALIDATION), verbose=0))
    write_learning_curves(history, job.folder / CURVES)
    write_confusion_matrix(confusion, photos.classes, job.folder / CONFUSION)
    _save(model, job.folder / MODEL, destination, Labels(photos.classes, job.recipe.preprocessing))
    result = TrainingResult(
        path=destination,
        folder=job.folder,
        classes=photos.classes,
        accuracy=float(np.trace(confusion) / confusion.sum()),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        history={step: tuple(rows) for step, rows in history.items()},
        photos=len(photos.train),
        held_out=len(photos.val),
        skipped=photos.skipped,
        seconds={step: round(seconds, 3) for step, seconds in job.seconds.items()},
    )
    close_record(job.folder, facts, result)
    return result


def _fit_all(job: _Job, photos: Photos, network: Any, model: Any, head: Any) -> dict[Step, list[Row]]:
    """Train step by step; return the figures of every epoch for each step."""
    if job.settings.weights is None:
        return {"network": _fit_on_photos(job, "network", photos, model)}
    network.trainable = False
    with job.timed("features"):
        features = compute_features(job.recipe, network, photos, job.settings, job.folder, job.counter("features"))
    history: dict[Step, list[Row]] = {"head": _fit_head(job, photos, head, features)}
    if job.settings.unfreeze:
        unfreeze_blocks(job.recipe.keras, network, job.settings.unfreeze)
        history["blocks"] = _fit_on_photos(job, "blocks", photos, model)
    return history


def _fit_head(job: _Job, photos: Photos, head: Any, features: Mapping[str, Features]) -> list[Row]:
    import tensorflow as tf

    slices = {part: tf.data.Dataset.from_tensor_slices(found) for part, found in features.items()}
    batches = slices[TRAINING].shuffle(len(slices[TRAINING]), seed=job.settings.seed).batch(job.settings.batch_size)
    return _fit(job, "head", photos, head, batches, slices[VALIDATION].batch(1024))


def _fit_on_photos(job: _Job, step: Step, photos: Photos, model: Any) -> list[Row]:
    network = job.recipe.prepend(model, augmented=job.settings.augmentations > 0)
    return _fit(job, step, photos, network, job.batches(TRAINING, shuffle=True), job.batches(VALIDATION))


def _fit(job: _Job, step: Step, photos: Photos, network: Any, batches: Any, validation: Any) -> list[Row]:
    settings = job.settings
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

    def report(done: int, row: Row) -> None:
        job.progress(TrainingProgress(step, done, phase.epochs, row))

    with job.timed(step):
        return fit(job.recipe.keras, network, phase, batches.repeat(), validation, job.folder / step, report)


def _class_weights(photos: Photos) -> dict[int, float]:
    """Return the weight of a photo for each class, 1 on average over all photos."""
    counts = np.bincount([photo.label for photo in photos.train], minlength=len(photos.classes))
    return {label: float(counts.sum() / (len(counts) * count)) for label, count in enumerate(counts)}


def _confusion(photos: Photos, scores: NDArray[np.float32]) -> NDArray[np.int64]:
    counts = np.zeros((len(photos.classes), len(photos.classes)), np.int64)
    np.add.at(counts, ([photo.label for photo in photos.val], scores.argmax(axis=1)), 1)
    return counts


def _save(model: Any, temporary: Path, destination: Path, labels: Labels) -> None:
    """Write the model and its labels; the file is written completely or not at all."""
    with writing(temporary):
        model.save(temporary)
        write_labels(temporary, labels)
    with replacing(destination) as file, temporary.open("rb") as saved:
        shutil.copyfileobj(saved, file)
    temporary.unlink()
