"""Which networks of the model packages can be explained: ``python -m bench.zoo [SOURCE ...]``.

Every network is built with random weights, without a download, exported in a process of its own, and compared with
automatic differentiation in its framework: scores, activations of the automatic layer, and the pooled gradients of two
classes. Verdicts:

- right: all within 1e-3 (relative L2)
- inexact: within 1e-1, for networks so deep that float32 differs
- wrong: further off, or blank where automatic differentiation is not
- unchecked: exported, but no module of the network has the explained layer as its output
- refused: with fastcam's message
- untraceable: refused, and torch cannot export the network either

Sources: timm (each architecture file's smallest network), keras (all of keras.applications), transformers (each image
classifier, shallow), segmentation (segmentation_models_pytorch). They are not requirements of the project:

    pip install torch==2.13.0 onnxscript tensorflow-cpu tf2onnx
    pip install --no-deps timm transformers segmentation-models-pytorch huggingface_hub safetensors tokenizers regex

Results are kept in results/zoo.jsonl, so that an interrupted run continues; ``--write`` makes
docs/supported.md of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .harness import RESULTS

_Floats = NDArray[np.floating[Any]]

_CLASSES = 10
_TARGETS = (0, 7)
_RIGHT, _INEXACT = 1e-3, 1e-1
_PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
_KEPT = RESULTS / "zoo.jsonl"


@dataclass(frozen=True)
class Source:
    """A package of networks.

    Attributes
    ----------
    names : callable
        The networks to try.
    build : callable
        Of a name: the network, its image batch (2, ...), and further arguments of `fastcam.export`.
    reference : callable
        Of the network, the batch, the exported activations, and the layer's name: scores, activations like the
        exported ones, and their pooled gradients (N,K,C); None for both if no module has them as its output.
    """

    names: Callable[[], Sequence[str]]
    build: Callable[[str], tuple[Any, _Floats, dict[str, Any]]]
    reference: Callable[[Any, _Floats, _Floats, str], tuple[_Floats, tuple[_Floats, _Floats] | None]]


# timm and its torchvision..


class _Named(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StandIn(types.ModuleType):
    """A module that has whatever is imported from it."""

    __path__: list[str] = []  # noqa: RUF012 - what the import system reads of a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Named(name, (), {}) if name[0].isupper() else lambda *arguments, **options: None
        setattr(self, name, value)
        return value


class _Torchvision:
    """Finds torchvision, which has no wheel for every build of torch; timm needs it for its training pipeline only."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        is_ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    finder: Any = _Torchvision()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]


def _timm() -> Any:
    with _torchvision():
        return importlib.import_module("timm")


# What the smallest network of a family tends to be called.
_SMALL = "atto femto pico test_ nano tiny xxs xs micro zero lite 050 small _s 18 26 13 b0 t0 s0 m0 f0 x0 160 56".split()


def _timm_names() -> list[str]:
    """Return the network with the fewest parameters of each of timm's architecture files."""
    import torch

    timm = _timm()
    chosen = []
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        ranked = sorted(names, key=lambda name: (not any(part in name for part in _SMALL), len(name)))
        sizes = {}
        for name in ranked[:5]:
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, pretrained=False)
                sizes[name] = sum(one.numel() for one in model.parameters())
            except Exception:  # noqa: BLE001 - some networks cannot be built without memory
                sizes.setdefault(name, 10**9)
        if sizes:
            chosen.append(min(sizes, key=lambda name: sizes[name]))
    return chosen


def _timm_build(name: str) -> tuple[Any, _Floats, dict[str, Any]]:
    import torch

    timm = _timm()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=_CLASSES).eval()
    return _trained(model), _torch_images(model.pretrained_cfg["input_size"]), {}


def _torch_images(shape: Sequence[int]) -> _Floats:
    return np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)


