"""A fit that is interrupted between any two epochs ends like an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcam.errors import ModelError
from fastcam.training.fitting import Phase, Row, fit

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[train]")
tf = pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")


def _model() -> Any:
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential([keras.Input((4,)), layers.Dropout(0.3), layers.Dense(2, activation="softmax")])


def _data(*, contrary: bool) -> tuple[Any, Any]:
    """Endless batches, and a validation set with the same or the opposite labels."""
    inputs = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int64)
    batches = tf.data.Dataset.from_tensor_slices((inputs, labels)).shuffle(20, seed=1).batch(5).repeat()
    expected = 1 - labels if contrary else labels
    return batches, tf.data.Dataset.from_tensor_slices((inputs, expected)).batch(20)


def _phase(**changes: Any) -> Phase:
    fields = {"step": "head", "epochs": 6, "steps": 4, "learning_rate": 0.05, "patience": 3, "class_weight": {}}
    return Phase(**{**fields, "seed": 0, **changes})


class _Interrupted(BaseException):
    pass


def _run(folder: Path, phase: Phase, *, contrary: bool = False, stop_after: int | None = None) -> tuple[Any, list[Row]]:
    model = _model()

    def progress(done: int, row: Row) -> None:
        if done == stop_after:
            raise _Interrupted

    return model, fit(keras, model, phase, *_data(contrary=contrary), folder, progress)


def _figures(rows: list[Row]) -> list[Row]:
    return [{**row, "seconds": 0} for row in rows]


@pytest.mark.parametrize("contrary", [False, True])
def test_interruptions_change_nothing(tmp_path: Path, *, contrary: bool) -> None:
    model, rows = _run(tmp_path / "whole", _phase(), contrary=contrary)
    for epoch in range(1, len(rows)):
        with pytest.raises(_Interrupted):
            _run(tmp_path / "parts", _phase(), contrary=contrary, stop_after=epoch)
    other, others = _run(tmp_path / "parts", _phase(), contrary=contrary)
    assert _figures(others) == _figures(rows)
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_it_stops_when_nothing_gets_better_and_keeps_what_was_best(tmp_path: Path) -> None:
    model, rows = _run(tmp_path / "fit", _phase(), contrary=True)
    losses = [row["val_loss"] for row in rows]
    assert len(rows) < 6
    assert losses == sorted(losses)
    # The initial weights were the best, and a stopped training is not continued.
    for one, two in zip(model.get_weights(), _model().get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert _run(tmp_path / "fit", _phase(), contrary=True)[1] == rows


def test_the_model_has_the_weights_of_its_best_epoch(tmp_path: Path) -> None:
    model, rows = _run(tmp_path / "fit", _phase(learning_rate=2.0, patience=6))
    model.compile(loss="sparse_categorical_crossentropy")
    found = model.evaluate(_data(contrary=False)[1], verbose=0, return_dict=True)["loss"]
    losses = [row["val_loss"] for row in rows]
    assert found == pytest.approx(min(losses), rel=1e-5)
    assert losses[-1] > min(losses)


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    batches, validation = _data(contrary=False)
    spoilt = batches.map(lambda inputs, labels: (inputs * np.float32(np.nan), labels))
    with pytest.raises(ModelError, match=r"became (nan|inf) in epoch 1 of the head: .* than 0\.05"):
        fit(keras, _model(), _phase(), spoilt, validation, tmp_path / "fit", lambda done, row: None)
