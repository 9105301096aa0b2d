"""fastcam's own convolutions inside ONNX Runtime sessions on the CPU, where they are faster.

The file on disk stays plain ONNX. When it is opened, `stored` locates its weights without reading them, `planning`
finds the layers that the kernels support, `costs` selects those that are worthwhile, and `rewriting` replaces them with
the custom ops of the native library. Their weights go to the kernels, all other weights to ONNX Runtime. `onnx` is
imported lazily, and only for files that may become faster.

In: a file and the number of threads. Out: a `Rewritten` model with the options to open it, or the reason why the file
is opened as it is. Imports `kernels` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...files import FileState, file_state
from ..providers import import_onnxruntime
from ..pruning import drop_evidence
from ..stored import StoredModel, StoredTensor, read_stored
from . import costs
from .planning import DenseLayer, Layer, Network, find_dense_layers, read_network
from .rewriting import DOMAIN, Rewriter

if TYPE_CHECKING:
    import onnx
    import onnxruntime

    from ...kernels import _cpu

CHOICES = ("auto", "onnxruntime")
# The first version whose C API has every function that the ops call.
# Older ones find no weights in the explained file, or give an image other results in other batches.
_OLDEST = (1, 23)
# Number of bytes of a weight to read at a time.
_CHUNK = 2**24
_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_GAIN = "no convolution of the model would be faster"


@dataclass(frozen=True)
class Convolutions:
    """How a session computes the convolutions of its model.

    Attributes
    ----------
    layers : dict of str to str
        The algorithm of each layer that fastcam's kernels compute, by the layer's name.
    others : int or None
        Number of convolutions that ONNX Runtime computes; None if they were not counted.
    reason : str or None
        Why ONNX Runtime computes all of them; None if it does not.
    """

    layers: Mapping[str, str] = field(default_factory=dict)
    others: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Rewritten:
    """A model to open in place of its file.

    Attributes
    ----------
    message : bytes
        The model without its large weights.
    path : Path
        The file that holds them.
    tensors : dict of str to StoredTensor
        Weights that are passed to ONNX Runtime, which copies them. It maps the file for the other ones while the
        session opens, and packs them: afterwards nothing depends on the file.
    library : str
        The file that holds the op.
    convolutions : Convolutions
    state : tuple of int
        What identifies the file's content.
    """

    message: bytes
    path: Path
    tensors: Mapping[str, StoredTensor]
    library: str
    convolutions: Convolutions
    state: FileState
    # Keeps the layers published until the session has opened.
    published: list[_cpu.PublishedConvolution | _cpu.PublishedDense] = field(repr=False)

    def prepare(self, options: onnxruntime.SessionOptions) -> list[npt.NDArray[Any]]:
        """Set the options of the session that opens the message.

        Returns
        -------
        list of ndarray
            Weights that the options refer to without owning them: keep them until the session has opened.

        Raises
        ------
        OSError
            The file has changed in the meantime.
        """
        import onnxruntime

        options.register_custom_ops_library(self.library)
        options.add_session_config_entry(_FOLDER, str(self.path.parent))
        arrays = [tensor.read() for tensor in self.tensors.values()]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        if values:
            options.add_external_initializers(list(self.tensors), values)
        return arrays

    def check_unchanged(self) -> None:
        """Raise OSError if the file is no longer the one that was read first: weights could come from two files."""
        if file_state(self.path) != self.state:
            raise OSError("the file was replaced while it was opened: open it again")


def rewrite(path: Path, threads: int | None) -> Rewritten | Convolutions:
    """Replace the convolutions of a file that fastcam's kernels compute faster.

    Parameters
    ----------
    path : Path
    threads : int or None
        Of the session.

    Returns
    -------
    Rewritten or Convolutions
        The model to open instead of the file, or why the file is opened as it is.
    """
    reason = _why_impossible()
    if reason is not None:
        return Convolutions(reason=reason)
    try:
        # A link may point outside its folder, and ONNX Runtime does not read weights there.
        path = path.resolve(strict=True)
        state = file_state(path)
        stored = read_stored(path)
    except (OSError, ValueError) as error:
        return Convolutions(reason=f"the file cannot be read: {error}")  # ONNX Runtime will reject it, too
    if stored.has_external_data:
        return Convolutions(reason="the file keeps weights in other files")
    if not costs.may_gain(stored):
        return Convolutions(reason=_NO_GAIN)
    return _rewrite(path, state, stored, threads)


def _rewrite(path: Path, state: FileState, stored: StoredModel, threads: int | None) -> Rewritten | Convolutions:
    import onnx

    try:
        model = onnx.ModelProto.FromString(stored.message)
        drop_evidence(model)
        network = read_network(model, stored)
    except Exception as error:  # noqa: BLE001 - protobuf and shape inference raise their own
        return Convolutions(reason=f"the file cannot be read: {error}")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in network.nodes):
        return Convolutions(reason="the model is quantised")
    chosen = costs.choose(network)
    return _rewritten(path, state, model, network, stored, chosen, threads) if chosen else Convolutions(reason=_NO_GAIN)


def _why_impossible() -> str | None:
    onnxruntime = import_onnxruntime()
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"ONNX Runtime {onnxruntime.__version__} is older than 1.23"
    from ... import kernels

    if kernels.describe()["backend"] != "native":
        return "FASTCAM_BACKEND selects the reference backend instead of the native kernels"
    from ...kernels import _cpu

    if not _cpu.convolution_supported():
        return f"there are no kernels for the instruction set {_cpu.instruction_set()!r}"
    return None


def _rewritten(
    path: Path,
    state: FileState,
    model: onnx.ModelProto,
    network: Network,
    stored: StoredModel,
    chosen: list[Layer],
    threads: int | None,
) -> Rewritten:
    from onnx import helper

    from ...kernels import _cpu

    count = threads or _cpu.processor_count()
    published: list[_cpu.PublishedConvolution | _cpu.PublishedDense] = []
    algorithms: dict[str, str] = {}

    def emit(layer: Layer, output: str) -> onnx.NodeProto:
        algorithm = layer.algorithm()
        if algorithm is None:
            raise ValueError(f"layer {layer.name!r} was chosen although no kernel computes it")
        weights = _array(layer.weights, network, stored)
        bias = None if layer.bias is None else _array(layer.bias, network, stored)
        published.append(_cpu.PublishedConvolution(layer.native(), algorithm, weights, bias, count))
        algorithms[layer.name] = algorithm.name
        return helper.make_node(
            "Convolution", [], [output], name=layer.name, domain=DOMAIN, number=published[-1].number, threads=count
        )

    replaced: dict[int, onnx.NodeProto | None] = {}
    for dense in find_dense_layers(network):
        layer = _published_dense(dense, network, stored)
        if layer is None:
            continue
        published.append(layer)
        algorithms[dense.output] = "sparse inputs"
        replaced |= dict.fromkeys(map(id, dense.nodes))
        replaced[id(dense.nodes[-1])] = helper.make_node(
            "Dense", [dense.input], [dense.output], name=dense.output, domain=DOMAIN, number=layer.number, threads=count
        )
    rewriter = Rewriter(network, chosen, emit, replaced)
    read = {name for node in rewriter.nodes for name in node.input}
    graph = model.graph
    del graph.node[:], graph.value_info[:]
    graph.node.extend(rewriter.nodes)
    inputs = {item.name for item in graph.input}
    kept = [item for item in graph.initializer if item.name in read or item.name in inputs]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    handed = {item.name for item in kept} - _packed(graph)
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name in handed}
    others = sum(node.op_type == "Conv" for node in rewriter.nodes)
    found = Convolutions(algorithms, others)
    return Rewritten(model.SerializeToString(), path, tensors, _cpu.__file__, found, state, published)


def _published_dense(dense: DenseLayer, network: Network, stored: StoredModel) -> _cpu.PublishedDense | None:
    """Pass the weights of a dense layer to the kernels chunk by chunk; None if a weight is not finite."""
    from ...kernels import _cpu

    tensor = stored.tensors[dense.weights]
    bias = None if dense.bias is None else _array(dense.bias, network, stored)
    rows = max(1, _CHUNK // (tensor.shape[1] * tensor.dtype.itemsize))
    inputs, outputs = tensor.shape
    return _cpu.PublishedDense.publish(inputs, outputs, bias, dense.low, dense.high, tensor.read_rows(rows))


def _packed(graph: onnx.GraphProto) -> set[str]:
    """Return the weights that ONNX Runtime packs and then drops: matrices that a single dense layer reads."""
    readers: dict[str, list[bool]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append(node.op_type in ("Gemm", "MatMul") and index == 1)
    matrices = {item.name for item in graph.initializer if len(item.dims) == 2 and item.data_type == item.FLOAT}
    return {name for name in matrices if readers.get(name) == [True]}


def _array(name: str, network: Network, stored: StoredModel) -> npt.NDArray[Any]:
    tensor = stored.tensors.get(name)
    return np.ascontiguousarray(network.small[name] if tensor is None else tensor.read())