def _trained(model: Any) -> Any:
    """Move every weight that starts as a constant, as training does: scales of 1e-6 would hide whole branches."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in model.parameters():
            if one.is_floating_point() and one.numel() > 1 and float(one.std()) == 0:
                one.add_(0.1 * torch.randn(one.shape, generator=generator))
        for name, one in model.named_buffers():
            if name.endswith("running_var"):
                one.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean"):
                one.uniform_(-0.1, 0.1, generator=generator)
    return model


def _torch_reference(
    model: Any, images: _Floats, activations: _Floats, layer: str, table: Callable[[Any], Any] = lambda scores: scores
) -> tuple[_Floats, tuple[_Floats, _Floats] | None]:
    import torch

    kept: list[Any] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        found = [*inputs, *(output if isinstance(output, tuple | list) else [output])]
        kept.extend(one for one in found if isinstance(one, torch.Tensor) and one.requires_grad)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    # Inputs of modules count too, and only depend on weights.
    output = model(torch.tensor(images))
    for hook in hooks:
        hook.remove()
    scores = table(output if isinstance(output, torch.Tensor) else output[0])
    best: tuple[_Floats, _Floats] | None = None
    for tensor in {id(one): one for one in kept}.values():
        layout = _layout(tensor.detach().numpy(), activations)
        found = None if layout is None else layout(tensor.detach().numpy())
        # The values of neighbouring layers may be close.
        if layout is None or found is None or (best and _error(found, activations) >= _error(best[0], activations)):
            continue
        gradients = [
            torch.autograd.grad(scores[:, target].sum(), tensor, retain_graph=True, allow_unused=True)[0]
            for target in _TARGETS
        ]
        if not any(one is None for one in gradients):
            pooled = [layout(one.numpy()).astype(np.float64).mean(axis=(2, 3)) for one in gradients]
            best = found, np.stack(pooled, axis=1)
    return scores.detach().numpy(), best


def _layout(array: _Floats, wanted: _Floats) -> Callable[[_Floats], _Floats] | None:
    """Return how to bring an array into the order (N,C,h,w) of an exported layer, if it may be that layer."""
    n, c, h, w = wanted.shape
    ways: dict[str, Callable[[_Floats], _Floats]] = {
        "channels first": lambda one: one,
        "channels last": lambda one: one.transpose(0, 3, 1, 2),
        "tokens": lambda one: one[:, one.shape[1] - h * w :].transpose(0, 2, 1).reshape(n, c, h, w),
        "tokens, channels first": lambda one: one.reshape(n, c, h, w),
    }
    for way in ways.values():
        try:
            moved = way(array)
        except (ValueError, IndexError):
            continue
        if moved.shape == wanted.shape and _error(moved, wanted) < _INEXACT:
            return way
    return None


# Keras.


def _keras_names() -> list[str]:
    import keras

    found = vars(keras.applications).items()
    return sorted(name for name, value in found if callable(value) and name[0].isupper())


def _keras_build(name: str) -> tuple[Any, _Floats, dict[str, Any]]:
    import keras

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, classes=_CLASSES, classifier_activation=None)
    is_open = None in model.input_shape[1:]
    sides = [side or 224 for side in model.input_shape[1:]]
    images = np.random.default_rng(1).normal(size=(2, *sides)).astype(np.float32)
    # Statistics of the images themselves: with others, deep networks amplify the rounding of float32 without bounds.
    normalizations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in normalizations:
        layer.momentum = 0.0
    if normalizations:
        model(images, training=True)
    return model, images, {"input_size": tuple(sides[:2])} if is_open else {}


def _keras_reference(
    model: Any, images: _Floats, activations: _Floats, layer: str
) -> tuple[_Floats, tuple[_Floats, _Floats] | None]:
    import keras
    import tensorflow as tf

    # Among them additions that are no layers. The last ones first: the explained layer is near the end.
    shapes = (activations.shape[1:], (*activations.shape[2:], activations.shape[1]))
    same_size = [one for one in reversed(model.operations) if any(_fits(one.output, shape) for shape in shapes)]
    for operation in sorted(same_size, key=lambda one: one.name != layer):
        split = keras.Model(model.inputs, [operation.output, model.outputs[0]])
        with tf.GradientTape(persistent=True) as tape:
            maps, scores = split([images])
            wanted = [tf.reduce_sum(scores[:, target]) for target in _TARGETS]
        layout = _layout(maps.numpy(), activations)
        if layout is not None and _error(layout(maps.numpy()), activations) < _RIGHT:
            gradients = [layout(tape.gradient(one, maps).numpy()).astype(np.float64) for one in wanted]
            pooled = np.stack([one.mean(axis=(2, 3)) for one in gradients], axis=1)
            return scores.numpy(), (layout(maps.numpy()), pooled)
    return model.predict(images, verbose=0), None


def _fits(output: Any, shape: tuple[int, ...]) -> bool:
    """Return whether an output of a Keras operation has this shape behind the batch, where it is known."""
    found = tuple(getattr(output, "shape", ()))[1:]
    return len(found) == len(shape) and all(one in (None, size) for one, size in zip(found, shape, strict=True))


# transformers and segmentation.

# Settings that make a network shallow, where its configuration has them.
_SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "num_labels": _CLASSES, "decoder_layers": 2}


def _transformers_names() -> list[str]:
    return sorted(_auto_models().MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _auto_models() -> Any:
    return importlib.import_module("transformers.models.auto.modeling_auto")


def _transformers_build(name: str) -> tuple[Any, _Floats, dict[str, Any]]:
    import torch

    torch.manual_seed(0)
    config: Any = importlib.import_module("transformers").AutoConfig.for_model(name)
    for one in (config, getattr(config, "vision_config", None)):
        for key, value in _SHALLOW.items():
            if one is not None and hasattr(one, key) and key not in type(one).attribute_map:
                setattr(one, key, value)
    depths = getattr(config, "depths", None)
    if isinstance(depths, list | tuple):
        config.depths = [min(depth, 2) for depth in depths]
    kinds = _auto_models().MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    model = (kinds[0] if isinstance(kinds, tuple) else kinds)(config).eval()
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    return _trained(model), _torch_images((getattr(vision, "num_channels", 3), height, width)), {}


_SEGMENTERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split()


def _segmentation_build(name: str) -> tuple[Any, _Floats, dict[str, Any]]:
    import torch

    _timm()
    with _torchvision():
        segmenters = importlib.import_module("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = _trained(getattr(segmenters, name)("tu-resnet18", encoder_weights=None, classes=_CLASSES).eval())
    images = _torch_images((3, 128, 128))
    with torch.no_grad():
        # Without it one class would be predicted everywhere, and the others would have no region.
        convolution = next(part for part in model.segmentation_head.modules() if isinstance(part, torch.nn.Conv2d))
        convolution.bias -= model(torch.tensor(images)).mean((0, 2, 3))
    return model, images, {"score": "segmentation"}


def _region_scores(logits: Any) -> Any:
    """Return the mean logit of each class over the pixels where it is predicted (SEG-GRAD-CAM)."""
    import torch

    regions = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).permute(0, 3, 1, 2)
    return (logits * regions).sum((2, 3)) / regions.sum((2, 3)).clamp(min=1)


SOURCES: dict[str, Source] = {
    "timm": Source(_timm_names, _timm_build, _torch_reference),
    "keras": Source(_keras_names, _keras_build, _keras_reference),
    "transformers": Source(_transformers_names, _transformers_build, _torch_reference),
    "segmentation": Source(lambda: _SEGMENTERS, _segmentation_build, partial(_torch_reference, table=_region_scores)),
}


# One network.


def examine(source: str, name: str) -> dict[str, Any]:
    """Export a network and compare it; return the verdict, the layer and the errors."""
    import onnxruntime

    import fastcam

    chosen = SOURCES[source]
    model, images, options = chosen.build(name)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explained.onnx"
        try:
            size = {"example_input": _example(images)} if source != "keras" else {}
            result = fastcam.export(model, path, **size, **options)
        except fastcam.FastcamError as error:
            verdict = "refused" if source == "keras" or _traceable(model, images) else "untraceable"
            return {"verdict": verdict, "reason": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - begin
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        feeds = {result.input_name: images, "target": np.array([_TARGETS] * 2)}
        logits, activations, weights = session.run(["logits", "activations", "weights"], feeds)
    scores, expected = chosen.reference(model, images, activations, result.layer)
    errors = {"scores": _error(logits, scores)}
    if expected is not None:
        errors |= {"activations": _error(activations, expected[0]), "weights": _error(weights, expected[1])}
    return {
        "verdict": _verdict(errors, weights),
        "layer": result.layer,
        "map": list(activations.shape[2:]),
        "errors": errors,
        "seconds": seconds,
        "notes": [note.kind for note in result.notes],
    }


def _verdict(errors: dict[str, float], weights: _Floats) -> str:
    worst = max(errors.values())
    if not np.isfinite(worst) or worst > _INEXACT:
        return "wrong"
    if "weights" not in errors:
        return "unchecked" if weights.any() else "wrong"
    return "right" if worst <= _RIGHT else "inexact"


def _error(found: _Floats, expected: _Floats) -> float:
    if found.shape != expected.shape:
        return float("inf")
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / (norm or 1.0)


def _example(images: _Floats) -> Any:
    import torch

    return torch.tensor(images[:1])


def _traceable(model: Any, images: _Floats) -> bool:
    import torch

    try:
        torch.onnx.export(model, (_example(images),), dynamo=True, verbose=False)
    except Exception:  # noqa: BLE001 - the exporter raises whatever the network does
        return False
    return True


# All of them.


def main() -> None:
    """Examine what has not been examined yet, and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", choices=[*SOURCES, []], help="all by default")
    parser.add_argument("--only", default="", metavar="REGEX", help="examine these networks, again if need be")
    parser.add_argument("--one", nargs=2, metavar=("SOURCE", "NAME"), help="examine one network and print JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=10, help="for each network")
    parser.add_argument("--write", action="store_true", help=f"write {_PAGE.name} from the kept results")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(examine(*arguments.one)))
        return
    known = _known()
    if not arguments.write:
        _examine_all(arguments, known)
    if arguments.write:
        _PAGE.write_text(page(known), "utf-8")
    print(Counter(one["verdict"] for one in known.values()))


