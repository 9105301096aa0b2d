"""Small torch detectors with the heads of the usual families, and the scalars and boxes that they mean.

Each gives its outputs as the family's own export does. ``parts`` returns what the oracle needs: the class logits
(N,A,C) before any activation, the boxes (N,A,4) as corners in pixels, and the inputs of the heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from networks import Array

torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
nn, functional = torch.nn, torch.nn.functional
Module: Any = nn.Module

SIDE = 64
CLASSES = 5


class Parts(NamedTuple):
    """See the module.

    Attributes
    ----------
    logits : tensor
        (N,A,C): of the probability that an anchor shows a class.
    boxes : tensor
        (N,A,4) left, top, right, bottom.
    maps : list of tensor
        The inputs of the heads.
    """

    logits: Any
    boxes: Any
    maps: list[Any]


class _Backbone(Module):
    """Three maps of 8, 16 and 32 channels, with strides of 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 8, 2), (8, 8, 2), (8, 16, 2), (16, 32, 2)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.SiLU()) for a, b, stride in sizes
        )

    def forward(self, images: Any) -> list[Any]:
        maps = []
        for block in self.blocks:
            images = block(images)
            maps.append(images)
        return maps[1:]


_CHANNELS = (8, 16, 32)
_STRIDES = (4, 8, 16)


_CUT: list[bool] = []
"""Not empty while the inputs of the heads count as independent."""


@contextlib.contextmanager
def independent_maps() -> Iterator[None]:
    """Let the inputs of the heads count as independent of each other: their gradients are partial ones."""
    _CUT.append(True)
    try:
        yield
    finally:
        _CUT.pop()


def _inputs(maps: list[Any]) -> list[Any]:
    return [one.detach().requires_grad_() for one in maps] if _CUT else maps


def _grid(features: Any, stride: int) -> Any:
    height, width = (int(side) for side in features.shape[2:])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], -1).reshape(1, -1, 2).float(), stride


def corners(boxes: Any) -> Any:
    """(cx,cy,w,h) as corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


class YoloV5(Module):
    """One output (N,A,5+C): sigmoid of everything, boxes decoded, three anchors per cell."""

    strides = _STRIDES

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.heads = nn.ModuleList(nn.Conv2d(c, 2 * (5 + CLASSES), 1) for c in _CHANNELS)

    def _raw(self, images: Any) -> tuple[list[Any], list[Any]]:
        maps = _inputs(self.backbone(images))
        raw = []
        for features, head in zip(maps, self.heads, strict=True):
            n, _, h, w = features.shape
            raw.append(head(features).view(n, 2, 5 + CLASSES, h, w).permute(0, 1, 3, 4, 2))
        return maps, raw

    def _decode(self, raw: Any, features: Any, stride: int) -> Any:
        n = raw.shape[0]
        h, w = (int(side) for side in features.shape[2:])
        grid = _grid(features, stride)[0].view(1, 1, h, w, 2)
        xy, wh, conf = raw.sigmoid().split((2, 2, CLASSES + 1), 4)
        xy = (xy * 2 + grid - 0.5) * stride
        wh = (wh * 2) ** 2 * torch.tensor([[8.0, 12.0], [20.0, 16.0]]).view(1, 2, 1, 1, 2)
        return torch.cat((xy, wh, conf), 4).view(n, 2 * h * w, 5 + CLASSES)

    def forward(self, images: Any) -> Any:
        maps, raw = self._raw(images)
        return torch.cat([self._decode(*item) for item in zip(raw, maps, _STRIDES, strict=True)], 1)

    def parts(self, images: Any) -> Parts:
        maps, raw = self._raw(images)
        decoded = torch.cat([self._decode(*item) for item in zip(raw, maps, _STRIDES, strict=True)], 1)
        flat = torch.cat([level.reshape(len(images), -1, 5 + CLASSES) for level in raw], 1)
        objectness, classes = flat[..., 4:5], flat[..., 5:]
        # log(p / (1 - p)) of p = sigmoid(o) sigmoid(c), without leaving float64's range.
        terms = torch.stack([-objectness.expand_as(classes), -classes, -objectness - classes])
        return Parts(-torch.logsumexp(terms, 0), corners(decoded[..., :4]), maps)


class YoloV8(Module):
    """One output (N,4+C,A): distances to the four sides, decoupled heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.boxes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1)) for c in _CHANNELS
        )
        self.scores = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, CLASSES, 1)) for c in _CHANNELS
        )

    def _raw(self, images: Any) -> tuple[list[Any], Any, Any]:
        """Class logits (N,C,A) and boxes (N,4,A) as centres and sizes."""
        maps = _inputs(self.backbone(images))
        levels, grids, strides = [], [], []
        for features, box, score, stride in zip(maps, self.boxes, self.scores, _STRIDES, strict=True):
            both = torch.cat([box(features), score(features)], 1)
            levels.append(both.flatten(2))
            grids.append(_grid(features, stride)[0][0] + 0.5)
            strides.append(torch.full((grids[-1].shape[0], 1), float(stride)))
        distances, classes = torch.cat(levels, 2).split((4, CLASSES), 1)
        centre, stride = torch.cat(grids).t()[None], torch.cat(strides).t()[None]
        near, far = functional.softplus(distances).chunk(2, 1)
        first, last = centre - near, centre + far
        boxes = torch.cat([(first + last) / 2, last - first], 1) * stride
        return maps, classes, boxes

    def forward(self, images: Any) -> Any:
        _, classes, boxes = self._raw(images)
        return torch.cat((boxes, classes.sigmoid()), 1)

    def parts(self, images: Any) -> Parts:
        maps, classes, boxes = self._raw(images)
        return Parts(classes.transpose(1, 2), corners(boxes.transpose(1, 2)), maps)


