"""Our own convolutions in ONNX Runtime's sessions: the file's results, whatever computes them, against float64."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from networks import Array, NetworkBuilder, relative_error
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import fastcam
from fastcam.errors import ArgumentError, ModelError, NonFiniteError
from fastcam.explaining import convolutions, stored
from fastcam.explaining.convolutions import costs, planning, rewriting
from fastcam.graph import Graph
from fastcam.kernels import _cpu

# The bound for whole networks against float64.
_TOLERANCE = 1e-4
_OUTPUTS = ["logits", "activations", "weights"]

pytestmark = pytest.mark.skipif(
    isinstance(convolutions._why_impossible(), str), reason=str(convolutions._why_impossible())
)


def _vgg(side: int = 32) -> Graph:
    """Two blocks, a max pooling after each, and a dense layer large enough to skip zeros."""
    net = NetworkBuilder(("batch", 3, side, side))
    value = net.input
    for inputs, outputs in ((3, 16), (16, 32)):
        value = net.add("Relu", net.conv(value, (outputs, inputs, 3, 3), pads=[1] * 4))
        value = net.add("Relu", net.conv(value, (outputs, outputs, 3, 3), pads=[1] * 4))
        value = net.add("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])
    value = net.add("Relu", net.conv(value, (32, 32, 3, 3), pads=[1] * 4))
    inputs = 32 * (side // 4) ** 2
    value = net.add("Relu", net.dense(net.add("Flatten", value), (inputs, max(64, 2**20 // inputs))))
    return net.build(net.dense(value, (max(64, 2**20 // inputs), 5)))


def _residual(side: int = 21) -> Graph:
    """Bottlenecks as in ResNet: a projection with stride, a sum of two convolutions, a sum with the input."""
    net = NetworkBuilder(("batch", side, side, 3))
    value = net.add("Transpose", net.input, perm=[0, 3, 1, 2])
    value = net.add("Relu", net.conv(value, (24, 3, 3, 3), pads=[1] * 4))
    for channels, stride in ((24, 2), (32, 1)):
        inner = net.add("Relu", net.conv(value, (16, channels, 1, 1), strides=[stride] * 2))
        inner = net.add("Clip", net.conv(inner, (16, 16, 3, 3), pads=[1] * 4), *_bounds(net, 0, 6))
        inner = net.conv(inner, (32, 16, 1, 1))
        short = net.conv(value, (32, channels, 1, 1), strides=[stride] * 2) if stride == 2 else value
        value = net.add("Relu", net.add("Add", short, inner))
    pooled = net.add("Flatten", net.add("GlobalAveragePool", value))
    return net.build(net.dense(pooled, (32, 5)))


def _branches(side: int = 17) -> Graph:
    """Convolutions that our kernels do not support between supported ones; a Concat, a sum and a lone activation."""
    net = NetworkBuilder(("batch", 3, side, side))
    value = net.add("Relu", net.conv(net.input, (16, 3, 3, 3), pads=[1] * 4))
    left = net.conv(value, (16, 16, 3, 3), pads=[1] * 4)
    right = net.add("Relu", net.conv(value, (16, 16, 3, 3), pads=[2] * 4, dilations=[2, 2]))
    joined = net.add("Concat", left, net.add("Sigmoid", left), right, axis=1)
    grouped = net.add("Relu", net.conv(joined, (24, 24, 3, 3), pads=[1] * 4, group=2))
    last = net.add("Relu", net.conv(grouped, (32, 24, 3, 3), pads=[0, 1, 2, 1]))
    pooled = net.add("Flatten", net.add("GlobalAveragePool", last))
    return net.build(net.dense(pooled, (32, 5)))


def _bounds(net: NetworkBuilder, low: float, high: float) -> tuple[str, str]:
    return net.constant(np.float32(low)), net.constant(np.float32(high))


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make our kernels compute whatever they can, however little it gains."""
    monkeypatch.setattr(costs, "choose", planning.find_layers)
    monkeypatch.setattr(costs, "may_gain", lambda stored: True)


@pytest.fixture
def export(tmp_path: Path, every_layer: None) -> Callable[[Graph], Path]:
    def write(graph: Graph) -> Path:
        path = tmp_path / "explained.onnx"
        fastcam.export(graph.to_model(), path)
        return path

    return write


def _images(explainer: fastcam.Explainer, count: int = 3) -> Array:
    return np.random.default_rng(1).normal(size=(count, *explainer._image_shape)).astype(np.float32)


