"""Grad-CAM by every peer, with the same weights, and what each should return if fastcam's raw maps are right.

Every peer is called as its users would: its hooks are set once, and it explains one class after the other if it only
takes one at a time. `Peer.expected` expresses as formulas how the peers differ.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastcam
from fastcam import kernels
from fastcam.kernels.reference import normalized

from . import shims
from .networks import Vgg

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Size = tuple[int, int]
# From class indices to maps (N,K,h,w).
Explain = Callable[[Sequence[int]], NDArray[Any]]

_WORST_MAP = 0.1
_TOLERANCE = 1e-4


class Models:
    """One network in every framework, each created on first use."""

    def __init__(self, network: Vgg, folder: Path, threads: int) -> None:
        self.network = network
        self.threads = threads
        self.folder = folder

    @cached_property
    def explainer(self) -> fastcam.Explainer:
        """The exported file, opened."""
        path = self.folder / "explained.onnx"
        fastcam.export(self.network.to_onnx(), path)
        return fastcam.Explainer(path, threads=self.threads)

    @cached_property
    def torch(self) -> tuple[Any, Any]:
        """The torch modules up to the explained layer, and after it."""
        import torch

        torch.set_num_threads(self.threads)
        return self.network.to_torch()

    @cached_property
    def keras(self) -> Any:
        """The Keras model, up to its logits."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow as tf

        if tf.config.threading.get_intra_op_parallelism_threads() != self.threads:
            tf.config.threading.set_intra_op_parallelism_threads(self.threads)
        return self.network.to_keras()


@dataclass(frozen=True)
class Peer:
    """A way to compute Grad-CAM.

    Attributes
    ----------
    package
        The package to install, by its name on PyPI.
    make
        From the models and preprocessed images (N,C,H,W) to a function that explains classes.
    expected
        From raw maps (N,K,h,w) and the size of the images to the expected result.
    """

    package: str
    make: Callable[[Models, Floats], Explain]
    expected: Callable[[Doubles, Size], NDArray[Any]]


def _fastcam(models: Models, images: Floats) -> Explain:
    return lambda classes: models.explainer(images, list(classes)).heatmaps


def _torch_by_hand(models: Models, images: Floats, compiled: bool = False) -> Explain:
    """The minimum for torch: no graph before the layer, one pass after it, a gradient for each class."""
    import torch

    features, head = models.torch
    if compiled:
        # Beyond a few compilations of the same code it would silently run uncompiled.
        torch.compiler.reset()
        features, head = torch.compile(features, dynamic=False), torch.compile(head, dynamic=False)
    tensor = torch.from_numpy(images)

    def explain(classes: Sequence[int]) -> NDArray[Any]:
        with torch.no_grad():
            activations = features(tensor)
        activations.requires_grad_()
        scores = head(activations).sum(0)
        maps = []
        for target in classes:
            (gradient,) = torch.autograd.grad(scores[target], activations, retain_graph=True)
            with torch.no_grad():
                raw = torch.relu(torch.einsum("nchw,nc->nhw", activations, gradient.mean((2, 3))))
                maps.append(raw / raw.amax((1, 2), keepdim=True).clamp_min(1e-12))
        with torch.no_grad():
            stacked = torch.stack(maps, 1)
            resized = torch.nn.functional.interpolate(stacked, images.shape[2:], mode="bilinear")
        return np.asarray(resized.numpy())

    return explain


def _torch_compiled(models: Models, images: Floats) -> Explain:
    return _torch_by_hand(models, images, compiled=True)


def _whole_module(models: Models) -> tuple[Any, Any]:
    """Return the network as one module, and its explained layer: a separate copy, because hooks stay on it."""
    from torch import nn

    features, head = models.torch
    layer = nn.ReLU()
    return nn.Sequential(*features[:-1], layer, *head).eval(), layer


def _captum(models: Models, images: Floats) -> Explain:
    import torch
    from captum.attr import LayerAttribution, LayerGradCam

    method = LayerGradCam(*_whole_module(models))
    tensor = torch.from_numpy(images)

    def explain(classes: Sequence[int]) -> NDArray[Any]:
        found = [method.attribute(tensor, target=target, relu_attributions=True).detach() for target in classes]
        maps = torch.cat(found, 1)
        return np.asarray(LayerAttribution.interpolate(maps, images.shape[2:], "bilinear").numpy())

    return explain


def _torchcam(models: Models, images: Floats) -> Explain:
    import torch
    from torchcam.methods import GradCAM

    module, layer = _whole_module(models)
    method = GradCAM(module, layer, input_shape=images.shape[1:])
    tensor = torch.from_numpy(images)

    def explain(classes: Sequence[int]) -> NDArray[Any]:
        scores = module(tensor)
        maps = [method(target, scores, retain_graph=target != classes[-1])[0] for target in classes]
        return np.asarray(torch.stack(maps, 1).numpy())

    return explain


def _pytorch_grad_cam(models: Models, images: Floats) -> Explain:
    shims.install()
    import torch
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    module, layer = _whole_module(models)
    method = GradCAM(module, [layer])
    tensor = torch.from_numpy(images)

    def explain(classes: Sequence[int]) -> NDArray[Any]:
        return np.stack([method(tensor, [ClassifierOutputTarget(target)] * len(images)) for target in classes], 1)

    return explain