class YoloV10(YoloV8):
    """One output (N,R,6): the best boxes, sorted in the network, with scores and classes."""

    kept = 30

    def forward(self, images: Any) -> Any:
        _, classes, centred = self._raw(images)
        both = torch.cat((corners(centred.transpose(1, 2)), classes.sigmoid().transpose(1, 2)), -1)
        boxes, scores = both.split((4, CLASSES), -1)
        index = scores.amax(-1).topk(self.kept)[1].unsqueeze(-1)
        boxes = boxes.gather(1, index.repeat(1, 1, 4))
        scores = scores.gather(1, index.repeat(1, 1, CLASSES))
        best, flat = scores.flatten(1).topk(self.kept)
        rows = torch.div(flat, CLASSES, rounding_mode="floor").unsqueeze(-1).repeat(1, 1, 4)
        return torch.cat([boxes.gather(1, rows), best[..., None], (flat % CLASSES)[..., None].float()], -1)


class YoloX(Module):
    """One output (N,A,5+C), decoded or not: a stem per level, objectness beside the boxes."""

    strides = (8, 16, 32)

    def __init__(self, decodes: bool = True) -> None:
        super().__init__()
        self.decodes = decodes
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU())
        self.backbone = _Backbone()
        self.stems = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 8, 1), nn.SiLU()) for c in _CHANNELS)
        self.regs = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) for _ in _CHANNELS)
        self.clss = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) for _ in _CHANNELS)
        self.boxes = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in _CHANNELS)
        self.objectness = nn.ModuleList(nn.Conv2d(8, 1, 1) for _ in _CHANNELS)
        self.scores = nn.ModuleList(nn.Conv2d(8, CLASSES, 1) for _ in _CHANNELS)
        self.backbone.blocks[0][0] = nn.Conv2d(8, 8, 3, 2, 1)

    def _raw(self, images: Any) -> tuple[list[Any], list[Any]]:
        stems, raw = [], []
        for level, features in enumerate(self.backbone(self.first(images))):
            (stem,) = _inputs([self.stems[level](features)])
            reg = self.regs[level](stem)
            stems.append(stem)
            raw.append(
                (self.boxes[level](reg), self.objectness[level](reg), self.scores[level](self.clss[level](stem)))
            )
        return stems, raw

    def _decode(self, outputs: Any, stems: list[Any]) -> Any:
        grid = torch.cat([_grid(stem, 1)[0] for stem in stems], 1)
        stride = torch.cat(
            [
                torch.full((1, stem.shape[2] * stem.shape[3], 1), float(s))
                for stem, s in zip(stems, self.strides, strict=True)
            ],
            1,
        )
        return torch.cat([(outputs[..., :2] + grid) * stride, outputs[..., 2:4].exp() * stride, outputs[..., 4:]], -1)

    def forward(self, images: Any) -> Any:
        stems, raw = self._raw(images)
        levels = [torch.cat([box, obj.sigmoid(), score.sigmoid()], 1).flatten(2) for box, obj, score in raw]
        outputs = torch.cat(levels, 2).permute(0, 2, 1)
        return self._decode(outputs, stems) if self.decodes else outputs

    def parts(self, images: Any) -> Parts:
        stems, raw = self._raw(images)
        flat = torch.cat([torch.cat(level, 1).flatten(2) for level in raw], 2).permute(0, 2, 1)
        decoded = self._decode(flat, stems)
        objectness, classes = flat[..., 4:5], flat[..., 5:]
        terms = torch.stack([-objectness.expand_as(classes), -classes, -objectness - classes])
        return Parts(-torch.logsumexp(terms, 0), corners(decoded[..., :4]), stems)