def _run(explainer: fastcam.Explainer, images: Array) -> dict[str, Array]:
    outputs = explainer._session.run(_OUTPUTS, {explainer._model.input_name: images})
    return dict(zip(_OUTPUTS, outputs, strict=True))


def _in_float64(path: Path, images: Array) -> dict[str, Array]:
    """The whole file, computed in float64 by ONNX's reference."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    feed = {model.graph.input[0].name: images.astype(np.float64), "target": np.full((1, 1), -1, np.int64)}
    outputs = ReferenceEvaluator(model).run(_OUTPUTS, feed)
    return dict(zip(_OUTPUTS, map(np.asarray, outputs), strict=True))


_NETWORKS = {"vgg": _vgg, "residual": _residual, "branches": _branches}


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


@pytest.mark.parametrize("name", _NETWORKS)
def test_results_are_those_of_float64(name: str, instruction_set: str, export: Callable[[Graph], Path]) -> None:
    if not _cpu.convolution_supported():
        pytest.skip(f"there are no convolution kernels for {instruction_set}")
    path = export(_NETWORKS[name]())
    ours, theirs = (fastcam.Explainer(path, convolutions=choice) for choice in ("auto", "onnxruntime"))
    assert ours.convolutions.layers
    assert not theirs.convolutions.layers
    images = _images(ours)
    expected = _in_float64(path, images)
    for explainer in (ours, theirs):
        for output, found in _run(explainer, images).items():
            assert relative_error(found, expected[output]) <= _TOLERANCE, output


@pytest.mark.parametrize("side", [8, 9, 13, 30, 63])
@pytest.mark.parametrize("name", _NETWORKS)
def test_odd_sizes(name: str, side: int, export: Callable[[Graph], Path]) -> None:
    path = export(_NETWORKS[name](side))
    ours, theirs = (fastcam.Explainer(path, convolutions=choice) for choice in ("auto", "onnxruntime"))
    images = _images(ours)
    expected = _run(theirs, images)
    for output, found in _run(ours, images).items():
        assert relative_error(found, expected[output]) <= _TOLERANCE, output


def test_layers_are_fused_as_a_whole(export: Callable[[Graph], Path]) -> None:
    vgg = fastcam.Explainer(export(_vgg())).convolutions
    assert vgg.others == 0
    assert sorted(vgg.layers.values()).count("sparse inputs") == 1
    assert len(vgg.layers) == 6
    residual = fastcam.Explainer(export(_residual()))
    assert residual.convolutions.others == 0
    assert len(residual.convolutions.layers) == 8


def test_a_residual_network_stays_in_one_layout(every_layer: None, tmp_path: Path) -> None:
    """One transpose, of the activations: the input is already channels-last."""
    path = tmp_path / "residual.onnx"
    fastcam.export(_residual().to_model(), path)
    rewritten = convolutions.rewrite(path, None)
    assert isinstance(rewritten, convolutions.Rewritten)
    nodes = onnx.ModelProto.FromString(rewritten.message).graph.node
    transposes = [
        node for node in nodes if node.op_type == "Transpose" and tuple(node.attribute[0].ints) == (0, 3, 1, 2)
    ]
    assert [node.output[0] for node in transposes] == ["activations"]
    assert not {"Conv", "Add", "Relu", "Clip"} & {node.op_type for node in nodes}


def test_what_our_kernels_refuse_stays_with_onnx_runtime(export: Callable[[Graph], Path]) -> None:
    path = export(_branches())
    found = fastcam.Explainer(path).convolutions
    refused = [
        node
        for node in onnx.load(path).graph.node
        if node.op_type == "Conv" and {"group", "dilations"} & {item.name for item in node.attribute}
    ]
    assert len(refused) == 2
    assert found.others == 2
    assert len(found.layers) == 3
    assert found.reason is None


@pytest.mark.parametrize("name", _NETWORKS)
def test_an_image_does_not_depend_on_threads_batch_or_neighbours(
    name: str, export: Callable[[Graph], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as far as our kernels compute: ONNX Runtime's dense layers are another matter."""
    path = export(_NETWORKS[name]())
    # More threads than this machine may have processors.
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    one = fastcam.Explainer(path, threads=1)
    images = _images(one, 5)
    expected = _run(one, images)["activations"]
    for threads in range(2, 9):
        found = _run(fastcam.Explainer(path, threads=threads), images)["activations"]
        np.testing.assert_array_equal(found, expected)
    for index in range(len(images)):
        alone = _run(one, images[index : index + 1])["activations"]
        np.testing.assert_array_equal(alone[0], expected[index])
    other = np.concatenate([images[2:3], images[:1] * 1e6, images[2:3]])
    found = _run(one, other)["activations"]
    np.testing.assert_array_equal(found[0], expected[2])
    np.testing.assert_array_equal(found[2], expected[2])


