"""The two halves of a classifier, cut at a layer."""

from __future__ import annotations

from typing import Any

import onnx

from ..arguments import check_lengths, check_pair, check_text, checked, optional
from ..graph import split_graph
from .classifier import open_classifier
from .importers import ImportOptions, ModelSource


@checked(
    layer=optional(check_text),
    output=optional(check_text),
    input_size=optional(check_lengths),
    token_grid=optional(check_pair),
)
def split(
    model: ModelSource,
    layer: str | None = None,
    *,
    output: str | None = None,
    input_size: tuple[int, ...] | None = None,
    example_input: Any = None,
    token_grid: tuple[int, int] | None = None,
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Cut a classifier at a layer.

    Parameters
    ----------
    model, layer, output, input_size, example_input, token_grid
        As for `fastcam.export`, with one layer.

    Returns
    -------
    features : onnx.ModelProto
        Image -> the layer's output (N,C,h,w) float32, and every other value that the head also reads.
    head : onnx.ModelProto
        Those values -> logits (N,classes) float32, before softmax or sigmoid.

    Raises
    ------
    LayerError, ModelError
        As `fastcam.export` does.
    """
    options = ImportOptions(output, input_size, example_input)
    classifier = open_classifier(model, [layer], options, token_grid)
    features, head = split_graph(classifier.graph, classifier.layers[0])
    return features.to_model(name="features"), head.to_model(name="head")
