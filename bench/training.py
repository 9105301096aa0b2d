"""How much time is saved by computing the frozen network's features once: `python -m bench.training`.

Times an epoch of a head for 15 classes, with Keras' `fit`: on the features that `fastcam.finetune` stores, and
through the frozen VGG16 that computes them. Both learn from the same photos; the network's weights do not affect the
time. Prints both, and the time of 30 epochs either way.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.harness import Pace, interleave, save, table

_CLASSES = 15
_BATCH = 32
_EPOCHS = 30
_PACKAGES = ("fastcam", "tensorflow", "keras", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=60, help="of timing")
    options = parser.parse_args()
    timings = interleave(_contestants(options.photos), Pace(options.seconds, slow=math.inf))
    once, cached, whole = (timings[name].median for name in ("features, once", "epoch on them", "epoch through all"))
    rows = [
        (name, f"{timing.median:.3f} s", f"{timing.spread[0]:.3f}..{timing.spread[1]:.3f} s")
        for name, timing in timings.items()
    ]
    print(table([f"{options.photos} photos, VGG16", "median", "quartiles"], rows))
    total = (once + _EPOCHS * cached, _EPOCHS * whole)
    print(
        f"{_EPOCHS} epochs: {total[0]:.0f} s with kept features, {total[1]:.0f} s without: {total[1] / total[0]:.1f} x"
    )
    samples = {name: timing.samples for name, timing in timings.items()}
    print(save("training", _PACKAGES, {"photos": options.photos, "epochs": _EPOCHS, "samples": samples}))


def _contestants(count: int) -> dict[str, Callable[[], object]]:
    import keras

    generator = np.random.default_rng(0)
    photos = generator.integers(0, 256, (count, 224, 224, 3)).astype(np.float32)
    labels = generator.integers(0, _CLASSES, count)
    frozen = keras.applications.VGG16(weights=None, include_top=False, pooling="avg", input_shape=(224, 224, 3))
    frozen.trainable = False
    features = frozen.predict(photos, batch_size=_BATCH, verbose=0)
    np.testing.assert_allclose(frozen.predict(photos[:2], verbose=0), features[:2], rtol=1e-4, atol=1e-5)
    head = _compiled(keras, keras.Sequential([keras.Input(features.shape[1:]), *_head(keras)]))
    whole = _compiled(keras, keras.Sequential([frozen, *_head(keras)]))

    def epoch(model: Any, inputs: Any) -> Callable[[], object]:
        return lambda: model.fit(inputs, labels, batch_size=_BATCH, epochs=1, verbose=0)

    return {
        "features, once": lambda: frozen.predict(photos, batch_size=_BATCH, verbose=0),
        "epoch on them": epoch(head, features),
        "epoch through all": epoch(whole, photos),
    }


def _head(keras: Any) -> list[Any]:
    return [keras.layers.Dropout(0.2), keras.layers.Dense(_CLASSES, activation="softmax")]


def _compiled(keras: Any, model: Any) -> Any:
    model.compile(keras.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy", jit_compile=False)
    return model


if __name__ == "__main__":
    main()