def test_eight_threads_call_at_once(export: Callable[[Graph], Path]) -> None:
    explainer = fastcam.Explainer(export(_vgg()), threads=2)
    batches = [_images(explainer, 1 + index % 3) * (1 + index) for index in range(24)]
    expected = [_run(explainer, batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: _run(explainer, batch), batches))
    for ours, theirs in zip(found, expected, strict=True):
        for output in _OUTPUTS:
            np.testing.assert_array_equal(ours[output], theirs[output])


def test_the_dense_layer_gives_an_image_the_same_in_any_batch(export: Callable[[Graph], Path]) -> None:
    """Zeros are skipped per image. The other outputs come from ONNX Runtime's own products."""
    explainer = fastcam.Explainer(export(_vgg()))
    dense = next(name for name, how in explainer.convolutions.layers.items() if how == "sparse inputs")
    assert dense
    images = _images(explainer, 4)
    together = _run(explainer, images)["logits"]
    for index in range(4):
        np.testing.assert_allclose(_run(explainer, images[index : index + 1])["logits"][0], together[index], rtol=1e-6)


@pytest.mark.parametrize("name", _NETWORKS)
def test_a_value_that_is_not_finite_names_its_image(name: str, export: Callable[[Graph], Path]) -> None:
    explainer = fastcam.Explainer(export(_NETWORKS[name]()))
    assert explainer.convolutions.layers
    images = _images(explainer, 2)
    images[1] = images[1].clip(-3, 3) * np.float32(1e38)
    with pytest.raises(NonFiniteError, match="image 1"):
        explainer(images)


def test_large_values_stay_finite_where_a_direct_convolution_does(export: Callable[[Graph], Path]) -> None:
    path = export(_residual())
    ours, theirs = (fastcam.Explainer(path, convolutions=choice) for choice in ("auto", "onnxruntime"))
    images = _images(ours) * np.float32(1e30)
    expected = _run(theirs, images)["activations"]
    found = _run(ours, images)["activations"]
    assert np.isfinite(expected).all()
    assert relative_error(found.astype(np.float64), expected.astype(np.float64)) <= _TOLERANCE


def test_a_dense_layer_with_weights_that_are_not_finite_skips_no_zeros(tmp_path: Path, every_layer: None) -> None:
    """Zero times infinity is not zero."""
    graph = _vgg()
    name = next(key for key, array in graph.constants.items() if array.ndim == 2 and array.size >= 2**20)
    graph.constants[name] = graph.constants[name].copy()
    graph.constants[name][7, 7] = np.inf
    fastcam.export(graph.to_model(), tmp_path / "explained.onnx")
    found = fastcam.Explainer(tmp_path / "explained.onnx").convolutions
    assert "sparse inputs" not in found.layers.values()
    assert len(found.layers) == 5


def _dropped_bias(layer: planning.Layer) -> planning.Layer:
    return replace(layer, bias=None)


def _dropped_activation(layer: planning.Layer) -> planning.Layer:
    return replace(layer, low=-np.inf, high=np.inf)


def _invented_bound(layer: planning.Layer) -> planning.Layer:
    return replace(layer, high=0.5)


