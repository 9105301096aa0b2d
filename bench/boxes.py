"""Explained boxes: what they cost, and where their maps point: ``python -m bench.boxes [MODEL PICTURE...]``.

Without arguments: a detector of YOLOv8n's size (random weights, 640 x 640). The time of its ten best boxes with their
maps is compared with ONNX Runtime's plain forward pass and with torch: one forward pass and ten reverse passes through
the heads. Interleaved runs, ratios of medians.

With an ONNX detector and pictures: for each box above the threshold, the share of its map's energy inside the box, and
whether the map has more of its energy in its own box than in any other, beside D-RISE (Petsiuk et al. 2021, eq. 1 and
2): the agreement of both maps, and the time of both. Results are written to results/boxes.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastcam
from fastcam.pictures.letterbox import letterbox
from fastcam.pictures.reading import read_image
from fastcam.preprocessing import Preprocessing

from .harness import Pace, interleave, save, table

PACKAGES = ("fastcam", "numpy", "onnxruntime", "torch")
_COUNT = 10
_SIDE = 640

Floats = NDArray[np.floating[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="an ONNX detector")
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--preprocess", default="imagenet", help="of the detector")
    parser.add_argument("--fit", default="stretch", choices=("stretch", "letterbox"))
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--masks", type=int, default=500, help="of D-RISE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explained.onnx"
        results = _cost(path) if arguments.model is None else _localisation(path, arguments)
    print(f"written to {save('boxes', PACKAGES, results)}")


def _cost(path: Path) -> dict[str, Any]:
    import torch

    from .yolo import YoloV8n

    torch.manual_seed(0)
    network: Any = YoloV8n(_SIDE).eval()
    with torch.no_grad():
        for head in network.scores:
            head[-1].bias.fill_(-1)
    image = torch.rand(1, 3, _SIDE, _SIDE)
    fastcam.export(network, path, example_input=image, score="boxes", preprocess="scale")
    plain = _plain(network, image, path.with_name("plain.onnx"))
    contestants = {"forward pass alone": plain}
    for name in ("auto", "onnxruntime"):
        contestants[f"fastcam, convolutions={name!r}"] = _explained(path, image.numpy(), name)
    contestants["torch, ten reverse passes"] = lambda: _torch(torch, network, image)
    timings = interleave(contestants, Pace(seconds=60))
    base = timings["forward pass alone"].median
    rows = [[name, f"{1e3 * one.median:.1f}", f"{one.median / base:.2f}"] for name, one in timings.items()]
    print(table(["ten boxes of YOLOv8n", "ms", "ratio"], rows))
    return {"cost": {name: list(one.samples) for name, one in timings.items()}}


def _plain(network: Any, image: Any, path: Path) -> Callable[[], object]:
    import onnxruntime
    import torch

    program: Any = torch.onnx.export(network, (image,), dynamo=True)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feeds)


def _explained(path: Path, image: Floats, convolutions: str) -> Callable[[], object]:
    explainer = fastcam.Explainer(path, device="cpu", convolutions=convolutions)
    return lambda: explainer(image, f"top{_COUNT}", threshold=0)


def _torch(torch: Any, network: Any, image: Any) -> None:
    with torch.no_grad():
        maps = network.features(image)
    maps = [one.requires_grad_() for one in maps]
    _, scores = network.head(maps)
    flat = scores[0].reshape(-1)
    for best in flat.topk(_COUNT).indices:
        gradients = torch.autograd.grad(flat[best], maps, retain_graph=True, allow_unused=True, materialize_grads=True)
        for one, gradient in zip(maps, gradients, strict=True):
            (one * gradient).sum(1).clamp(min=0)


def _localisation(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    fastcam.export(arguments.model, path, score="boxes", preprocess=arguments.preprocess, fit=arguments.fit)
    explainer = fastcam.Explainer(path, device="cpu")
    boxes: list[dict[str, Any]] = []
    for picture in arguments.pictures:
        boxes += _boxes_of(explainer, read_image(picture), arguments)
    energy, peer_energy = (float(np.mean([box[name] for box in boxes])) for name in ("inside", "peer_inside"))
    rivals = [box for box in boxes if box["own_preferred"] is not None]
    figures: dict[str, Any] = {
        "boxes": len(boxes),
        "energy inside the box": energy,
        "area of the box": float(np.mean([box["area"] for box in boxes])),
        "D-RISE, energy inside the box": peer_energy,
        "own box preferred": float(np.mean([box["own_preferred"] for box in rivals])) if rivals else None,
        "D-RISE, own box preferred": float(np.mean([box["peer_preferred"] for box in rivals])) if rivals else None,
        "peak inside the box": float(np.mean([box["peak_inside"] for box in boxes])),
        "correlation with D-RISE, median": float(np.median([box["correlation"] for box in boxes])),
        "seconds per picture": float(np.mean([box["seconds"] for box in boxes])),
        "D-RISE, seconds per picture": float(np.mean([box["peer_seconds"] for box in boxes])),
    }
    print(table(["figure", "value"], [[name, f"{value:.3g}"] for name, value in figures.items() if value is not None]))
    return {"localisation": {"model": arguments.model.name, **figures}}


def _boxes_of(explainer: fastcam.Explainer, picture: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return figures of each box of a picture."""
    height, width = explainer.input_size
    fitted = letterbox(picture, (height, width)) if explainer.fit == "letterbox" else picture
    tensor = explainer.prepare(picture)
    begin = time.perf_counter()
    explanation = explainer(tensor, threshold=arguments.threshold)[0]
    seconds = time.perf_counter() - begin
    if explanation.boxes is None or not len(explanation.boxes):
        return []
    begin = time.perf_counter()
    peers = _drise(explainer, fitted, explanation, arguments.masks)
    peer_seconds = time.perf_counter() - begin
    corners = np.clip(explanation.boxes, 0, [width, height] * 2).round().astype(int)
    areas = [(right - left) * (bottom - top) / (width * height) for left, top, right, bottom in corners]
    rows = []
    for k, own in enumerate(corners):
        heat, peer = explanation.heatmaps[k], peers[k]
        others = [box for position, box in enumerate(corners) if position != k]
        rows.append(
            {
                "inside": _inside(heat, own),
                "peer_inside": _inside(peer, own),
                "area": areas[k],
                "peak_inside": _holds_peak(heat, own),
                "own_preferred": all(_inside(heat, own) > _inside(heat, box) for box in others) if others else None,
                "peer_preferred": all(_inside(peer, own) > _inside(peer, box) for box in others) if others else None,
                "correlation": float(np.corrcoef(heat.ravel(), peer.ravel())[0, 1]),
                "seconds": seconds,
                "peer_seconds": peer_seconds,
            }
        )
    return rows


