"""torch modules into a `Graph`, through torch's own exporter.

The weights go from torch's memory into the graph as arrays that share it: they are in no message meanwhile. torch is
imported here, when a module arrives, and nowhere else.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import onnx

from ...errors import ArgumentError, MissingExtraError, ModelError
from ...graph import Graph, from_model
from ...preprocessing import Guess, Preprocessing, standardized
from .imported import TARGET_OPSET, ImportedModel, ImportOptions, logging_from, settle_signature
from .opsets import converted
from .precision import widened

# Where torch's exporter notes the modules around a node: the model itself, its children ..., the call.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Shape arithmetic reads constants of this size; larger ones are weights.
_ARGUMENT_SIZE = 64


def is_torch(model: object) -> bool:
    """Tell a torch module without importing torch."""
    return any(base.__module__ == "torch.nn.modules.module" for base in type(model).__mro__)


def import_torch(model: Any, options: ImportOptions) -> ImportedModel:
    """Import a torch module; raises ModelError, ArgumentError, MissingExtraError."""
    try:
        # torch's exporter needs it, and says so late.
        importlib.import_module("onnxscript")
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f'exporting a torch module needs torch and onnxscript ({error}): pip install "fastcam[torch]"'
        ) from error
    module = getattr(model, "_orig_mod", model)
    example = _example_batch(torch, module, options)
    with _evaluating(module), _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.AUTO},),
                output_names=_output_names(module(example)),
                opset_version=TARGET_OPSET,
                # Values of layers would be folded into others.
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # torch's tracer, its exporter and onnxscript raise their own
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"torch.onnx.export cannot trace {type(module).__qualname__} ({type(error).__name__}: {reason}): "
                "take out what depends on the values of the image, or give an .onnx file"
            ) from error
        scopes = _scopes(program.model.graph)
        graph = _read(program.model)
    notes = widened(graph)
    settle_signature(graph, ImportOptions(output=options.output))
    layers = _name_values(graph, _module_outputs(graph, [path for path, _ in module.named_modules()], scopes))
    return ImportedModel(graph, "torch", layers, guess=_guessed_preprocessing(module), notes=notes)


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
    """Return two images: of one, the tracer would take the batch for a constant."""
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
    if example.ndim != 4 or not len(example) or not example.is_floating_point():
        kind = f"{example.dtype} of shape {tuple(example.shape)}"
        raise ArgumentError(f"example_input is {kind}: give a batch of images (N,3,H,W) in floats")
    if options.input_size is not None and tuple(example.shape[2:]) != tuple(options.input_size):
        raise ArgumentError(
            f"input_size={options.input_size} is not the size of example_input, {tuple(example.shape[2:])}: give one"
        )
    weight = next(iter(module.parameters()), example)
    return example[:1].repeat(2, 1, 1, 1).to(device=weight.device, dtype=weight.dtype)


def _output_names(outputs: Any) -> list[str] | None:
    """Return the keys of a dict of outputs; the exporter names others itself."""
    return [str(key) for key in outputs] if isinstance(outputs, Mapping) else None


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Let a module and all within work as at inference, and leave each as it was."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks out of the user's log and warnings."""
    loggers = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    with logging_from(logging.ERROR, *loggers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(model: Any) -> Graph:
    """Turn the exporter's model into a graph; its weights become inputs of the message and constants of the graph."""
    from onnx_ir import serde

    weights = {}
    for name, value in list(model.graph.initializers.items()):
        array = value.const_value.numpy()
        if array.size > _ARGUMENT_SIZE:
            weights[name] = array
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
    graph = from_model(converted(serde.serialize_model(model)))
    for name in weights:
        del graph.inputs[name]
    graph.constants |= weights
    return graph


def _scopes(nodes: Iterable[Any]) -> dict[str, list[str]]:
    """Return the paths of the modules around each node, by the node's outputs."""
    return {
        output.name: [str(scope) for scope in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]]
        for node in nodes
        for output in node.outputs
    }


def _module_outputs(graph: Graph, paths: Iterable[str], scopes: dict[str, list[str]]) -> dict[str, str]:
    """Return the value that every call of a module gives, by the module's path; "path@2" for a second call.

    A call is a run of nodes within the module; what it gives is the one value that is read outside.
    """
    calls: list[tuple[str, str]] = []
    known = {"", *paths}
    # The size of the batch is asked for anywhere, by no module.
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
    """Return the numbers that these nodes make for others; sizes are none."""
    within = {id(node) for node in nodes}
    read = {name for node in graph.nodes if id(node) not in within for name in node.input} | set(graph.outputs)
    made = [output for node in nodes for output in node.output if output in read]
    return [name for name in made if graph.rank(name) is None or graph.type(name).dtype.kind == "f"]


def _name_values(graph: Graph, layers: dict[str, str]) -> dict[str, str]:
    """Call every value by the innermost module that gives it alone; return the values by layer, in their order."""
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