@pytest.mark.parametrize("fault", [_dropped_bias, _dropped_activation, _invented_bound])
def test_a_fault_in_the_rewrite_is_seen(
    fault: Callable[[planning.Layer], planning.Layer], export: Callable[[Graph], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(_vgg())
    monkeypatch.setattr(costs, "choose", lambda network: [fault(layer) for layer in planning.find_layers(network)])
    explainer = fastcam.Explainer(path)
    images = _images(explainer)
    assert relative_error(_run(explainer, images)["activations"], _in_float64(path, images)["activations"]) > 1e-3


def test_a_wrong_order_of_axes_is_seen(export: Callable[[Graph], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(_residual())
    monkeypatch.setattr(rewriting, "TO_FIRST", (0, 3, 2, 1))
    explainer = fastcam.Explainer(path)
    images = _images(explainer)
    assert relative_error(_run(explainer, images)["activations"], _in_float64(path, images)["activations"]) > 1e-3


def test_describe_says_how_layers_run(export: Callable[[Graph], Path]) -> None:
    path = export(_branches())
    found = fastcam.Explainer(path, device="cpu").describe()
    assert found["providers"] == ["CPUExecutionProvider"]
    assert set(found["convolutions"]["layers"].values()) <= {"winograd_4x4", "winograd_6x6", "gathered", "pointwise"}
    assert found["convolutions"]["others"] == 2
    found = fastcam.Explainer(path, convolutions="onnxruntime").describe()
    assert found["convolutions"] == {"layers": {}, "others": None, "reason": "as requested"}


def test_an_unknown_choice_is_refused(export: Callable[[Graph], Path]) -> None:
    with pytest.raises(ArgumentError, match="convolutions='fast': choose 'auto' or 'onnxruntime'"):
        fastcam.Explainer(export(_vgg()), convolutions="fast")


def test_a_network_that_gains_is_rewritten(tmp_path: Path, instruction_set: str) -> None:
    if not _cpu.convolution_supported():
        pytest.skip(f"there are no convolution kernels for {instruction_set}")
    net = NetworkBuilder(("batch", 3, 56, 56))
    value = net.input
    for inputs in (3, 64, 64, 64):
        value = net.add("Relu", net.conv(value, (64, inputs, 3, 3), pads=[1] * 4))
    model = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (64, 5))).to_model()
    fastcam.export(model, tmp_path / "wide.onnx")
    found = fastcam.Explainer(tmp_path / "wide.onnx", device="cpu").convolutions
    assert sum(how.startswith("winograd") for how in found.layers.values()) == 3


def test_a_layer_among_others_is_not_worth_its_transposes(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 30, 30))
    value = net.add("Relu", net.conv(net.input, (16, 3, 3, 3), pads=[1] * 4, strides=[2, 2]))
    for _ in range(3):
        value = net.add("Relu", net.conv(value, (16, 1, 3, 3), pads=[1] * 4, group=16))
        value = net.add("Relu", net.conv(value, (16, 16, 3, 3), pads=[1] * 4))
    model = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (16, 5))).to_model()
    fastcam.export(model, tmp_path / "mixed.onnx")
    assert not fastcam.Explainer(tmp_path / "mixed.onnx", device="cpu").convolutions.layers


def test_a_network_without_gain_is_left_alone(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 16, 16))
    value = net.add("Relu", net.conv(net.input, (8, 3, 3, 3), pads=[1] * 4))
    value = net.add("Relu", net.conv(value, (8, 1, 3, 3), pads=[1] * 4, group=8))
    model = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (8, 5))).to_model()
    fastcam.export(model, tmp_path / "depthwise.onnx")
    found = fastcam.Explainer(tmp_path / "depthwise.onnx").convolutions
    assert not found.layers
    assert found.reason == "no convolution of the model would be faster"


