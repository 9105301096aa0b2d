"""A detector of the size and structure of YOLOv8n, with random weights: 3.2 million of them, 8.7 GFLOP at 640 x 640."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Networks derive from a class that has no types here.
Module: Any = nn.Module
Sequential: Any = nn.Sequential

CLASSES = 80
_BINS = 16


class _Conv(Sequential):
    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after), nn.SiLU()
        )


class _C2f(Module):
    """Split, bottlenecks in a row, all results joined."""

    def __init__(self, before: int, after: int, count: int, *, shortcut: bool) -> None:
        super().__init__()
        self.half = after // 2
        self.shortcut = shortcut
        self.first = _Conv(before, after)
        self.last = _Conv((2 + count) * self.half, after)
        self.blocks = nn.ModuleList(
            nn.Sequential(_Conv(self.half, self.half, 3), _Conv(self.half, self.half, 3)) for _ in range(count)
        )

    def forward(self, value: Any) -> Any:
        parts = list(self.first(value).split((self.half, self.half), 1))
        for block in self.blocks:
            made = block(parts[-1])
            parts.append(parts[-1] + made if self.shortcut else made)
        return self.last(torch.cat(parts, 1))


class _Pyramid(Module):
    """Spatial pyramid pooling: three poolings in a row, joined."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.last = _Conv(size, size // 2), _Conv(2 * size, size)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, value: Any) -> Any:
        parts = [self.first(value)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class YoloV8n(Module):
    """Images (N,3,640,640) to (N,84,8400): boxes as centres and sizes in pixels, and 80 probabilities."""

    def __init__(self, side: int = 640) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _Conv(3, 16, 3, 2), _Conv(16, 32, 3, 2), _C2f(32, 32, 1, shortcut=True), _Conv(32, 64, 3, 2)
        )
        self.p3 = _C2f(64, 64, 2, shortcut=True)
        self.p4 = nn.Sequential(_Conv(64, 128, 3, 2), _C2f(128, 128, 2, shortcut=True))
        self.p5 = nn.Sequential(_Conv(128, 256, 3, 2), _C2f(256, 256, 1, shortcut=True), _Pyramid(256))
        self.up = nn.Upsample(scale_factor=2.0)
        self.n4, self.n3 = _C2f(384, 128, 1, shortcut=False), _C2f(192, 64, 1, shortcut=False)
        self.d3, self.o4 = _Conv(64, 64, 3, 2), _C2f(192, 128, 1, shortcut=False)
        self.d4, self.o5 = _Conv(128, 128, 3, 2), _C2f(384, 256, 1, shortcut=False)
        sizes = (64, 128, 256)
        self.boxes = nn.ModuleList(
            nn.Sequential(_Conv(c, 64, 3), _Conv(64, 64, 3), nn.Conv2d(64, 4 * _BINS, 1)) for c in sizes
        )
        self.scores = nn.ModuleList(
            nn.Sequential(_Conv(c, 80, 3), _Conv(80, 80, 3), nn.Conv2d(80, CLASSES, 1)) for c in sizes
        )
        centres, strides = [], []
        for stride in (8, 16, 32):
            cells = side // stride
            y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
            centres.append(torch.stack([x, y]).reshape(2, -1).float() + 0.5)
            strides.append(torch.full((1, cells * cells), float(stride)))
        self.register_buffer("centres", torch.cat(centres, 1)[None])
        self.register_buffer("strides", torch.cat(strides, 1)[None])
        self.register_buffer("bins", torch.arange(float(_BINS)).view(1, _BINS, 1, 1))

    def features(self, images: Any) -> list[Any]:
        """Return the inputs of the heads."""
        p3 = self.p3(self.stem(images))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        o4 = self.o4(torch.cat([self.d3(n3), n4], 1))
        return [n3, o4, self.o5(torch.cat([self.d4(o4), p5], 1))]

    def head(self, maps: list[Any]) -> tuple[Any, Any]:
        """Return raw distances (N,64,A) and class logits (N,80,A)."""
        levels = [
            torch.cat([box(one), score(one)], 1).flatten(2)
            for one, box, score in zip(maps, self.boxes, self.scores, strict=True)
        ]
        joined: Any = torch.cat(levels, 2)
        raw, scores = joined.split((4 * _BINS, CLASSES), 1)
        return raw, scores

    def forward(self, images: Any) -> Any:
        """Return boxes and probabilities, as Ultralytics' export does."""
        raw, scores = self.head(self.features(images))
        shares = raw.view(raw.shape[0], 4, _BINS, -1).transpose(2, 1).softmax(1)
        near, far = (shares * self.bins).sum(1).chunk(2, 1)
        first, last = self.centres - near, self.centres + far
        return torch.cat([torch.cat([(first + last) / 2, last - first], 1) * self.strides, scores.sigmoid()], 1)
