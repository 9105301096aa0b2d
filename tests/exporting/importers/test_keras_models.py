"""Keras models into graphs: layers, names, preprocessing, errors."""

from __future__ import annotations

import json
import logging
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from networks import relative_error

import fastcam
from fastcam.errors import LayerError, MissingExtraError, ModelError
from fastcam.exporting.importers import ImportOptions, import_model, keras_files
from fastcam.exporting.importers.quarantine import CrashError
from fastcam.exporting.passes.simplify import simplify
from fastcam.preprocessing import Preprocessing

keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
pytest.importorskip("tensorflow", reason="needs tensorflow: pip install fastcam[keras]")
Layer: Any = keras.layers.Layer
Model: Any = keras.Model


def _model(*first: Any, head: str = "flatten") -> Any:
    layers = keras.layers
    heads = {"flatten": layers.Flatten(), "pool": layers.GlobalAveragePooling2D()}
    return keras.Sequential(
        [
            keras.Input((12, 12, 3), name="photo"),
            *first,
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(max_value=6.0, name="activation"),
            layers.Dropout(0.5, name="dropout"),
            heads[head],
            layers.Dense(5, activation="softmax", name="scores"),
        ]
    )


def test_values_are_named_after_their_layers() -> None:
    imported = import_model(_model())
    assert imported.framework == "keras"
    assert list(imported.graph.inputs) == ["photo"]
    assert imported.graph.inputs["photo"].shape == ("batch", 12, 12, 3)
    assert imported.layers["conv"] != imported.layers["activation"]
    simplify(imported.graph)
    ops = [node.op_type for node in imported.graph.nodes]
    assert ops.count("Conv") == ops.count("Clip") == 1
    assert not {"Mul", "Sub", "Shape", "BatchNormalization", "Identity"} & set(ops)
    assert imported.graph.shape("activation") == ("batch", 4, 10, 10)


def test_the_network_computes_what_keras_computes(rng: np.random.Generator, tmp_path: Path) -> None:
    for head in ("flatten", "pool"):
        model = _model(head=head)
        model.get_layer("norm").set_weights([rng.uniform(0.5, 2, 4) for _ in range(4)])
        fastcam.export(model, tmp_path / "model.onnx", preprocess="none")
        image = rng.normal(size=(3, 12, 12, 3)).astype(np.float32)
        found = fastcam.Explainer(tmp_path / "model.onnx")(image)
        assert relative_error(found.probabilities, model.predict(image, verbose=0)) < 1e-5


def test_a_layer_that_hands_its_input_on_means_the_same_value() -> None:
    imported = import_model(_model())
    assert imported.layers["dropout"] == imported.layers["activation"]


def test_nested_models_are_seen_through(tmp_path: Path) -> None:
    inner = keras.Sequential(
        [keras.Input((12, 12, 3)), keras.layers.Conv2D(4, 3, activation="relu", name="deep_conv")], name="backbone"
    )
    outer = keras.Sequential(
        [keras.Input((12, 12, 3)), inner, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)]
    )
    result = fastcam.export(outer, tmp_path / "nested.onnx", layer="deep_conv")
    assert result.layer == "deep_conv"


def test_vgg_brings_its_preprocessing() -> None:
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
    model = keras.Sequential([model, keras.layers.Dense(3)])
    guess = import_model(model).guess
    assert guess is not None
    assert guess.preprocessing == Preprocessing.of("vgg16")


def test_names_are_the_same_each_time() -> None:
    model = _model()
    first, second = (import_model(model).graph for _ in range(2))
    assert [node.SerializeToString() for node in first.nodes] == [node.SerializeToString() for node in second.nodes]
    assert list(first.constants) == list(second.constants)


def test_the_converters_report_stays_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        import_model(_model())
    assert not [record for record in caplog.records if record.name.startswith("tf2onnx")]


def test_layers_are_left_as_they_were() -> None:
    call = keras.layers.Layer.__call__
    import_model(_model())
    assert keras.layers.Layer.__call__ is call