class Ssd(Module):
    """Two outputs: softmax with the background first (N,A,1+C), and corners as shares of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.scores = nn.ModuleList(nn.Conv2d(c, 2 * (1 + CLASSES), 3, padding=1) for c in _CHANNELS)
        self.boxes = nn.ModuleList(nn.Conv2d(c, 2 * 4, 3, padding=1) for c in _CHANNELS)

    def _raw(self, images: Any) -> tuple[list[Any], Any, Any]:
        maps = _inputs(self.backbone(images))
        n = images.shape[0]
        logits = torch.cat(
            [
                head(features).permute(0, 2, 3, 1).reshape(n, -1, 1 + CLASSES)
                for head, features in zip(self.scores, maps, strict=True)
            ],
            1,
        )
        offsets = torch.cat(
            [head(f).permute(0, 2, 3, 1).reshape(n, -1, 4) for head, f in zip(self.boxes, maps, strict=True)], 1
        )
        priors = []
        for features, stride in zip(maps, _STRIDES, strict=True):
            centre = (_grid(features, stride)[0][0] + 0.5) * stride / SIDE
            sizes = [torch.full_like(centre, 1.5 * stride / SIDE), torch.full_like(centre, 3.0 * stride / SIDE)]
            priors.append(torch.stack([torch.cat([centre, size], -1) for size in sizes], 1).reshape(-1, 4))
        prior = torch.cat(priors)[None]
        centre = prior[..., :2] + 0.1 * offsets[..., :2] * prior[..., 2:]
        size = prior[..., 2:] * torch.exp(0.2 * offsets[..., 2:])
        return maps, logits, corners(torch.cat([centre, size], -1))

    def forward(self, images: Any) -> Any:
        _, logits, boxes = self._raw(images)
        return logits.softmax(-1), boxes

    def parts(self, images: Any) -> Parts:
        maps, logits, boxes = self._raw(images)
        return Parts(logits[..., 1:], boxes * SIDE, maps)


class Detr(Module):
    """Two outputs: raw logits of the queries with "no object" last (N,Q,C+1), centres and sizes as shares."""

    queries = 12

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.project = nn.Conv2d(32, 16, 1)
        self.query = nn.Parameter(torch.randn(self.queries, 16))
        self.score = nn.Linear(16, CLASSES + 1)
        self.box = nn.Linear(16, 4)

    def _raw(self, images: Any) -> tuple[list[Any], Any, Any]:
        (features,) = _inputs([self.project(self.backbone(images)[-1])])
        memory = features.flatten(2).transpose(1, 2)
        attention = (self.query @ memory.transpose(1, 2) / 4).softmax(-1)
        found = functional.relu(attention @ memory + self.query)
        return [features], self.score(found), self.box(found).sigmoid()

    def forward(self, images: Any) -> Any:
        _, logits, boxes = self._raw(images)
        return {"logits": logits, "pred_boxes": boxes}

    def parts(self, images: Any) -> Parts:
        maps, logits, boxes = self._raw(images)
        return Parts(logits[..., :CLASSES], corners(boxes) * SIDE, maps)


class RtDetr(Detr):
    """One output (N,Q,4+C): centres and sizes as shares, and the sigmoids of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, CLASSES)

    def forward(self, images: Any) -> Any:
        _, logits, boxes = self._raw(images)
        return torch.cat([boxes, logits.sigmoid()], -1)


class DetrWithCorners(Detr):
    """DETR whose boxes are turned to corners in the network, and fewer queries than boxes asked for."""

    queries = 6

    def forward(self, images: Any) -> Any:
        _, logits, boxes = self._raw(images)
        return {"logits": logits, "pred_boxes": corners(boxes)}


