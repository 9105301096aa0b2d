"""fastcam: image classifiers that explain themselves, wherever ONNX runs.

The path of the data::

    Keras model / .keras / .h5 / .onnx
      -> export      one .onnx file: scores, activations, and the gradients of the requested scores
      -> Explainer   the file in ONNX Runtime, and a fused kernel for the heatmaps
      -> Explanation scores, heatmaps, overlays

>>> import fastcam
>>> fastcam.export(model, "dogs.onnx", classes=["beagle", "pug"])  # doctest: +SKIP
>>> explanation = fastcam.Explainer("dogs.onnx")("dog.jpg")  # doctest: +SKIP
>>> explanation[0].save("why.png")  # doctest: +SKIP
"""

import importlib
from typing import Any

import lazy_loader


def _refuse_sub_interpreters() -> None:
    """Raise ImportError in a sub-interpreter, where loading the compiled modules would hang."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # since Python 3.13, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "fastcam does not run in a sub-interpreter, nor does NumPy: import it in the main interpreter "
                "(with mod_wsgi: WSGIApplicationGroup %{GLOBAL})"
            )
        return


_refuse_sub_interpreters()

# `__init__.pyi` is the only list of public names. They are loaded on first use: importing onnx alone takes longer
# than a service that only runs an Explainer should have to wait.
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastcam")
    return _load(name)
