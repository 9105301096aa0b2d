"""Import torch modules into a `Graph` through torch's own exporters.

The graph's weights are arrays that share torch's memory; they never pass through a message. torch is
imported here, when a module arrives, and nowhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...arrays import Array
from ...errors import ArgumentError, MissingExtraError, ModelError
from ...graph import Graph, TensorType
from ...labels import config_names
from ...notes import Note
from ...preprocessing import LAYOUTS, Guess, Preprocessing, standardized
from .imported import ImportedModel, ImportOptions, Sample, choose_output, sample_images, settle_signature
from .precision import narrowed, widened
from .torch_exporters import CannotTraceError, Traced, capture, last_lines, trace, unsupported
from .torch_tracing import evaluating, quiet, rewritten_ops, tensors_of, without_spectators

# Relative to the largest score: float32 sums in a different order differ by less.
_TOLERANCE = 1e-3
_LARGE = 1024


def is_torch(model: object) -> bool:
    """Return whether a model is a torch module, without importing torch."""
    return any(base.__module__ == "torch.nn.modules.module" for base in type(model).__mro__)


def read_torchscript(path: Path, options: ImportOptions) -> ImportedModel:
    """Import a TorchScript file; raises ModelError for other torch files, which are pickles."""
    if not _is_torchscript(path):
        raise ModelError(
            f"{path}: not a TorchScript file. A pickle of a whole module is a program, which export does not run, and "
            "a state dict holds weights only: build the module, load the weights with "
            "module.load_state_dict(torch.load(path, weights_only=True)), and pass the module to export"
        )
    torch = _torch()
    try:
        module = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # torch raises its own
        raise ModelError(f"{path}: torch cannot load this TorchScript file ({last_lines(error)})") from error
    return import_torch(module, options)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingExtraError(
            f'exporting a torch module needs torch ({error}): pip install "fastcam[torch]"'
        ) from error


def import_torch(model: Any, options: ImportOptions) -> ImportedModel:
    """Import a torch module; raises ModelError, ArgumentError, MissingExtraError."""
    torch = _torch()
    module = _unwrapped(model)
    example = _example_batch(torch, module, options)
    notes: list[Note] = []
    with evaluating(module), quiet(torch), torch.no_grad():
        try:
            outputs = module(example)
        except Exception as error:  # whatever a forward pass raises
            raise ModelError(
                f"{type(module).__qualname__} cannot run on images of shape {tuple(example.shape)}, which are those of "
                f"example_input ({last_lines(error)})"
            ) from error
        options.check_scores(getattr(outputs, "shape", None))
        with without_spectators(torch, module, example, outputs, notes):
            expected = _expectation(torch, module, example)
            traced = _export(torch, module, example, outputs, expected, notes)
    graph = traced.graph
    sample = None if expected is None or options.all_outputs else _chosen(graph, expected[1], options.output)
    notes += widened(graph) + narrowed(graph)
    notes += settle_signature(graph, ImportOptions(output=options.output, all_outputs=options.all_outputs))
    paths = [path for path, _ in module.named_modules()]
    layers = _name_values(graph, _module_outputs(graph, paths, traced.scopes))
    guess = _guessed_preprocessing(module)
    classes = config_names(getattr(module, "config", None))
    return ImportedModel(graph, "torch", layers, guess=guess, classes=classes, notes=notes, sample=sample)


def _unwrapped(model: Any) -> Any:
    """Return the module inside the wrappers of torch.compile and multi-device training."""
    while True:
        kind = type(model).__name__
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001  # torch's own name for it
        elif kind in ("DataParallel", "DistributedDataParallel") and hasattr(model, "module"):
            model = model.module
        else:
            return model


def _export(
    torch: Any, module: Any, example: Any, outputs: Any, expected: tuple[Array, list[Array]] | None, notes: list[Note]
) -> Traced:
    """Return the result of the first exporter that reproduces the module's scores."""
    names, kind = _output_names(outputs), type(module).__qualname__
    scripted = isinstance(module, torch.jit.ScriptModule)
    try:
        traced = trace(torch, module, example, names)
        if _agrees(traced.graph, expected):
            return traced
        doubt = CannotTraceError("the tracer's result gives other scores than the module")
    except CannotTraceError as refusal:
        doubt = refusal
    if scripted:
        raise unsupported(kind, str(doubt))
    try:
        with rewritten_ops(torch):
            traced = capture(torch, module, example, names)
    except CannotTraceError as refusal:
        if doubt.by_values and not refusal.by_values:
            # The tracer warned, about sizes for example; its result is compared with the module.
            traced = _traced_anyway(torch, module, example, names, refusal)
            if expected is not None and _agrees(traced.graph, expected):
                notes.append(
                    Note(
                        "checks",
                        f"torch's exporter cannot capture the module ({refusal}): it was traced instead, on "
                        "example_input. Branches that depend on the image are fixed as they were taken.",
                    )
                )
                return traced
        raise unsupported(kind, str(refusal)) from refusal
    if not _agrees(traced.graph, expected):
        raise ModelError(
            f"torch's exporters give {kind} wrong scores, or scores that are valid only for the batch size of the "
            "example: take sizes from x.shape, not from len(x) or numbers"
        )
    return traced


