"""What a child process may be asked to do with a model, well or badly."""

from __future__ import annotations

import os
import time

import onnx


def behave(model: onnx.ModelProto) -> onnx.ModelProto:
    """Do what the model's description says."""
    _DEEDS[model.doc_string](model)
    model.producer_name = "child"
    return model


def _refuse(model: onnx.ModelProto) -> None:
    raise ValueError("this one not")


_DEEDS = {
    "nothing": lambda model: None,
    "crash": lambda model: os.abort(),
    "leave": lambda model: os._exit(0),
    "hang": lambda model: time.sleep(60),
    "hog": lambda model: bytearray(2**40),
    "refuse": _refuse,
}