class TwoStageDetr(Module):
    """RT-DETR: the encoder selects its queries by a TopK, whose references the decoder refines."""

    queries = 12

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.projections = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in _CHANNELS)
        self.encoder_score, self.encoder_box = nn.Linear(16, CLASSES), nn.Linear(16, 4)
        self.score, self.box = nn.Linear(16, CLASSES), nn.Linear(16, 4)

    def _raw(self, images: Any) -> tuple[list[Any], Any, Any]:
        maps = _inputs([project(f) for project, f in zip(self.projections, self.backbone(images), strict=True)])
        memory = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        index = self.encoder_score(memory).max(-1).values.topk(self.queries, 1)[1].unsqueeze(-1)
        reference = self.encoder_box(memory).gather(1, index.repeat(1, 1, 4))
        query = memory.gather(1, index.repeat(1, 1, 16))
        found = functional.relu((query @ memory.transpose(1, 2) / 4).softmax(-1) @ memory + query)
        return maps, self.score(found), (self.box(found) + reference).sigmoid()

    def forward(self, images: Any) -> Any:
        _, logits, boxes = self._raw(images)
        return {"logits": logits.sigmoid(), "pred_boxes": boxes}

    def parts(self, images: Any) -> Parts:
        maps, logits, boxes = self._raw(images)
        return Parts(logits, corners(boxes) * SIDE, maps)


class ColumnYolo(YoloV8):
    """YOLOv8 whose anchors go down the columns of each map."""

    def _raw(self, images: Any) -> tuple[list[Any], Any, Any]:
        maps, classes, boxes = super()._raw(images)
        order, first = [], 0
        for features in maps:
            height, width = (int(side) for side in features.shape[2:])
            order.append(slice(first, first + height * width))
            first += height * width

        def turned(values: Any) -> Any:
            parts = [
                values[:, :, part].reshape(values.shape[0], values.shape[1], one.shape[2], one.shape[3])
                for part, one in zip(order, maps, strict=True)
            ]
            return torch.cat([part.transpose(2, 3).flatten(2) for part in parts], 2)

        return maps, turned(classes), turned(boxes)


class PicoDet(Module):
    """Two outputs per level: class scores, and distributions over the distances of the four sides, not decoded."""

    bins = 6

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU())
        self.backbone = _Backbone()
        self.backbone.blocks[0][0] = nn.Conv2d(8, 8, 3, 2, 1)
        self.scores = nn.ModuleList(nn.Conv2d(c, CLASSES, 3, padding=1) for c in _CHANNELS)
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4 * self.bins, 3, padding=1) for c in _CHANNELS)

    def _raw(self, images: Any) -> tuple[list[Any], list[Any], list[Any]]:
        maps = _inputs(self.backbone(self.first(images)))
        scores, boxes = (
            [head(features).flatten(2).transpose(1, 2) for head, features in zip(heads, maps, strict=True)]
            for heads in (self.scores, self.boxes)
        )
        return maps, scores, boxes

    def forward(self, images: Any) -> Any:
        _, scores, boxes = self._raw(images)
        return [*(score.sigmoid() for score in scores), *boxes]

    def parts(self, images: Any) -> Parts:
        maps, scores, boxes = self._raw(images)
        decoded = []
        for features, raw, stride in zip(maps, boxes, (8, 16, 32), strict=True):
            shares = raw.reshape(len(images), -1, 4, self.bins).softmax(-1)
            distances = (shares * torch.arange(self.bins)).sum(-1)
            centre = _grid(features, stride)[0] + 0.5
            decoded.append(torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1) * stride)
        return Parts(torch.cat(scores, 1), torch.cat(decoded, 1), maps)


DETECTORS: dict[str, Any] = {
    "yolov5": YoloV5,
    "yolov8": YoloV8,
    "yolov10": YoloV10,
    "yolox": YoloX,
    "yolox_raw": lambda: YoloX(decodes=False),
    "ssd": Ssd,
    "detr": Detr,
    "picodet": PicoDet,
    "rtdetr": RtDetr,
    "detr_corners": DetrWithCorners,
    "yolov8_columns": ColumnYolo,
}
SUPPRESSES = {"yolov5", "yolov8", "yolov8_columns", "yolox", "yolox_raw", "ssd", "picodet"}


def detector(name: str) -> Any:
    """A seeded detector whose scores differ between anchors, in evaluation mode."""
    torch.manual_seed(3)
    model = DETECTORS[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.2, 0.2)
    return model


def pictures(count: int = 2) -> Array:
    return np.random.default_rng(5).random((count, 3, SIDE, SIDE), dtype=np.float32)
