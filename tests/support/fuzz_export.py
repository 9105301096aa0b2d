"""Mutated models given to the ONNX importer: see `fuzzing`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import opset_networks
from fuzzing import Attempt, fuzz
from mutations import STRUCTURAL, flip_bytes, residual
from networks import small_classifier
from onnx import external_data_helper, helper
from small_networks import SOUND_NETWORKS

import fastcam


def _add_function(model: onnx.ModelProto, pick: random.Random) -> None:
    node = pick.choice(list(model.graph.node))
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    opset = [helper.make_opsetid("", pick.choice([7, 13, 18, 21])), helper.make_opsetid("local", 1)]
    model.functions.append(helper.make_function("local", node.op_type, node.input, node.output, [inner], opset))
    model.opset_import.append(helper.make_opsetid("local", 1))
    node.domain = "local"
    del node.attribute[:]


def _add_external_data(model: onnx.ModelProto, pick: random.Random) -> None:
    tensor = pick.choice(list(model.graph.initializer))
    location = pick.choice(["", "../x", "/dev/zero", "model.onnx", "in.onnx", "\0", "a" * 5000])
    external_data_helper.set_external_data(tensor, location, offset=pick.choice([None, 0, 7, 2**40]))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")


def _retype_attribute(model: onnx.ModelProto, pick: random.Random) -> None:
    node = pick.choice(list(model.graph.node))
    name = pick.choice([item.name for item in node.attribute] or ["axis"])
    values = [1.5, "text", [1.0, 2.0], [], ["a"], 2**62, helper.make_tensor("t", 1, [2], [1.0, 2.0])]
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, pick.choice(values[:3] + values[4:]))])


def _change_version(model: onnx.ModelProto, pick: random.Random) -> None:
    model.opset_import[0].version = pick.choice([0, -1, 1, 6, 7, 8, 9, 10, 11, 12, 13, 17, 21, 23, 25, 26, 2**40])
    model.ir_version = pick.choice([0, 1, 3, 7, 10, 13, 99])


def _change_domain(model: onnx.ModelProto, pick: random.Random) -> None:
    pick.choice(list(model.graph.node)).domain = pick.choice(["ai.onnx", "ai.onnx.ml", "com.microsoft", "?", "a" * 999])


def _change_input_type(model: onnx.ModelProto, pick: random.Random) -> None:
    info = model.graph.input[0]
    kinds = [
        lambda: info.type.sequence_type.elem_type.tensor_type.__setattr__("elem_type", 1),
        lambda: info.type.optional_type.elem_type.tensor_type.__setattr__("elem_type", 1),
        lambda: info.type.tensor_type.__setattr__("elem_type", pick.choice([0, 2, 7, 8, 10, 16, 99])),
        lambda: info.type.tensor_type.ClearField("shape"),
    ]
    pick.choice(kinds)()


def _repeat_node(model: onnx.ModelProto, pick: random.Random) -> None:
    model.graph.node.insert(pick.randrange(len(model.graph.node)), pick.choice(list(model.graph.node)))


def _add_subgraph(model: onnx.ModelProto, pick: random.Random) -> None:
    node = pick.choice(list(model.graph.node))
    node.attribute.append(helper.make_attribute("body", model.graph if pick.random() < 0.5 else onnx.GraphProto()))


def _add_sparse_weights(model: onnx.ModelProto, pick: random.Random) -> None:
    values = helper.make_tensor("sparse", 1, [1], [1.0])
    indices = helper.make_tensor("indices", 7, [1], [pick.choice([0, 5, -1, 2**40])])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [pick.choice([3, 2**40])]))


def _add_made_constant(model: onnx.ModelProto, pick: random.Random) -> None:
    """Insert an op that can create anything of any size before a node."""
    node = pick.choice(list(model.graph.node))
    sizes = [pick.choice([0, 1, 3, 2**20, 2**40, -1]) for _ in range(pick.randrange(1, 4))]
    model.graph.initializer.append(helper.make_tensor("made/sizes", 7, [len(sizes)], sizes))
    op = pick.choice(["ConstantOfShape", "Expand", "Tile", "Range", "Shape", "Size", "NonZero", "OneHot", "EyeLike"])
    inputs = {"Range": ["made/sizes"] * 3, "OneHot": ["made/sizes"] * 3}.get(op, ["made/sizes"])
    inputs = ["made/sizes", "made/sizes"] if op in ("Expand", "Tile") else inputs
    model.graph.node.insert(0, helper.make_node(op, inputs, ["made"]))
    node.input[pick.randrange(len(node.input))] = "made"


def _spoil_weights(model: onnx.ModelProto, pick: random.Random) -> None:
    tensor = pick.choice(list(model.graph.initializer))
    if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
        array = np.frombuffer(tensor.raw_data, np.float32).copy()
        array[pick.randrange(len(array))] = pick.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45])
        tensor.raw_data = array.tobytes()


_MUTATIONS: list[Callable[[onnx.ModelProto, random.Random], None]] = [
    *STRUCTURAL,
    _add_function,
    _add_external_data,
    _retype_attribute,
    _change_version,
    _change_domain,
    _change_input_type,
    _repeat_node,
    _add_subgraph,
    _add_sparse_weights,
    _add_made_constant,
    _spoil_weights,
]


def sources() -> list[onnx.ModelProto]:
    """Return the models that are mutated."""
    opsets = [opset_networks.classifier(opset) for opset in (7, 9, 13, 18, 21, 23)]
    sound = [build(batch) for build in SOUND_NETWORKS.values() for batch in (1, 2)]
    return [small_classifier().to_model(), residual(), *opsets, *sound]


def mutated(data: bytes, pick: random.Random) -> bytes | None:
    """Return a model with one to three mutations; or None if one removed what the next one changes."""
    model = onnx.load_from_string(data)
    try:
        for _ in range(pick.choice([1, 1, 1, 2, 3])):
            pick.choice(_MUTATIONS)(model, pick)
        return bytes(model.SerializeToString())
    except (IndexError, ValueError, TypeError, AttributeError):
        return None


def prepare(folder: Path) -> Attempt:
    """Return what exports a mutation."""
    models = [model.SerializeToString() for model in sources()]
    destination = folder / "out" / "out.onnx"

    def attempt(seed: int, pick: random.Random) -> bool:
        data = mutated(pick.choice(models), pick)
        if data is None:
            return False
        (folder / "in.onnx").write_bytes(flip_bytes(data, pick) if seed % 4 == 0 else data)
        options: dict[str, Any] = {}
        if seed % 5 == 0:
            options = {"gradients": pick.choice(["pooled", "full"]), "input_size": (12, 12)}
        try:
            fastcam.export(folder / "in.onnx", destination, **options)
            destination.unlink()
        finally:
            left = [file.name for file in destination.parent.iterdir()]
            if left:
                raise AssertionError(f"seed {seed} left {left}")
        return True

    return attempt


if __name__ == "__main__":
    fuzz(prepare)