def _channels_last(images: Floats) -> Floats:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def _textbook(models: Models, images: Floats) -> Explain:
    tests = str(Path(__file__).parents[1] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from textbook import Textbook

    code = Textbook(models.keras, models.network.layer)
    pictures = [_channels_last(image[None]) for image in images]
    return lambda classes: np.stack([[code.heatmap(picture, target) for target in classes] for picture in pictures])


def _tf_keras_vis(models: Models, images: Floats) -> Explain:
    shims.install()
    from tf_keras_vis.gradcam import Gradcam
    from tf_keras_vis.utils.scores import CategoricalScore

    method = Gradcam(models.keras)
    pictures, layer = _channels_last(images), models.network.layer

    def explain(classes: Sequence[int]) -> NDArray[Any]:
        scores = [CategoricalScore([target] * len(images)) for target in classes]
        return np.stack([method(score, pictures, penultimate_layer=layer) for score in scores], 1)

    return explain


def _xplique(models: Models, images: Floats) -> Explain:
    shims.install()
    from xplique.attributions import GradCAM

    method = GradCAM(models.keras, output_layer=-1, conv_layer=models.network.layer, batch_size=len(images))
    pictures = _channels_last(images)
    identity = np.eye(models.keras.output_shape[-1], dtype=np.float32)

    def explain(classes: Sequence[int]) -> NDArray[Any]:
        wanted = [np.repeat(identity[target : target + 1], len(images), 0) for target in classes]
        return np.stack([np.asarray(method(pictures, each))[..., 0] for each in wanted], 1)

    return explain


def _raw_resized(raw: Doubles, size: Size) -> NDArray[Any]:
    return kernels.resize(raw.astype(np.float32), size)


def _max_resized(raw: Doubles, size: Size) -> NDArray[Any]:
    return kernels.resize(normalized(raw, "max").astype(np.float32), size)


def _minmax(raw: Doubles, size: Size) -> NDArray[Any]:
    return normalized(raw, "minmax")


def _resized_minmax(raw: Doubles, size: Size) -> NDArray[Any]:
    return normalized(kernels.resize(raw.astype(np.float32), size).astype(np.float64), "minmax")


def _zoomed_minmax(raw: Doubles, size: Size) -> NDArray[Any]:
    from scipy.ndimage import zoom

    factors = [wanted / found for wanted, found in zip(size, raw.shape[2:], strict=True)]
    return normalized(zoom(raw, [1, 1, *factors], order=1), "minmax")


def _bicubic(raw: Doubles, size: Size) -> NDArray[Any]:
    import tensorflow as tf

    resized = tf.image.resize(raw.transpose(0, 2, 3, 1), size, method="bicubic")
    return np.asarray(resized).transpose(0, 3, 1, 2)


def _divided(raw: Doubles, size: Size) -> NDArray[Any]:
    with np.errstate(invalid="ignore"):
        return np.asarray(raw / raw.max((2, 3), keepdims=True))


FASTCAM = "fastcam"
PEERS: dict[str, Peer] = {
    FASTCAM: Peer("fastcam", _fastcam, _max_resized),
    "torch, by hand": Peer("torch", _torch_by_hand, _max_resized),
    "torch.compile, by hand": Peer("torch", _torch_compiled, _max_resized),
    "captum": Peer("captum", _captum, _raw_resized),
    "torchcam": Peer("torchcam", _torchcam, _minmax),
    "pytorch-grad-cam": Peer("grad-cam", _pytorch_grad_cam, _resized_minmax),
    "textbook TensorFlow": Peer("tensorflow", _textbook, _divided),
    "tf-keras-vis": Peer("tf-keras-vis", _tf_keras_vis, _zoomed_minmax),
    "xplique": Peer("xplique", _xplique, _bicubic),
}


@dataclass(frozen=True)
class Agreement:
    """How far a peer's maps are from those predicted by fastcam's raw maps: relative L2 errors of individual maps."""

    median: float
    worst: float

    @property
    def holds(self) -> bool:
        """Whether they agree.

        Most maps have to, up to the rounding of two stacks of convolutions. If a hidden unit is within rounding of
        0, it is on for one and off for the other: such a kink legitimately changes a map by one unit of many.
        """
        return self.median <= _TOLERANCE and self.worst <= _WORST_MAP


def compare(found: NDArray[Any], expected: NDArray[Any]) -> Agreement:
    """Compare maps (N,K,h,w). NaN, which the textbook code returns for a map of zeros, must be where it is expected."""
    if found.shape != expected.shape or not np.array_equal(np.isnan(found), np.isnan(expected)):
        return Agreement(float("inf"), float("inf"))
    norms = np.linalg.norm(np.nan_to_num(expected), axis=(2, 3))
    errors = np.linalg.norm(np.nan_to_num(found - expected), axis=(2, 3)) / np.where(norms > 0, norms, 1)
    return Agreement(float(np.median(errors)), float(errors.max()))


def agreement(name: str, explain: Explain, raw: Floats, classes: Sequence[int], size: Size) -> Agreement:
    """Run a peer and check it against fastcam's raw maps."""
    return compare(
        np.asarray(explain(classes), np.float64),
        np.asarray(PEERS[name].expected(raw.astype(np.float64), size), np.float64),
    )
