"""Three networks that tell nine kinds of cut-out photos apart: for pictures whose objects' places are known.

A VGG16 whose head is trained on its features, an EfficientNet-Lite0 with another head, and a transformer of two blocks
on the 14x14 tokens of an EfficientNet-Lite0's middle. The convolutions keep their published weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper
from PIL import Image

import fastcam
from bench.composites import find_stamps, write_folders
from bench.networks import lite0
from fastcam.demo.run import PREPROCESSING

Floats = NDArray[np.float32]

_INPUT, _FEATURES, _MIDDLE = "images", "_flatten", "_blocks.10.add"
_CHANNELS, _WIDTH, _HEADS = 112, 96, 4
_EPOCHS, _BATCH = 30, 32


@dataclass(frozen=True)
class Photos:
    """Pictures in a folder for each class, with masks."""

    paths: Sequence[Path]
    classes: Sequence[str]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) the class of each picture."""
        return np.array([self.classes.index(path.parent.name) for path in self.paths])

    @property
    def masks(self) -> list[Path]:
        """A picture for each, bright where its object is."""
        return [Path(str(path).replace("/photos/", "/masks/")) for path in self.paths]


def write_photos(folder: Path, stamps: Path, train: int, held_out: int) -> tuple[Photos, Photos]:
    """Write so many pictures per class to learn from, and others of other cut-outs; return both."""
    found = find_stamps(stamps)
    write_folders(folder, found, train, held_out)
    classes = sorted(found)
    return (
        Photos(sorted((folder / "photos" / "train").rglob("*.png")), classes),
        Photos(sorted((folder / "photos" / "val").rglob("*.png")), classes),
    )


def vgg16(folder: Path, weights: str) -> Path:
    """Fine-tune a VGG16 on the folder's pictures, as a user would; return the Keras file."""
    trained = fastcam.finetune(
        folder / "photos", folder / "vgg16.keras", weights=weights, augmentations=1, unfreeze=0, resume=True
    )
    return Path(trained.path)


def efficientnet(photos: Photos) -> onnx.ModelProto:
    """Return an EfficientNet-Lite0 whose last layer is a logistic regression on its features."""
    from sklearn.linear_model import LogisticRegression

    model = lite0()
    learned = LogisticRegression(C=0.05, max_iter=500).fit(_values(model, _FEATURES, photos), photos.labels)
    graph = model.graph
    for name, numbers in (("_fc.weight", learned.coef_), ("_fc.bias", learned.intercept_)):
        (old,) = (item for item in graph.initializer if item.name == name)
        old.CopyFrom(numpy_helper.from_array(np.asarray(numbers, np.float32), name))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(photos.classes)
    return model


def transformer(photos: Photos, folder: Path) -> onnx.ModelProto:
    """Return the first half of an EfficientNet-Lite0, followed by a transformer that is trained on its maps."""
    trunk = _cut(lite0(), _MIDDLE)
    head = _trained(_values(trunk, _MIDDLE, photos), photos)
    path = folder / "head.onnx"
    _export(head, path)
    opened = onnx.load(path)
    trunk.ir_version = opened.ir_version
    trunk = onnx.version_converter.convert_version(trunk, opened.opset_import[0].version)
    opened = compose.add_prefix(opened, "head/")
    source = opened.graph.input[0].name
    return compose.merge_models(trunk, opened, io_map=[(trunk.graph.output[0].name, source)])


def _cut(model: onnx.ModelProto, value: str) -> onnx.ModelProto:
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
    cut: onnx.ModelProto = extractor.extract_model([_INPUT], [value])
    return cut


def _values(model: onnx.ModelProto, name: str, photos: Photos) -> Floats:
    """Return a value of the network for every picture."""
    import onnxruntime

    copy = onnx.ModelProto.FromString(model.SerializeToString())
    if name not in [item.name for item in copy.graph.output]:
        copy.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(copy.SerializeToString())
    return np.concatenate([session.run([name], {_INPUT: _prepared(path)})[0] for path in photos.paths])


def _prepared(path: Path) -> Floats:
    pixels = np.asarray(Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR), np.float32)
    return np.asarray((pixels.transpose(2, 0, 1)[None] - 127) / 128, np.float32)


def _trained(maps: Floats, photos: Photos) -> Any:
    """Train the transformer, with maps that are mirrored at random."""
    import torch

    torch.manual_seed(0)
    head = _transformer(len(photos.classes))
    inputs, labels = torch.tensor(maps), torch.tensor(photos.labels)
    steps = _EPOCHS * -(-len(labels) // _BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(_EPOCHS):
        for rows in torch.utils.data.BatchSampler(torch.randperm(len(labels)), _BATCH, drop_last=False):
            batch = inputs[rows]
            batch = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, batch, batch.flip(3))
            loss = torch.nn.functional.cross_entropy(head(batch), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return head.eval()


def _transformer(classes: int) -> Any:
    """Build two pre-norm blocks on the pixels of a map, whose mean is classified."""
    import torch
    from einops.layers.torch import Rearrange, Reduce
    from torch import nn

    # Its fused op cannot be exported.
    torch.backends.mha.set_fastpath_enabled(False)
    options: Any = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": True}
    block = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 2 * _WIDTH, **options)
    return nn.Sequential(
        nn.BatchNorm2d(_CHANNELS),
        nn.Conv2d(_CHANNELS, _WIDTH, 1),
        Rearrange("n c h w -> n (h w) c"),
        nn.TransformerEncoder(block, 2, nn.LayerNorm(_WIDTH), enable_nested_tensor=False),
        Reduce("n t c -> n c", "mean"),
        nn.Linear(_WIDTH, classes),
    )


def _export(head: Any, path: Path) -> None:
    import torch

    example = torch.zeros(2, _CHANNELS, 14, 14)
    torch.onnx.export(
        head, (example,), path, dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=18, verbose=False,
        external_data=False,
    )  # fmt: skip


def explained(name: str, photos: Photos, folder: Path, weights: str) -> Path:
    """Train a network if there is no file of it yet, and export it with all that its methods need."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        evidence = ["guided_gradients", "bias_maps", "curvatures"]
        model, options = _BUILDERS[name](photos, folder, weights)
        if name == "transformer":
            evidence += ["rollout_maps", "legrad_maps"]
        fastcam.export(model, path, gradients="image", evidence=evidence, **options)
    return path


_Built = tuple[Any, dict[str, Any]]


def _options(photos: Photos) -> dict[str, Any]:
    return {"classes": photos.classes, "preprocess": PREPROCESSING, "score_activation": "softmax"}


_BUILDERS: dict[str, Callable[[Photos, Path, str], _Built]] = {
    "vgg16": lambda photos, folder, weights: (vgg16(folder, weights), {}),
    "efficientnet": lambda photos, folder, weights: (efficientnet(photos), _options(photos)),
    "transformer": lambda photos, folder, weights: (transformer(photos, folder), _options(photos)),
}