def _traced_anyway(
    torch: Any, module: Any, example: Any, names: Sequence[str] | None, refusal: CannotTraceError
) -> Traced:
    try:
        return trace(torch, module, example, names, strict=False)
    except CannotTraceError:
        raise unsupported(type(module).__qualname__, str(refusal)) from refusal


def _expectation(torch: Any, module: Any, example: Any) -> tuple[Array, list[Array]] | None:
    """Return three images and the module's outputs for them, or None if it cannot run in full precision."""
    images = sample_images([int(size) for size in example.shape[1:]])
    if images is None or str(example.dtype) not in ("torch.float32", "torch.float64"):
        return None
    try:
        outputs = module(torch.from_numpy(images).to(device=example.device, dtype=example.dtype))
    except Exception:  # noqa: BLE001  # a module of a fixed batch size, which the exported file shows
        return None
    return images, [tensor.cpu().numpy() for tensor in tensors_of(torch, outputs)]


def _agrees(graph: Graph, expected: tuple[Array, list[Array]] | None) -> bool:
    """Return whether a graph reproduces the module's outputs; True if that cannot be checked."""
    if expected is None or importlib.util.find_spec("onnxruntime") is None:
        return True
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    images, outputs = expected
    name, type_ = next(iter(graph.inputs.items()))
    if type_.dtype != np.float32:
        return True
    # Passed as inputs, the weights need no copy.
    large = {key: array for key, array in graph.constants.items() if array.size > _LARGE}
    small = {key: array for key, array in graph.constants.items() if key not in large}
    types = {key: TensorType(array.dtype, array.shape) for key, array in large.items()}
    try:
        message = graph.copy(constants=small, inputs={**graph.inputs, **types}).to_model()
        session = onnxruntime.InferenceSession(message.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(graph.outputs, {name: images, **large})
        alone = session.run(graph.outputs, {name: images[:1], **large})
    except Exception:  # noqa: BLE001  # the runtime has its own exception classes, by version
        return False
    same_rank = all(a.shape[1:] == b.shape[1:] for a, b in zip(alone, found, strict=True))
    return same_rank and len(found) == len(outputs) and all(map(_is_close, found, outputs))


def _is_close(found: Array, expected: Array) -> bool:
    if found.shape != expected.shape:
        return False
    scale = max(float(np.abs(expected).max(initial=0)), float(np.finfo(np.float32).tiny))

    def agree(ours: Array, theirs: Array) -> bool:
        return bool(np.abs(ours - theirs).max(initial=0) <= _TOLERANCE * scale)

    if agree(found, expected):
        return True
    # Detectors sort their boxes: of nearly equal scores, either may come first.
    return found.ndim == 3 and agree(np.sort(found, axis=1), np.sort(expected, axis=1))


def _chosen(graph: Graph, outputs: list[Array], wanted: str | None) -> Sample | None:
    if len(outputs) != len(graph.outputs):
        return None
    return Sample(outputs[graph.outputs.index(choose_output(graph.outputs, wanted))])


def _guessed_preprocessing(module: Any) -> Guess | None:
    """Return what the published weights of a timm or torchvision architecture expect."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    config = getattr(module, "pretrained_cfg", None)
    if kind.__module__.startswith("timm.") and isinstance(config, Mapping) and {"mean", "std"} <= config.keys():
        guess = standardized(config["mean"], config["std"])
        return Guess(guess, f"the pretrained_cfg of this {name} holds its mean and standard deviation")
    if kind.__module__.startswith("torchvision.models."):
        return Guess(Preprocessing.of("imagenet"), f"the module is a {name}, whose published weights expect it")
    return None


def _example_batch(torch: Any, module: Any, options: ImportOptions) -> Any:
    """Return two images: a batch size of 1 would be treated as a constant."""
    example = options.example_input
    if example is None:
        raise ArgumentError(
            "a torch module does not know its input: give a batch of images, for example "
            "example_input=torch.zeros(1, 3, 224, 224)"
        )
    if isinstance(example, np.ndarray):
        example = torch.from_numpy(example)
    if not isinstance(example, torch.Tensor):
        raise ArgumentError(f"example_input is a {type(example).__name__}: give a torch tensor, a batch of images")
    if example.ndim not in LAYOUTS or not len(example) or not example.is_floating_point():
        kind = f"{example.dtype} of shape {tuple(example.shape)}"
        raise ArgumentError(f"example_input is {kind}: give a batch of images (N,3,H,W), series or volumes in floats")
    if options.input_size is not None and tuple(example.shape[2:]) != tuple(options.input_size):
        raise ArgumentError(
            f"input_size={options.input_size} is not the size of example_input, {tuple(example.shape[2:])}: give one"
        )
    weight = next(iter(module.parameters()), example)
    return example[:1].repeat(2, *[1] * (example.ndim - 1)).to(device=weight.device, dtype=weight.dtype)


def _output_names(outputs: Any) -> list[str] | None:
    """Return the keys of a dict of outputs or the fields of a named tuple; exporters name other outputs themselves."""
    if isinstance(outputs, Mapping):
        return [str(key) for key in outputs]
    fields = getattr(outputs, "_fields", None)
    return None if fields is None else [str(field) for field in fields]


def _module_outputs(graph: Graph, paths: Iterable[str], scopes: dict[str, list[str]]) -> dict[str, str]:
    """Return the value that each call of a module returns, by the module's path; "path@2" for a second call.

    A call is a run of nodes within the module; its result is the one value that is read outside.
    """
    calls: list[tuple[str, str]] = []
    known = {"", *paths}
    # The batch size may be read anywhere; it belongs to no module.
    noted = [node for node in graph.nodes if known.intersection(scopes.get(node.output[0], ()))]
    for path in sorted(known - {""}):
        places = [(path in scopes[node.output[0]], node) for node in noted]
        for inside, run in groupby(places, key=lambda place: place[0]):
            given = _read_outside(graph, [node for _, node in run]) if inside else []
            if len(given) == 1:
                calls.append((path, given[0]))
    count = Counter(path for path, _ in calls)
    seen: Counter[str] = Counter()
    outputs = {}
    for path, value in calls:
        seen[path] += 1
        outputs[path if count[path] == 1 else f"{path}@{seen[path]}"] = value
    return outputs


def _read_outside(graph: Graph, nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Return the values that these nodes compute for others, except sizes."""
    within = {id(node) for node in nodes}
    read = {name for node in graph.nodes if id(node) not in within for name in node.input} | set(graph.outputs)
    made = [output for node in nodes for output in node.output if output in read]
    return [name for name in made if graph.rank(name) is None or graph.type(name).dtype.kind == "f"]


def _name_values(graph: Graph, layers: dict[str, str]) -> dict[str, str]:
    """Name each value after the innermost module whose only result it is; return the values by layer, in order."""
    order = {output: position for position, node in enumerate(graph.nodes) for output in node.output}
    named: dict[str, str] = {}
    for path, value in sorted(layers.items(), key=lambda item: ("@" in item[0], -item[0].count("."))):
        if value not in named and path not in graph.inputs:
            named[value] = path
    for value, path in named.items():
        if path != value:
            graph.rename(path, graph.unused_name(f"{path}/value"))
            graph.rename(value, path)
    found = {path: named.get(value, value) for path, value in layers.items()}
    return dict(sorted(found.items(), key=lambda item: order.get(layers[item[0]], 0)))
