"""Score-CAM and Ablation-CAM: fastcam beside torchcam and pytorch-grad-cam, on a VGG16, from interleaved runs.

python -m bench.reruns [--rounds 3] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastcam

from . import shims
from .networks import drawn_images, small, vgg16

_CLASS = 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.reruns", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small VGG instead of VGG16")
    options = parser.parse_args()
    network = small() if options.small else vgg16()
    with tempfile.TemporaryDirectory() as folder:
        contestants = _contestants(network, Path(folder))
        print(f"load: {os.getloadavg()[0]:.2f}")
        for run in contestants.values():
            run()
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        maps: dict[str, Any] = {}
        for _ in range(options.rounds):
            for name, run in contestants.items():
                begin = time.perf_counter()
                maps[name] = run()
                samples[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    plain = medians["plain forward pass, ONNX Runtime"]
    for name, median in medians.items():
        print(f"{name:40} {median * 1e3:10.1f} ms  {median / plain:8.2f} forward passes")
    for method in ("Score-CAM", "Ablation-CAM"):
        own = medians[f"{method}, fastcam"]
        for name in (name for name in medians if name.startswith(method) and not name.endswith("fastcam")):
            difference = _difference(maps[f"{method}, fastcam"], maps[name])
            print(f"{name}: fastcam takes {own / medians[name]:.3f} of its time; maps differ by {difference:.1e}")
    print(json.dumps(samples))


def _difference(own: Any, theirs: Any) -> float:
    """Return the relative L2 distance of two maps, each divided by its largest magnitude."""
    one, two = (np.asarray(each, np.float64) / np.abs(each).max() for each in (own, theirs))
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def _contestants(network: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    import onnxruntime

    shims.install()
    import torch
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import ScoreCAM

    model = network.to_onnx()
    fastcam.export(model, folder / "explained.onnx")
    (folder / "plain.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(folder / "plain.onnx")
    explainer = fastcam.Explainer(folder / "explained.onnx")
    images = drawn_images(1, (network.channels, network.side, network.side))
    features, head = network.to_torch()
    module = torch.nn.Sequential(features, head).eval()
    tensor = torch.from_numpy(images)
    target = [ClassifierOutputTarget(_CLASS)]
    score = ScoreCAM(module, "0", input_shape=images.shape[1:], batch_size=16)
    ablation = AblationCAM(model=module, target_layers=[features])
    ablation.batch_size = 16
    activations = features(tensor).detach()

    def own(method: str, normalize: str | None = None) -> Any:
        return explainer(images, _CLASS, method=method, normalize=normalize, size="layer").maps[0, 0]

    def torchcams() -> Any:
        scores = module(tensor.clone().requires_grad_())
        return score(_CLASS, scores, normalized=False)[0][0].detach().numpy()

    def grad_cams() -> Any:
        weights = ablation.get_cam_weights(tensor, features, target, activations.numpy(), None)
        # Their weights are divided by the score, whose sign turns the map around.
        sign = 1 if float(module(tensor)[0, _CLASS].detach()) > 0 else -1
        return sign * np.einsum("c,chw->hw", weights[0], activations[0].numpy())

    name = session.get_inputs()[0].name
    return {
        "plain forward pass, ONNX Runtime": lambda: session.run(None, {name: images}),
        "Grad-CAM, fastcam": lambda: own("gradcam"),
        "Ablation-CAM, fastcam": lambda: own("ablationcam", "signed"),
        "Score-CAM, fastcam": lambda: own("scorecam"),
        "Ablation-CAM, pytorch-grad-cam": grad_cams,
        "Score-CAM, torchcam": torchcams,
    }


if __name__ == "__main__":
    main()