def _examine_all(arguments: argparse.Namespace, known: dict[tuple[str, str], dict[str, Any]]) -> None:
    wanted = [(source, name) for source in arguments.sources or SOURCES for name in SOURCES[source].names()]
    only = re.compile(arguments.only or ".")
    todo = [key for key in wanted if only.search(key[1]) and (arguments.only or key not in known)]
    RESULTS.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool, _KEPT.open("a", encoding="utf-8") as kept:
        results = pool.map(lambda key: _apart(key[0], key[1], arguments.minutes), todo)
        for key, found in zip(todo, results, strict=True):
            known[key] = found
            kept.write(json.dumps({"source": key[0], "name": key[1], **found}) + "\n")
            kept.flush()
            print(*key, found["verdict"], found.get("layer") or found.get("reason", "")[:200], flush=True)


def _apart(source: str, name: str, minutes: float) -> dict[str, Any]:
    """Examine a network in a process of its own."""
    command = [sys.executable, "-m", "bench.zoo", "--one", source, name]
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes, check=False, env=quiet)
    except subprocess.TimeoutExpired:
        return {"verdict": "failed", "reason": f"took more than {minutes:g} minutes"}
    if done.returncode:
        # The error, and not what torch's exporter says of missing packages.
        said = [line for line in done.stderr.splitlines() if re.match(r"\w*(Error|Exception)\b|`pip", line)]
        return {"verdict": "failed", "reason": said[-1] if said else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _known() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the latest result of each network."""
    lines = _KEPT.read_text("utf-8").splitlines() if _KEPT.exists() else []
    return {(one["source"], one["name"]): one for one in map(json.loads, lines)}


def page(known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return docs/supported.md."""
    parts = [_INTRODUCTION, _summary(known)]
    for source, title in _TITLES.items():
        rows = [[name, *_described(found)] for (one, name), found in sorted(known.items()) if one == source]
        parts.append(f"## {title}\n\n" + _table(["network", "verdict", "explained layer", "map", "error"], rows))
    return "\n\n".join(parts) + "\n"


_TITLES = {
    "timm": "timm",
    "transformers": "transformers",
    "keras": "keras.applications",
    "segmentation": "segmentation_models_pytorch",
}
_INTRODUCTION = """# Supported models

Networks of four packages, with random weights, each exported by one call of `fastcam.export` without further arguments
than an example input (and `score="segmentation"`). The error is the largest relative L2 error of the scores, the
activations of the layer that fastcam chose, and the pooled gradients of two classes, against automatic differentiation
in torch or TensorFlow. Made by `python -m bench.zoo --write`; see its docstring for the packages to install.

- **right**: all errors are below 1e-3
- **inexact**: below 1e-1
- **unchecked**: exported, but no module of the network has the explained layer as its output
- **refused**: `export` raises an error that says why
- **untraceable**: refused, and torch's own exporter fails as well, for example because the network does not take images
- **failed**: the network could not be built, for want of another package or of settings"""


def _summary(known: dict[tuple[str, str], dict[str, Any]]) -> str:
    verdicts = ["right", "inexact", "unchecked", "wrong", "refused", "untraceable", "failed"]
    counts = {
        source: Counter(found["verdict"] for (one, _), found in known.items() if one == source) for source in _TITLES
    }
    rows = [[_TITLES[source], *(str(count[verdict] or "") for verdict in verdicts)] for source, count in counts.items()]
    return _table(["package", *verdicts], rows)


def _described(found: dict[str, Any]) -> list[str]:
    if "errors" not in found:
        return [found["verdict"], found["reason"].partition(". ")[0].replace("|", "/")[:160], "", ""]
    size = " x ".join(map(str, found["map"]))
    return [found["verdict"], f"`{found['layer']}`", size, f"{max(found['errors'].values()):.0e}"]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