def _inside(heat: Floats, box: NDArray[np.int_]) -> float:
    left, top, right, bottom = box
    total = float(heat.sum())
    return float(heat[top:bottom, left:right].sum()) / total if total else 0.0


def _holds_peak(heat: Floats, box: NDArray[np.int_]) -> bool:
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    left, top, right, bottom = box
    return bool(top <= row < bottom and left <= column < right)


def _drise(explainer: fastcam.Explainer, picture: Any, explanation: Any, count: int) -> Floats:
    """Return the mean of random masks (16 x 16 cells, half of them open), weighted by how well each keeps a box.

    The weight is the largest product of overlap and probability of the class among the masked picture's boxes; D-RISE's
    third factor, the cosine of the class scores, is that probability here, because NMS leaves one class per box.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = explainer.input_size
    total = np.zeros((len(explanation.boxes), height, width))
    preprocessing = explainer.preprocessing or Preprocessing.of("none")
    base = np.asarray(Image.fromarray(picture).resize((width, height)), np.float32)
    for _ in range(count):
        cells = (rng.random((16, 16)) < 0.5).astype(np.float32)
        shift = rng.integers(0, (height // 16, width // 16))
        large = np.asarray(
            Image.fromarray(cells).resize((width + width // 16, height + height // 16), Image.Resampling.BILINEAR)
        )
        mask = large[shift[0] : shift[0] + height, shift[1] : shift[1] + width]
        pixels = base * mask[..., None]
        ordered = pixels if preprocessing.order == "RGB" else pixels[..., ::-1]
        tensor = ((ordered - preprocessing.mean) * preprocessing.scale).astype(np.float32)
        batch = tensor.transpose(2, 0, 1)[None] if explainer.input_layout == "NCHW" else tensor[None]
        found = explainer(np.ascontiguousarray(batch), "top20", threshold=0.01, size="layer")[0]
        for k, (label, box) in enumerate(zip(explanation.labels, explanation.boxes, strict=True)):
            kept = [
                _overlap(box, other) * float(score)
                for other, name, score in zip(found.boxes, found.labels, found.box_scores, strict=True)
                if name == label
            ]
            total[k] += max(kept, default=0.0) * mask
    # A map's level says nothing: the smallest value is its zero.
    return np.asarray(total - total.min(axis=(1, 2), keepdims=True), np.float32)


def _overlap(one: Floats, other: Floats) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    inside = float(np.prod(np.maximum(sides, 0)))
    areas = [float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other)]
    return inside / (sum(areas) - inside) if inside else 0.0


if __name__ == "__main__":
    main()