def _open_model(height: int | None = None) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((height, None, 3)), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(5)]
    )


def test_an_open_image_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \(None, None, None, 3\): give input_size=\(224, 224\)"):
        import_model(_open_model())


def test_an_open_image_size_can_be_given(tmp_path: Path, rng: np.random.Generator) -> None:
    model = _open_model(height=10)
    assert fastcam.export(model, tmp_path / "m.onnx", input_size=(10, 14)).input_shape == ("batch", 10, 14, 3)
    image = rng.normal(size=(2, 10, 14, 3)).astype(np.float32)
    found = fastcam.Explainer(tmp_path / "m.onnx")(image)
    assert relative_error(found.logits, model.predict(image, verbose=0)) < 1e-5
    with pytest.raises(ModelError, match=r"input_size=\(12, 14\) does not fit .* shape \(None, 10, None, 3\)"):
        import_model(model, ImportOptions(input_size=(12, 14)))


def test_several_inputs_are_refused() -> None:
    inputs = [keras.Input((4, 4, 3)), keras.Input((4, 4, 3))]
    model = keras.Model(inputs, keras.layers.Add()(inputs))
    with pytest.raises(ModelError, match="2 inputs"):
        import_model(model)


def test_an_input_that_is_no_image_is_refused() -> None:
    numbers = keras.Input((8,))
    with pytest.raises(ModelError, match=r"shape \(None, 8\): fastcam explains pictures"):
        import_model(keras.Model(numbers, keras.layers.Dense(3)(numbers)))
    words = keras.Input((8, 8, 3), dtype="int32", name="words")
    model = keras.Model(words, keras.layers.Conv2D(3, 3)(words))
    with pytest.raises(ModelError, match=r"'words' is int32, .*keras\.Input\(shape, dtype=\"float32\"\)"):
        import_model(model)


