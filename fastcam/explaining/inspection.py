"""`inspect`: an explained model's inputs, outputs, layers and cost, and which providers can run it here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import check_path, checked
from ..errors import FastcamError, ModelError
from ..graph import Graph, attribute, from_model, needed_nodes, static_dims
from ..metadata import layer_outputs
from ..notes import Note
from ..preprocessing import Layout, Preprocessing
from .convolutions import Convolutions
from .engines.opening import open_engine
from .explainer import Explainer
from .providers import CPU, CUDA, TENSORRT, ask, find_problem, find_tensorrt_problem

if TYPE_CHECKING:
    import onnx

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a file written by `fastcam.export`.

    Attributes
    ----------
    path : Path
    bytes : int
        Size on disk, external data included.
    opset : int
    framework : str
        Where the model came from: "keras", "torch" or "onnx".
    precision : {"fp32", "fp16"}
        What the network computes in; its gradients are always float32.
    inputs, outputs : dict
        Shape of each by name; a string is a dynamic dimension.
    input_layout : "NHWC" or "NCHW"
        Or "NTC", "NCT", "NDHWC" or "NCDHW", for series and volumes.
    preprocessing : Preprocessing or None
        How a picture becomes the input; None if the file does not say.
    classes : tuple of str or None
        Names by index.
    class_count : int
    score : {"classes", "values", "segmentation", "boxes"}
        What a target is.
    fit : {"stretch", "letterbox"}
        How pictures of other proportions are fitted to the input.
    layers : dict
        Channels, height and width of each explained layer by name, the first one first; channels and length for series,
        channels, depth, height and width for volumes.
    candidates : tuple of str
        Layers that `export` could have explained, from the last to the first.
    methods : tuple of str
        How the file can be explained.
    parameters, gradient_parameters : int
        Number of weights in the network, and of further ones that only the gradient part has.
    macs, gradient_macs : int
        Multiply-accumulates of the convolutions and matrix products for one image, and those that explaining one class
        adds.
    notes : tuple of Note
        What `export` changed, guessed or left unchanged.
    providers : dict
        ONNX Runtime's execution providers: None for one that can run the whole model here, else why it cannot.
    convolutions : Convolutions
        Which convolutions fastcam's own kernels compute on this CPU.
    """

    path: Path
    bytes: int
    opset: int
    framework: str
    precision: str
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    input_layout: Layout
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    class_count: int
    score: str
    fit: str
    layers: dict[str, tuple[int, ...]]
    candidates: tuple[str, ...]
    methods: tuple[str, ...]
    parameters: int
    gradient_parameters: int
    macs: int
    gradient_macs: int
    notes: tuple[Note, ...]
    providers: dict[str, str | None]
    convolutions: Convolutions

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as JSON types."""
        return {**asdict(self), "path": str(self.path)}


@checked(path=check_path)
def inspect(path: str | os.PathLike[str]) -> ModelInfo:
    """Inspect a file written by `fastcam.export`.

    Raises
    ------
    FileFormatError
        The file was not made by `fastcam.export`, or was changed.
    ModelError
        The file is missing or damaged.
    MissingExtraError
        ONNX Runtime is not installed.
    """
    import onnx

    explainer = Explainer(path, device="cpu", threads=1)
    folder = explainer.path.parent
    try:
        model = onnx.load(explainer.path, load_external_data=False)
        locations = {_location(tensor) for tensor in model.graph.initializer}
        onnx.load_external_data_for_model(model, str(folder))
    except Exception as error:  # protobuf and the file system raise their own
        raise ModelError(f"{explainer.path}: cannot be read: {error}") from error
    files = {explainer.path, *(folder / name for name in locations if name)}
    inputs, outputs = explainer.signature
    graph = _of_one_image(model)
    network = needed_nodes(graph, ["logits", *(layer_outputs(i).activations for i in range(len(explainer.layers)))])
    outside = {id(node) for node in network}
    gradient = [node for node in graph.nodes if id(node) not in outside]
    weights = _weights(graph, network)
    return ModelInfo(
        path=explainer.path,
        bytes=sum(file.stat().st_size for file in files),
        opset=graph.opset,
        framework=explainer.framework,
        precision=explainer.precision,
        inputs=inputs,
        outputs=outputs,
        input_layout=explainer.input_layout,
        preprocessing=explainer.preprocessing,
        classes=explainer.classes,
        class_count=explainer.class_count,
        score=explainer.score,
        fit=explainer.fit,
        layers={name: _map_shape(graph, explainer, i) for i, name in enumerate(explainer.layers)},
        candidates=explainer.candidates,
        methods=explainer.methods,
        parameters=_elements(graph, weights),
        gradient_parameters=_elements(graph, _weights(graph, gradient) - weights),
        macs=_macs(graph, network),
        gradient_macs=_macs(graph, gradient),
        notes=explainer.notes,
        providers=_providers(explainer.path),
        convolutions=explainer.convolutions,
    )


def _location(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _of_one_image(model: onnx.ModelProto) -> Graph:
    """Read the model with every shape known: a batch of one image and one class, the default of `target`."""
    height, width = next(
        (
            [side.dim_value for side in item.type.tensor_type.shape.dim[2:]]
            for item in model.graph.output
            if item.name == "heatmaps"
        ),
        (0, 0),
    )
    sizes = {"height": height, "width": width}
    for item in model.graph.input:
        for side in item.type.tensor_type.shape.dim:
            if not side.HasField("dim_value"):
                side.dim_value = sizes.get(side.dim_param, 1)
    del model.graph.value_info[:]
    return from_model(model)


def _map_shape(graph: Graph, explainer: Explainer, position: int) -> tuple[int, ...]:
    """Return channels and sides of a layer's map; files that only draw have it inside."""
    channels, *sides = static_dims(graph, layer_outputs(position).activations, [1, 2, 3])
    return (channels, *(sides if explainer.takes_pictures else explainer.map_shapes[position]))