def test_an_older_onnx_runtime_computes_all_itself(
    export: Callable[[Graph], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(_vgg())
    monkeypatch.setattr("onnxruntime.__version__", "1.19.2")
    found = fastcam.Explainer(path).convolutions
    assert found.reason == "ONNX Runtime 1.19.2 is older than 1.23"


def test_float16_is_left_alone(tmp_path: Path, every_layer: None) -> None:
    fastcam.export(_vgg().to_model(), tmp_path / "half.onnx", precision="fp16")
    explainer = fastcam.Explainer(tmp_path / "half.onnx", device="cpu")
    assert not any(how.startswith("winograd") for how in explainer.convolutions.layers.values())
    explainer(_images(explainer))


def test_stored_weights_are_those_of_the_file(export: Callable[[Graph], Path]) -> None:
    path = export(_vgg())
    found = stored.read_stored(path)
    model = onnx.ModelProto.FromString(found.message)
    expected = {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    assert {item.name for item in model.graph.initializer} == set(expected)
    assert found.tensors
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[name])
        np.testing.assert_array_equal(np.concatenate(list(tensor.read_rows(3))), expected[name])
    assert len(found.message) < 2**16


@pytest.mark.parametrize("cut", [1, 1000, 500_000])
def test_a_damaged_file_is_refused_as_ever(cut: int, export: Callable[[Graph], Path]) -> None:
    path = export(_vgg())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelError, match="cannot load"):
        fastcam.Explainer(path)


def test_a_link_to_a_file_of_another_folder(export: Callable[[Graph], Path], tmp_path: Path) -> None:
    path = export(_vgg())
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.onnx"
    link.symlink_to(path)
    linked, plain = fastcam.Explainer(link), fastcam.Explainer(path)
    assert linked.convolutions == plain.convolutions
    images = _images(plain)
    np.testing.assert_array_equal(_run(linked, images)["logits"], _run(plain, images)["logits"])


def test_a_file_that_is_replaced_while_it_is_opened(
    export: Callable[[Graph], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(_vgg())
    find = costs.choose

    def replace_file(network: planning.Network) -> list[planning.Layer]:
        copy = path.with_suffix(".copy")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        return find(network)

    monkeypatch.setattr(costs, "choose", replace_file)
    with pytest.raises(ModelError, match="was replaced while it was opened: open it again"):
        fastcam.Explainer(path)


def test_nothing_of_the_file_is_needed_after_opening(export: Callable[[Graph], Path]) -> None:
    """It may be overwritten while a service runs."""
    path = export(_vgg())
    explainer = fastcam.Explainer(path)
    images = _images(explainer)
    expected = _run(explainer, images)
    path.write_bytes(b"\0" * path.stat().st_size)
    for output, found in _run(explainer, images).items():
        np.testing.assert_array_equal(found, expected[output])
    path.write_bytes(b"")
    _run(explainer, images)


def _session(op: str, number: int, columns: int, results: int, threads: int = 1) -> Any:
    """Open a session with a single node."""
    import onnxruntime

    node = helper.make_node(op, ["x"], ["y"], domain="fastcam", number=number, threads=threads)
    shapes: dict[str, list[str | int | None]] = {"x": ["n", columns], "y": ["n", results]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "one", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastcam", 1)]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(_cpu.__file__)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("op", ["Convolution", "Dense"])
def test_a_number_that_nobody_published_is_an_error(op: str) -> None:
    with pytest.raises(Exception, match="is not published"):
        _session(op, 2**40, 8, 8)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 300), (511, 256), (512, 257), (1300, 515)])
def test_dense_layers_against_float64(inputs: int, outputs: int, rng: np.random.Generator) -> None:
    weights = rng.normal(size=(inputs, outputs)).astype(np.float32)
    bias = rng.normal(size=outputs).astype(np.float32)
    blocks = [weights[first : first + 100] for first in range(0, inputs, 100)]
    published = _cpu.PublishedDense.publish(inputs, outputs, bias, -1.0, 2.0, blocks)
    assert published is not None
    images = rng.normal(size=(5, inputs)).astype(np.float32) * (rng.random((5, inputs)) < 0.3).astype(np.float32)
    expected = (images.astype(np.float64) @ weights + bias).clip(-1, 2)
    (found,) = _session("Dense", published.number, inputs, outputs).run(None, {"x": images})
    assert relative_error(found, expected) <= 1e-5
    for threads in (2, 5):
        (again,) = _session("Dense", published.number, inputs, outputs, threads).run(None, {"x": images})
        np.testing.assert_array_equal(again, found)
    for index in range(len(images)):
        session = _session("Dense", published.number, inputs, outputs)
        np.testing.assert_array_equal(session.run(None, {"x": images[index : index + 1]})[0][0], found[index])


def test_a_dense_layer_passes_nan_and_infinity_on() -> None:
    published = _cpu.PublishedDense.publish(3, 2, None, 0.0, np.inf, [np.eye(3, 2, dtype=np.float32)])
    assert published is not None
    images = np.array([[np.nan, 1, 0], [np.inf, 1, 0], [0, 0, np.nan]], np.float32)
    (found,) = _session("Dense", published.number, 3, 2).run(None, {"x": images})
    np.testing.assert_array_equal(found, np.array([[np.nan, np.nan], [np.inf, np.nan], [np.nan, np.nan]]))


def test_a_dense_layer_refuses_other_weights_than_announced() -> None:
    rows = np.ones((3, 2), np.float32)
    for blocks in ([], [rows], [rows, rows], [rows.T]):
        with pytest.raises(ValueError, match="blocks"):
            _cpu.PublishedDense.publish(5, 2, None, 0.0, 1.0, blocks)
    assert _cpu.PublishedDense.publish(3, 2, None, 0.0, 1.0, [rows * np.float32(np.inf)]) is None


def test_our_part_of_the_c_api_is_onnx_runtimes(tmp_path: Path) -> None:
    """Against ONNX Runtime's own header, if installed."""
    compiler = shutil.which("c++")
    folders = [Path("/usr/include/onnxruntime"), Path("/usr/include"), Path("/usr/local/include/onnxruntime")]
    header = next((folder for folder in folders if (folder / "onnxruntime_c_api.h").exists()), None)
    if compiler is None or header is None:
        pytest.skip("needs a C++ compiler and ONNX Runtime's header: apt install g++ libonnxruntime-dev (Debian 13)")
    source = Path(__file__).parents[2] / "csrc" / "tests" / "check_onnxruntime_api.cpp"
    include = source.parents[1] / "cpu"
    command: list[Any] = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{header}", source]
    subprocess.run(command, check=True)