def test_scores_for_every_position_are_refused(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Reshape((6, 24))])
    with pytest.raises(ModelError, match=r"shape \('batch', 6, 24\): a classifier gives \(N, classes\)"):
        fastcam.export(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_damaged_keras_file_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(ModelError, match=rf"broken\{suffix}: Keras cannot load"):
        import_model(tmp_path / f"broken{suffix}")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_files_that_crash_the_hdf5_library_are_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library meets the file in a child process first: here one that the same file always kills."""
    keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()]).save(
        tmp_path / f"m{suffix}"
    )
    works = []

    def crash(work: str, data: bytes, *, size: int) -> bytes:
        works.append((work, size))
        raise CrashError("died", late=False)

    monkeypatch.setattr(keras_files, "QUARANTINE", crash)
    with pytest.raises(ModelError, match=f"m{suffix}: the HDF5 library crashes on this file: it is damaged"):
        fastcam.export(tmp_path / f"m{suffix}", tmp_path / "out.onnx")
    assert works == [("fastcam.exporting.importers.keras_files:read_hdf5", (tmp_path / f"m{suffix}").stat().st_size)]


def test_an_archive_with_a_damaged_member_is_refused(tmp_path: Path) -> None:
    _model().save(tmp_path / "good.keras")
    with zipfile.ZipFile(tmp_path / "good.keras") as good, zipfile.ZipFile(tmp_path / "bad.keras", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, b"damaged" if name == "model.weights.h5" else good.read(name))
    with pytest.raises(ModelError, match=r"bad\.keras: Keras cannot load"):
        import_model(tmp_path / "bad.keras")


def test_a_model_with_assets_loads_the_long_way(tmp_path: Path) -> None:
    _model().save(tmp_path / "good.keras")
    with zipfile.ZipFile(tmp_path / "good.keras", "a") as archive:
        archive.writestr("assets/notes.txt", b"something that a layer keeps")
    assert import_model(tmp_path / "good.keras").layers["conv"]


@pytest.mark.parametrize("module", ["tf2onnx", "tensorflow"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    model = _model()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"fastcam\[keras\]"):
        import_model(model)


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ModelError, match=r"'jax'.*KERAS_BACKEND=tensorflow"):
        import_model(_model())


def test_a_model_that_was_never_built_is_refused() -> None:
    with pytest.raises(ModelError, match=r"does not know its input: build it with keras\.Input"):
        import_model(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ModelError, match="does not know its input"):
        import_model(keras.layers.Dense(3))


class _Subclassed(Model):
    """Features and two heads, returned through ``pack``; its call has no ``training`` argument."""

    def __init__(self, pack: Any = lambda breed, age: {"breed": breed, "age": age}) -> None:
        super().__init__()
        self.pack = pack
        self.convolution = keras.layers.Conv2D(4, 3, activation="relu", name="conv")
        self.pool = keras.layers.GlobalAveragePooling2D(name="pool")
        self.heads = [keras.layers.Dense(size, name=name) for name, size in (("breeds", 5), ("years", 2))]

    def call(self, images: Any) -> Any:
        pooled = self.pool(self.convolution(images))
        return self.pack(*(head(pooled) for head in self.heads))


def test_a_subclassed_model_has_to_be_called_once() -> None:
    model = _Subclassed(lambda breed, _: breed)
    with pytest.raises(ModelError, match=r"does not know its input: .*example_input"):
        import_model(model)
    model(np.zeros((1, 9, 12, 3), np.float32))
    imported = import_model(model)
    assert imported.graph.inputs["images"].shape == ("batch", 9, 12, 3)
    assert list(imported.layers) == ["conv", "pool"]


def _functional(outputs: Any) -> Any:
    photo = keras.Input((9, 9, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv")(photo))
    return keras.Model(photo, outputs(pooled))


def _called(model: Any) -> Any:
    model(np.zeros((1, 9, 9, 3), np.float32))
    return model


def _dense(size: int, name: str) -> Any:
    return keras.layers.Dense(size, name=name)


# The model, the names of its outputs, and all valid names of the output with five classes.
_OUTPUTS: dict[str, tuple[Any, str, list[str]]] = {
    "functional, dict": (
        lambda: _functional(lambda x: {"breed": _dense(5, "breeds")(x), "age": _dense(2, "years")(x)}),
        "'age', 'breed'",
        ["breed", "breeds"],
    ),
    "functional, list": (
        lambda: _functional(lambda x: [_dense(2, "years")(x), _dense(5, "breeds")(x)]),
        "'years', 'breeds'",
        ["breeds", "1"],
    ),
    "functional, swapped": (
        lambda: _functional(lambda x: {"a": _dense(5, "b")(x), "b": _dense(2, "a")(x)}),
        "'a', 'b'",
        ["a"],
    ),
    "functional, nested": (
        lambda: _functional(lambda x: {"heads": [_dense(2, "years")(x), _dense(5, "breeds")(x)]}),
        "'heads/0', 'heads/1'",
        ["heads/1", "breeds"],
    ),
    "subclassed, dict": (lambda: _called(_Subclassed()), "'age', 'breed'", ["breed", "breeds"]),
    "subclassed, tuple": (
        lambda: _called(_Subclassed(lambda breed, age: (age, breed))),
        "'years', 'breeds'",
        ["breeds", "1"],
    ),
    "subclassed, list without layers": (
        lambda: _called(_Subclassed(lambda breed, age: [age + 1, breed * 2])),
        "'0', '1'",
        ["1"],
    ),
}


@pytest.mark.parametrize("case", _OUTPUTS)
def test_one_of_several_outputs_is_chosen_by_its_name(case: str, rng: np.random.Generator, tmp_path: Path) -> None:
    build, names, aliases = _OUTPUTS[case]
    model = build()
    with pytest.raises(ModelError, match=rf"has 2 outputs, {names}: name the one .* output="):
        import_model(model)
    with pytest.raises(ModelError, match=rf"no output 'bread': .*Outputs: {names}"):
        import_model(model, ImportOptions(output="bread"))
    image = rng.normal(size=(2, 9, 9, 3)).astype(np.float32)
    expected = next(scores for scores in keras.tree.flatten(model(image)) if scores.shape[1] == 5)
    for name in aliases:
        fastcam.export(model, tmp_path / "m.onnx", output=name)
        assert relative_error(fastcam.Explainer(tmp_path / "m.onnx")(image).logits, expected) < 1e-5


def test_the_nearest_outputs_are_offered() -> None:
    with pytest.raises(ModelError, match="did you mean 'breed' or 'breeds'"):
        import_model(_called(_Subclassed()), ImportOptions(output="bred"))


def test_a_single_output_has_to_have_the_name_that_is_asked_for() -> None:
    assert import_model(_model(), ImportOptions(output="scores")).layers
    with pytest.raises(ModelError, match=r"no output 'breed'.*Outputs: 'scores'"):
        import_model(_model(), ImportOptions(output="breed"))


def _pair() -> Any:
    photo = keras.Input((12, 12, 3))
    parts = [
        keras.Sequential([keras.Input((12, 12, 3)), keras.layers.Conv2D(size, 3, name="conv")], name=name)(photo)
        for name, size in (("left", 2), ("right", 4))
    ]
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Concatenate()(parts))
    return keras.Model(photo, keras.layers.Dense(5)(pooled))


def test_layers_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    imported = import_model(_pair())
    assert "conv" not in imported.layers
    simplify(imported.graph)
    assert [imported.graph.shape(imported.layers[f"{side}/conv"])[1] for side in ("left", "right")] == [2, 4]
    with pytest.raises(LayerError, match="no layer 'conv': did you mean 'left/conv' or 'right/conv'"):
        fastcam.export(_pair(), tmp_path / "m.onnx", layer="conv")


def test_the_calls_of_a_shared_layer_are_told_apart_by_their_number() -> None:
    photo = keras.Input((12, 12, 3))
    shared = keras.layers.Conv2D(3, 3, name="shared")
    model = keras.Model(photo, keras.layers.Flatten()(shared(shared(photo))))
    imported = import_model(model)
    assert [name for name in imported.layers if "shared" in name] == ["shared@1", "shared@2"]
    assert [imported.graph.maps[imported.layers[f"shared@{call}"]] for call in (1, 2)] == [(10, 10, 3), (8, 8, 3)]


@pytest.mark.parametrize("sizes", [(17, 30), (20, 28), (12, 24)])
def test_a_resized_image_has_exactly_the_size_asked_for(sizes: tuple[int, int]) -> None:
    model = keras.Sequential(
        [keras.Input((24, 24, 3)), keras.layers.Resizing(*sizes), keras.layers.Conv2D(4, 1, name="conv")]
    )
    graph = import_model(model).graph
    assert graph.shape("conv")[1:] == (4, *sizes)


def test_a_crop_to_an_aspect_ratio_is_refused() -> None:
    with pytest.raises(ModelError, match=r"size is computed while it runs: use .* without crop_to_aspect_ratio"):
        import_model(_model(keras.layers.Resizing(17, 30, crop_to_aspect_ratio=True)))


def test_augmentation_leaves_nothing_in_the_graph() -> None:
    layers = keras.layers
    model = _model(layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomZoom(0.2), layers.RandomContrast(0.3))
    plain = _model()
    graphs = [import_model(item).graph for item in (model, plain)]
    for graph in graphs:
        simplify(graph)
    assert [node.op_type for node in graphs[0].nodes] == [node.op_type for node in graphs[1].nodes]
    assert len(graphs[0].constants) == len(graphs[1].constants)


def test_policies_are_left_as_they_were() -> None:
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = _model()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    imported = import_model(model)
    assert {layer.dtype_policy.name for layer in model.layers} == {"mixed_float16"}
    assert {type_.dtype for type_ in imported.graph.types.values()} == {np.dtype(np.float32)}
    assert imported.notes == ["The model computes in float16: it is exported in float32."]


def test_half_floats_that_a_layer_insists_on_are_widened() -> None:
    class Half(Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.cast(keras.ops.cast(x, "float16") * 2, "float32")

    imported = import_model(_model(Half()))
    assert {type_.dtype for type_ in imported.graph.types.values()} == {np.dtype(np.float32)}
    assert imported.notes == ["The model computes in 16 bits: it is exported in float32."]


def test_an_op_that_the_converter_lacks_is_named() -> None:
    import tensorflow as tf

    class Gamma(Layer):
        def call(self, x: Any) -> Any:
            return tf.math.lgamma(x)

    with pytest.raises(ModelError, match="no ONNX for TensorFlow's Lgamma"):
        import_model(_model(Gamma()))


def _squeeze_and_excitation(x: Any) -> Any:
    layers = keras.layers
    gate = layers.Dense(4, activation="sigmoid")(layers.GlobalAveragePooling2D()(x))
    return layers.Multiply(name="explained")([x, layers.Reshape((1, 1, 4))(gate)])


def _layer_normalization(x: Any) -> Any:
    layers = keras.layers
    return layers.ReLU(name="explained")(layers.LayerNormalization()(layers.UpSampling2D()(x)))


def _dense_over_channels(x: Any) -> Any:
    return keras.layers.Dense(5, activation="relu", name="explained")(x)


@pytest.mark.parametrize("block", [_squeeze_and_excitation, _layer_normalization, _dense_over_channels])
def test_activations_are_those_of_the_layer(block: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Blocks that leave the channels last: (N,C,h,w) all the same, and the numbers of the Keras layer."""
    image = keras.Input((16, 12, 3))
    x = block(keras.layers.Conv2D(4, 3, activation="relu")(image))
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    features, head = fastcam.split(model, "explained")
    pictures = rng.normal(size=(2, 16, 12, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(features.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: pictures})
    layer = keras.Model(model.inputs, model.get_layer("explained").output)
    expected = np.asarray(layer([pictures])).transpose(0, 3, 1, 2)
    assert relative_error(found, expected) < 1e-5
    (logits,) = onnxruntime.InferenceSession(head.SerializeToString()).run(None, {features.graph.output[0].name: found})
    assert relative_error(logits, np.asarray(model(pictures))) < 1e-5


def _with_config(path: Path, **changes: Any) -> Path:
    """Write a .keras file whose first layer with one of these entries claims another value."""
    keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3), keras.layers.Flatten(), keras.layers.Dense(3)]
    ).save(path.with_name("sound.keras"))
    with zipfile.ZipFile(path.with_name("sound.keras")) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name == "config.json":
                config = json.loads(content)
                for layer in config["config"]["layers"]:
                    layer["config"].update({key: changes[key] for key in changes if key in layer["config"]})
                content = json.dumps(config).encode()
            bad.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"filters": 2**26}, "a layer has filters=67108864, but the file holds"),
        ({"units": 2**29}, "a layer has units=536870912, but the file holds"),
        ({"batch_shape": [None, 2**30, 2**30, 3]}, "is larger than any image: it is damaged"),
    ],
)
def test_sizes_that_a_file_cannot_hold_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Keras would ask for the memory first: twenty kilobytes may claim any size."""
    with pytest.raises(ModelError, match=said):
        fastcam.export(_with_config(tmp_path / "huge.keras", **changes), tmp_path / "out.onnx")


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("model.weights.h5", "w", force_zip64=True) as member,
    ):
        for _ in range(512):
            member.write(bytes(2**20))
    assert (tmp_path / "bomb.keras").stat().st_size < 2**22
    with pytest.raises(ModelError, match=r"its members unpack to 536870912 bytes in a file of .* malicious"):
        fastcam.export(tmp_path / "bomb.keras", tmp_path / "out.onnx")


def test_arrays_that_claim_gigabytes_are_refused(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("weights", (2**30,), np.float32, chunks=(2**16,), compression="gzip")
    with pytest.raises(ModelError, match="its arrays claim 4294967296 bytes in a file of"):
        fastcam.export(tmp_path / "bomb.h5", tmp_path / "out.onnx")
