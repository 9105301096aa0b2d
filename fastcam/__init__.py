"""fastcam: image classifiers that explain themselves, wherever ONNX runs.

The way of the data::

    Keras model / .keras / .h5 / .onnx
      -> export      one .onnx file: scores, activations, and the gradients of the scores that are asked for
      -> Explainer   the file in ONNX Runtime, and a fused kernel for the heatmaps
      -> Explanation scores, heatmaps, overlays

>>> import fastcam
>>> fastcam.export(model, "dogs.onnx", classes=["beagle", "pug"])  # doctest: +SKIP
>>> explanation = fastcam.Explainer("dogs.onnx")("dog.jpg")  # doctest: +SKIP
>>> explanation[0].save("why.png")  # doctest: +SKIP
"""

from typing import Any

import lazy_loader

# `__init__.pyi` is the one list of public names. They are loaded when first used: onnx alone takes longer to import
# than a service that only runs an Explainer should wait.
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastcam")
    return _load(name)