def _weights(graph: Graph, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the constants that hold learnt weights: not shapes, which are int64, and not single numbers."""
    names = {name for node in nodes for name in node.input if name in graph.constants}
    return {name for name in names if graph.constants[name].ndim and graph.constants[name].dtype != np.int64}


def _elements(graph: Graph, names: Iterable[str]) -> int:
    return sum(graph.constants[name].size for name in names)


def _macs(graph: Graph, nodes: Iterable[onnx.NodeProto]) -> int:
    return sum(_MACS[node.op_type](graph, node) for node in nodes if node.op_type in _MACS)


def _size(graph: Graph, value: str, axes: slice = slice(None)) -> int:
    return math.prod(side for side in graph.shape(value)[axes] if isinstance(side, int))


def _einsum(graph: Graph, node: onnx.NodeProto) -> int:
    """One product for each combination of the result's indices and the summed ones."""
    sides: dict[str, int | str | None] = {}
    terms, _, result = attribute(node, "equation").replace(" ", "").partition("->")
    for term, value in zip(terms.split(","), node.input, strict=True):
        letters = term.replace("...", "")
        sides.update(zip(letters, graph.shape(value)[len(graph.shape(value)) - len(letters) :], strict=True))
    summed = (side for letter, side in sides.items() if letter not in result and isinstance(side, int))
    return _size(graph, node.output[0]) * math.prod(summed)


def _gemm(graph: Graph, node: onnx.NodeProto) -> int:
    summed = graph.shape(node.input[0])[0 if attribute(node, "transA", 0) else 1]
    return _size(graph, node.output[0]) * (summed if isinstance(summed, int) else 1)


_MACS: Mapping[str, Callable[[Graph, onnx.NodeProto], int]] = {
    "Conv": lambda graph, node: _size(graph, node.output[0]) * _size(graph, node.input[1], slice(1, None)),
    "ConvTranspose": lambda graph, node: _size(graph, node.input[0]) * _size(graph, node.input[1], slice(1, None)),
    "MatMul": lambda graph, node: _size(graph, node.output[0]) * _size(graph, node.input[0], slice(-1, None)),
    "Gemm": _gemm,
    "Einsum": _einsum,
}


# It sends inputs to a remote service, but every installation of ONNX Runtime lists it.
_NEVER_MEANT = ("AzureExecutionProvider",)


def _providers(path: Path) -> dict[str, str | None]:
    import onnxruntime

    names = [name for name in onnxruntime.get_available_providers() if name not in _NEVER_MEANT]
    return {name: _TRIALS.get(name, _reason_against)(path, name) for name in names}


def _reason_against(path: Path, provider: str) -> str | None:
    """Try to open the file with this provider only, without the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exception classes derive from Exception directly
        return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).splitlines()[0]
    return None if session.get_providers()[0] == provider else "it could not start"


def _reason_against_cuda(path: Path, provider: str) -> str | None:
    """Open the file as `Explainer` does."""
    try:
        open_engine(path, ask("cuda", None), None)
    except FastcamError as error:
        return str(error)
    return None


def _reason_against_tensorrt(path: Path, provider: str) -> str | None:
    """Check only the machine: opening the file would build its engine, which takes minutes."""
    problem = find_problem(0)
    return problem.reason if problem is not None else find_tensorrt_problem(0)


_TRIALS: Mapping[str, Callable[[Path, str], str | None]] = {
    CUDA: _reason_against_cuda,
    TENSORRT: _reason_against_tensorrt,
}
