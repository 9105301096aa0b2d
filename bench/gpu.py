"""Images per second on a GPU: the plain forward pass, with heatmaps, and PyTorch's tools.

``python -m bench.gpu`` builds torchvision's VGG16, ResNet50 and MobileNetV2 with random weights, exports them, and
times, interleaved, at batch sizes 1, 8 and 64, in float32 and float16: the plain network in ONNX Runtime,
`fastcam.Explainer` from images on the GPU to heatmaps on the GPU and from host to host, the network in PyTorch (eager
and compiled), and captum's and torchcam's Grad-CAM on both. It writes results/gpu.json. Before timing, it compares
fastcam's maps with captum's. TF32 is off everywhere.

``--device cpu`` runs the same on the CPU, to try the script on machines without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import fastcam
from fastcam.explaining.providers import find_problem

from .harness import Pace, Timing, interleave, save, table

PACKAGES = ("fastcam", "onnxruntime-gpu", "onnxruntime", "cupy-cuda13x", "torch", "torchvision", "captum", "torchcam")
# torchvision's networks, and the module whose maps are explained.
NETWORKS = {
    "VGG16": ("vgg16", "features.29"),
    "ResNet50": ("resnet50", "layer4"),
    "MobileNetV2": ("mobilenet_v2", "features.18"),
}
BATCHES = (1, 8, 64)
PRECISIONS = ("fp32", "fp16")
_TYPES = {"fp32": ("float32", np.float32), "fp16": ("float16", np.float16)}
# Relative L2 error of the maps against captum's: different convolution libraries, and half precision.
_TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}

Contestants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Subject:
    """One network in one precision, in every framework.

    Attributes
    ----------
    device : str
        "cuda" or "cpu".
    module, layer : torch.nn.Module
        The network in PyTorch, and the module in it that is explained.
    explainer : fastcam.Explainer
    plain : onnxruntime.InferenceSession
        The network alone.
    """

    device: str
    module: Any
    layer: Any
    explainer: fastcam.Explainer
    plain: onnxruntime.InferenceSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=10, help="of timing, for each network, precision and batch")
    options = parser.parse_args()
    _check_machine(options.device)
    rows: list[list[object]] = []
    results: list[dict[str, Any]] = []
    for network in options.networks:
        for precision in PRECISIONS if options.device == "cuda" else PRECISIONS[:1]:
            with _subject(network, precision, options.device) as subject:
                for batch in options.batches:
                    images = _images(batch, precision, options.device)
                    error = _validate(subject, images, precision)
                    contestants, failures = _working(_contestants(subject, images))
                    timings = interleave(contestants, Pace(options.seconds, turn=0.2))
                    rows += [_row(network, precision, batch, name, timing) for name, timing in timings.items()]
                    results.append(
                        {
                            "network": network,
                            "precision": precision,
                            "batch": batch,
                            "error": error,
                            "seconds": {name: timing.samples for name, timing in timings.items()},
                            "failures": failures,
                        }
                    )
    print(table(["network", "precision", "batch", "contestant", "ms", "images/s"], rows))
    print(f"written to {save('gpu', PACKAGES, {'device': _device_name(options.device), 'runs': results})}")


def _check_machine(device: str) -> None:
    """Exit with the reason if there is nothing to measure."""
    problem = find_problem(0) if device == "cuda" else None
    if problem is not None:
        sys.exit(f"there is no GPU to measure: {problem.reason}")
    try:
        for name in ("torch", "torchvision"):
            importlib.import_module(name)
        import torch
    except ImportError as error:
        sys.exit(f'the networks need torch and torchvision ({error}): pip install torchvision "fastcam[peers]"')
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"this torch ({torch.__version__}) was built without CUDA: install a build with CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@contextmanager
def _subject(network: str, precision: str, device: str) -> Iterator[Subject]:
    import torch
    import torchvision

    builder, layer = NETWORKS[network]
    torch.manual_seed(0)
    module = getattr(torchvision.models, builder)(weights=None).eval()
    example = torch.zeros(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted: dict[str, Any] = {} if precision == "fp32" else {"precision": precision}
        fastcam.export(module, folder / "explained.onnx", example_input=example, layer=layer, **wanted)
        module = module.to(device, getattr(torch, _TYPES[precision][0]))
        example = example.to(device, getattr(torch, _TYPES[precision][0]))
        torch.onnx.export(
            module,
            (example,),
            folder / "plain.onnx",
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
        yield Subject(
            device,
            module,
            module.get_submodule(layer),
            fastcam.Explainer(folder / "explained.onnx", device=device),
            _plain_session(folder / "plain.onnx", device),
        )


def _plain_session(path: Path, device: str) -> onnxruntime.InferenceSession:
    providers = {"cuda": [("CUDAExecutionProvider", {"use_tf32": "0"})], "cpu": ["CPUExecutionProvider"]}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=providers[device])
    if not session.get_providers()[0].lower().startswith(device):
        sys.exit(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    return session


def _images(batch: int, precision: str, device: str) -> Any:
    import torch

    images = np.random.default_rng(1).normal(size=(batch, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(images).to(device, getattr(torch, _TYPES[precision][0]))


def _contestants(subject: Subject, images: Any) -> Contestants:
    import torch

    tensor = images.float()
    host = tensor.cpu().numpy()
    count = len(images)
    on_device = subject.device == "cuda"
    compiled = torch.compile(subject.module)
    contestants: Contestants = {
        "ONNX Runtime, plain": _plain_run(subject, images),
        "fastcam, host to host": lambda: subject.explainer(host, batch_size=count),
        "torch, plain": _synchronized(subject.device, lambda: _forward(subject.module, images)),
        "torch.compile, plain": _synchronized(subject.device, lambda: _forward(compiled, images)),
    }
    if on_device:
        contestants["fastcam, GPU to GPU"] = lambda: subject.explainer(tensor, batch_size=count, on_device=True)
    for name, module in (("torch", subject.module), ("torch.compile", compiled)):
        contestants[f"{name}, captum"] = _synchronized(subject.device, _captum(module, subject.layer, images))
        contestants[f"{name}, torchcam"] = _synchronized(subject.device, _torchcam(module, subject.layer, images))
    return contestants


def _plain_run(subject: Subject, images: Any) -> Callable[[], object]:
    """Run the network from and to device memory, as the Explainer does."""
    import torch

    kind = np.dtype(str(images.dtype).rpartition(".")[2])
    classes = subject.plain.get_outputs()[0].shape[1]
    logits = torch.empty((len(images), classes), dtype=images.dtype, device=images.device)
    binding = subject.plain.io_binding()
    binding.bind_input("images", subject.device, 0, kind, tuple(images.shape), images.data_ptr())
    binding.bind_output("logits", subject.device, 0, kind, tuple(logits.shape), logits.data_ptr())

    def run() -> object:
        subject.plain.run_with_iobinding(binding)
        return logits

    return _synchronized(subject.device, run)


def _forward(module: Any, images: Any) -> Any:
    import torch

    with torch.inference_mode():
        return module(images)


def _captum(module: Any, layer: Any, images: Any) -> Callable[[], object]:
    def run() -> object:
        from captum.attr import LayerAttribution, LayerGradCam

        best = _forward(module, images).argmax(dim=1)
        maps = LayerGradCam(module, layer).attribute(images, best, relu_attributions=True)
        return LayerAttribution.interpolate(maps, (224, 224), "bilinear")

    return run


def _torchcam(module: Any, layer: Any, images: Any) -> Callable[[], object]:
    def run() -> object:
        from torchcam.methods import GradCAM

        with GradCAM(module, target_layer=layer) as method:
            scores = module(images)
            return method(scores.argmax(dim=1).tolist(), scores)

    return run


def _synchronized(device: str, run: Callable[[], object]) -> Callable[[], object]:
    import torch

    def run_and_wait() -> object:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run_and_wait


def _working(contestants: Contestants) -> tuple[Contestants, dict[str, str]]:
    """Return those that run at all, and why the others do not: hooks and compilers do not always work together."""
    reasons = {name: _failure(run) for name, run in contestants.items()}
    failures = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in failures.items():
        print(f"{name} does not run: {reason}", file=sys.stderr)
    return {name: run for name, run in contestants.items() if name not in failures}, failures


def _failure(run: Callable[[], object]) -> str | None:
    try:
        run()
    except Exception as error:  # noqa: BLE001  # whatever a library raises is its result
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _validate(subject: Subject, images: Any, precision: str) -> float:
    """Return the error of fastcam's raw maps against captum's, and exit if it is more than rounding."""
    from captum.attr import LayerGradCam

    few = images[:8]
    found = subject.explainer(few.float().cpu().numpy(), size="layer", normalize=None)
    targets = few.new_tensor(found.targets[:, 0]).long()
    maps = LayerGradCam(subject.module, subject.layer).attribute(few, targets, relu_attributions=True)
    expected = maps.detach().float().cpu().numpy()
    error = float(np.linalg.norm(found.maps - expected) / np.linalg.norm(expected))
    if not error < _TOLERANCES[precision] or not found.maps.any():
        sys.exit(f"fastcam's maps are {error:.1e} off captum's: nothing to time")
    return error


def _row(network: str, precision: str, batch: int, name: str, timing: Timing) -> list[object]:
    return [network, precision, batch, name, f"{timing.median * 1e3:.2f}", f"{batch / timing.median:.0f}"]


def _device_name(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_name(0)) if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
