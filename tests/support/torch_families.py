"""Small torch classifiers in the style of the usual families, their normalisations as after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from networks import Array

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
nn, functional = torch.nn, torch.nn.functional
Module: Any = nn.Module

SIDE, CLASSES = 32, 5


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> Any:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class _Residual(Module):
    """ResNet's basic block: one ReLU module, called twice, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + x)


class _Dense(Module):
    """DenseNet's layer: its output is concatenated with its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, x: Any) -> Any:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], 1)


class _Gate(Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int, act: Any) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), act()

    def forward(self, x: Any) -> Any:
        gate = functional.adaptive_avg_pool2d(x, 1)
        return x * self.act(self.up(functional.relu(self.down(gate))))


class _ConvNext(Module):
    """Depthwise convolution, then a dense block with the channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 16), nn.GELU(), nn.Linear(16, channels))
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Any) -> Any:
        y = self.gamma * self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class _Branches(Module):
    """Inception's module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.three = _conv(channels, 4, 1), _conv(channels, 4, 3)
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(channels, 4, 1))

    def forward(self, x: Any) -> Any:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class _Shuffled(Module):
    """ShuffleNet's unit: half of the channels pass through, then both halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _conv(channels // 2, channels // 2)

    def forward(self, x: Any) -> Any:
        left, right = x.chunk(2, dim=1)
        joined = torch.stack([left, self.branch(right)], dim=2)
        return joined.view(x.size(0), -1, *x.shape[2:])


class _Classifier(Module):
    def __init__(self, features: Any, channels: int) -> None:
        super().__init__()
        self.features = features
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5), nn.Linear(channels, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.fc(self.drop(torch.flatten(self.pool(self.features(x)), 1)))


class Vgg(Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES))

    def forward(self, x: Any) -> Any:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def stacked(*blocks: Any, channels: int = 8) -> Any:
    return _Classifier(nn.Sequential(_conv(3, 8, stride=2), *blocks), channels)


# The network's factory, its last layer with a map, and one in the middle.
FAMILIES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "ResNet": (lambda: stacked(_Residual(8), _Residual(8)), "features.2", "features.1.bn1"),
    "DenseNet": (lambda: stacked(_Dense(8), _Dense(12), channels=16), "features.2", "features.1"),
    "MobileNetV3": (
        lambda: stacked(_conv(8, 8, groups=8, act=nn.Hardswish), _Gate(8, nn.Hardsigmoid), _conv(8, 8, 1)),
        "features.3.2",
        "features.2",
    ),
    "EfficientNet": (
        lambda: stacked(_conv(8, 8, groups=8, act=nn.SiLU), _Gate(8, nn.Sigmoid), _conv(8, 8, 1, act=nn.SiLU)),
        "features.3.2",
        "features.1.2",
    ),
    "ConvNeXt": (lambda: stacked(_ConvNext(8), _ConvNext(8)), "features.2", "features.1"),
    "Inception": (lambda: stacked(_Branches(8), _Branches(12), channels=12), "features.2", "features.1.three.2"),
    "RegNet": (
        lambda: stacked(_conv(8, 8, stride=2, groups=2), _conv(8, 8, groups=4)),
        "features.2.2",
        "features.1.2",
    ),
    "ShuffleNet": (lambda: stacked(_Shuffled(8), _Shuffled(8)), "features.2.branch.2", "features.1"),
    "VGG": (Vgg, "features.4", "features.1"),
}


def family(name: str) -> Any:
    torch.manual_seed(3)
    model = FAMILIES[name][0]()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            # As after training.
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.8, 1.2)
            nn.init.uniform_(part.bias, -0.1, 0.1)
    return model.eval()


def images_for(count: int = 2) -> Array:
    return np.random.default_rng(1).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)


def scores_and_activations(model: Any, layer: str, images: Array) -> tuple[Any, Any]:
    """Return a module's outputs for images, and its layer's output, for torch's autograd.

    For a layer that is called several times it is the last call's.
    """
    kept: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> Any:
        kept.append(output)
        # A later module may overwrite it in place.
        return output.clone()

    hook = model.get_submodule(layer).register_forward_hook(keep)
    scores = model(torch.tensor(images))
    hook.remove()
    return scores, kept[-1]
