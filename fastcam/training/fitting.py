"""A call of Keras' `fit` that can be killed at any moment and resumed with the same result.

After each epoch the weights, the state of the optimizer and the figures of the epoch are on disk. Everything random in
an epoch (dropout, altered photos, order) depends only on the seed and the number of the epoch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import replacing, writing

Row = dict[str, float]

_STATE = "state.json"
_BEST = "best.weights.h5"


@dataclass(frozen=True)
class Phase:
    """The parameters of a call of `fit`.

    Attributes
    ----------
    step : str
        Its name.
    epochs : int
    steps : int
        Batches per epoch.
    learning_rate : float
    patience : int
        Number of epochs without a lower validation loss after which training stops.
    class_weight : mapping of int to float
        Weight of a photo by label; empty if all count equally.
    seed : int
    """

    step: str
    epochs: int
    steps: int
    learning_rate: float
    patience: int
    class_weight: Mapping[int, float]
    seed: int


def fit(
    keras: Any,
    model: Any,
    phase: Phase,
    batches: Any,
    validation: Any,
    folder: Path,
    progress: Callable[[int, Row], None],
) -> list[Row]:
    """Train ``model``; it ends with the weights of the lowest validation loss, which may be its initial ones.

    Parameters
    ----------
    keras : module
    model : keras.Model
        A resumed call must start with the same weights.
    phase : Phase
    batches, validation : tf.data.Dataset
        Batches of inputs and labels. ``batches`` repeats without end, with the same batches in every process.
    folder : Path
        Where the state is stored; an interrupted call is continued from its state there.
    progress : callable
        Called with the number of finished epochs and the figures of the last one.

    Returns
    -------
    list of dict
        For each epoch "loss", "accuracy", "val_loss", "val_accuracy" and "seconds".

    Raises
    ------
    ModelError
        The loss became infinite.
    WriteError
        The folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
    model.compile(
        keras.optimizers.Adam(phase.learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.optimizer.build(model.trainable_variables)
    state = _State(folder)
    lowest = model.evaluate(validation, verbose=0, return_dict=True)["loss"]
    if state.rows:
        model.load_weights(state.weights)
        lowest = min(lowest, *(row["val_loss"] for row in state.rows))
    else:
        with writing(folder):
            model.save_weights(folder / _BEST)
    if not state.is_finished(phase.epochs):
        model.fit(
            batches.skip(len(state.rows) * phase.steps),
            steps_per_epoch=phase.steps,
            epochs=phase.epochs,
            initial_epoch=len(state.rows),
            validation_data=validation,
            class_weight=dict(phase.class_weight) or None,
            callbacks=_callbacks(keras, model, phase, state, lowest, progress),
            shuffle=False,
            verbose=0,
        )
    model.load_weights(folder / _BEST)
    return state.rows


def set_random_state(model: Any, seed: int, number: int) -> None:
    """Make the randomness of a model (dropout, altered photos) depend only on these two numbers."""
    generators = [variable for variable in model.variables if variable.name == "seed_generator_state"]
    for position, variable in enumerate(generators):
        variable.assign([(seed * 1009 + position) % 2**31, number * 2**20 % 2**31])


def _callbacks(
    keras: Any, model: Any, phase: Phase, state: _State, lowest: float, progress: Callable[[int, Row], None]
) -> list[Any]:
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=phase.patience)
    begin = 0.0

    def replay(logs: object) -> None:
        for epoch, row in enumerate(state.rows):
            stopping.on_epoch_end(epoch, row)

    def seed(epoch: int, logs: object) -> None:
        nonlocal begin
        begin = time.perf_counter()
        set_random_state(model, phase.seed, epoch)

    def remember(epoch: int, logs: Mapping[str, float]) -> None:
        row = {name: float(logs[name]) for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
        if not math.isfinite(row["loss"] + row["val_loss"]):
            raise ModelError(
                f"the loss became {row['loss']} in epoch {epoch + 1} of the {phase.step}: give a lower learning rate "
                f"than {phase.learning_rate:g}"
            )
        row["seconds"] = time.perf_counter() - begin
        with writing(state.folder):
            state.add(row, model)
        progress(epoch + 1, row)

    checkpoint = keras.callbacks.ModelCheckpoint(
        state.folder / _BEST,
        "val_loss",
        save_best_only=True,
        save_weights_only=True,
        initial_value_threshold=lowest,
    )
    keep_best = checkpoint.on_epoch_end

    def keep(epoch: int, logs: object) -> None:
        with writing(state.folder):
            keep_best(epoch, logs)

    checkpoint.on_epoch_end = keep
    # In this order: when the state is written, the best weights are on disk, and it is known whether training stops.
    return [
        checkpoint,
        stopping,
        keras.callbacks.LambdaCallback(on_train_begin=replay, on_epoch_begin=seed, on_epoch_end=remember),
    ]


class _State:
    """The finished epochs, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._stopped = False
        with suppress(OSError):
            found = json.loads((folder / _STATE).read_bytes())
            self.rows, self._stopped = found["rows"], found["stopped"]

    @property
    def weights(self) -> Path:
        """Path of the weights after the last epoch, with the state of the optimizer."""
        return self.folder / f"epoch-{len(self.rows):04}.weights.h5"

    def is_finished(self, epochs: int) -> bool:
        return self._stopped or len(self.rows) == epochs

    def add(self, row: Row, model: Any) -> None:
        """Save an epoch: first its weights, then the record that it is finished."""
        before = self.weights
        self.rows.append(row)
        self._stopped = bool(model.stop_training)
        model.save_weights(self.weights)
        with replacing(self.folder / _STATE) as file:
            file.write(json.dumps({"rows": self.rows, "stopped": self._stopped}).encode())
        before.unlink(missing_ok=True)
