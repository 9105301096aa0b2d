"""Every example runs, draws the same as Explainer for a class other than the top one, and passes the self-test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from networks import Array, NetworkBuilder, relative_error
from PIL import Image

import fastcam
from fastcam.explaining.selftest import check_selftest_answer, write_selftest_picture
from fastcam.kernels.reference import blended
from fastcam.pictures.writing import palette

_EXAMPLES = Path(__file__).parents[2] / "examples"
# Within 1e-6 where every value is resized to the same level; runtimes may round a few sums close to a half
# differently, by one level of 255 each.
_BOUND = 1e-3


def _model(folder: Path, **options: Any) -> tuple[Path, fastcam.Explainer]:
    """Export a network of 10 classes and 48 x 64 pixels: for the example, and for Explainer."""
    net = NetworkBuilder(("batch", 3, 48, 64))
    value = net.add("Relu", net.conv(net.input, (8, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]))
    layer = net.add("Relu", net.conv(value, (16, 8, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]), name="layer")
    mean = net.add("Flatten", net.add("GlobalAveragePool", layer))
    model = net.build(net.add("Softmax", net.dense(mean, (16, 10)), axis=1)).to_model()
    fastcam.export(model, folder / "drawn.onnx", preprocess="imagenet", **options)
    fastcam.export(model, folder / "plain.onnx", preprocess="imagenet")
    return folder / "drawn.onnx", fastcam.Explainer(folder / "plain.onnx", device="cpu")


def _photo(folder: Path, height: int, width: int) -> Path:
    """Write a picture with a bright disc on a gradient."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 3) ** 2 + (x - width / 4) ** 2 < (height / 5) ** 2
    pixels = np.stack([x * 255 // width, y * 255 // height, np.where(disc, 250, 40)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder / "photo.png"


def _explain(
    command: list[str | Path], model: Path, photo: Path, target: int, folder: Path, **environment: str
) -> Array:
    """Run an example, and return its heatmap."""
    arguments = [*command, model, photo, str(target), folder / "overlay.png", folder / "heatmap.f32"]
    done = subprocess.run(
        list(map(str, arguments)),
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"class {target}," in done.stdout
    return np.fromfile(folder / "heatmap.f32", np.float32).reshape(1, 1, 48, 64)


def _check(command: list[str | Path], folder: Path, **environment: str) -> None:
    model, explainer = _model(folder, draw="overlays", picture="any", target="required")
    # Sizes without a common factor with the model's: values are rarely at a half, where runtimes round differently.
    photo = _photo(folder, 97, 131)
    top, *_, target = np.argsort(-explainer(photo).logits[0])
    expected = explainer(photo, target=int(target))
    assert not np.allclose(expected.heatmaps, explainer(photo, target=int(top)).heatmaps, atol=0.05)
    found = _explain(command, model, photo, int(target), folder, **environment)
    assert relative_error(found, expected.heatmaps) < _BOUND
    overlay = np.asarray(Image.open(folder / "overlay.png"), np.int16)
    small = np.asarray(Image.open(photo).resize((64, 48), Image.Resampling.BILINEAR))[None]
    # Not `overlay`, which writes a caption where there is little evidence.
    blend = blended(expected.heatmaps.astype(np.float64), small, palette("jet"), 0.5)[0, 0]
    # The heatmap's colours, within a level where colours are close to the border of two.
    assert np.mean(np.abs(overlay - blend) > 2) < 0.01

    wanted = write_selftest_picture(model, folder / "test.png")
    _explain(command, model, folder / "test.png", wanted, folder, **environment)
    error, tolerance = check_selftest_answer(model, folder / "heatmap.f32")
    assert error <= tolerance
    refused = subprocess.run(
        [*map(str, command), str(model), str(photo), "10", str(folder / "none.png")],
        capture_output=True, text=True, check=False, timeout=240, env=os.environ | environment,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "has no class 10" in refused.stderr
    assert not (folder / "none.png").exists()


def test_python(tmp_path: Path) -> None:
    _check([sys.executable, _EXAMPLES / "python" / "explain.py"], tmp_path)


def test_tract(tmp_path: Path) -> None:
    pytest.importorskip("tract", reason="needs tract: pip install tract")
    _check([sys.executable, _EXAMPLES / "tract" / "explain.py"], tmp_path)


def test_node(tmp_path: Path) -> None:
    if shutil.which("node") is None or not (_EXAMPLES / "node" / "node_modules").exists():
        pytest.skip("needs Node and: cd examples/node && ONNXRUNTIME_NODE_INSTALL=skip npm ci")
    _check(["node", _EXAMPLES / "node" / "explain.mjs"], tmp_path)


def _build(name: str, folder: Path, **definitions: str | Path) -> Path:
    if shutil.which("cmake") is None or not Path("/usr/include/stb/stb_image.h").exists():
        pytest.skip("needs cmake and stb: apt-get install cmake libstb-dev")
    settings = [f"-D{key}={value}" for key, value in definitions.items()]
    for command in (
        ["cmake", "-S", _EXAMPLES / name, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", *settings],
        ["cmake", "--build", folder / "build"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "explain"


def test_cpp_with_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino: pip install openvino")
    folder = Path(openvino.__file__).parent
    program = _build("cpp-openvino", tmp_path, OpenVINO_DIR=folder / "cmake")
    _check([program], tmp_path)


def test_cpp_with_onnx_runtime(tmp_path: Path) -> None:
    """Built with a package's headers, and run with the wheel's library."""
    given = os.environ.get("FASTCAM_TEST_ONNXRUNTIME_HEADERS", "/usr/include/onnxruntime")
    if not (Path(given) / "onnxruntime_cxx_api.h").exists():
        pytest.skip("needs ONNX Runtime's headers: apt-get install libonnxruntime-dev (Debian 13)")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    # The wheel's library lacks an soname for the linker to record in a program.
    link = tmp_path / "libonnxruntime.so.1"
    link.symlink_to(library)
    program = _build("cpp-onnxruntime", tmp_path, ONNXRUNTIME_INCLUDE_DIR=given, ONNXRUNTIME_LIBRARY=link)
    _check([program], tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert len((_EXAMPLES / "cpp-onnxruntime" / "explain.cpp").read_text(encoding="utf-8").splitlines()) <= 60


def test_opencv(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python-headless")
    if int(cv2.__version__.partition(".")[0]) < 5:
        pytest.skip("needs OpenCV 5, which fits such files: pip install opencv-python-headless>=5")
    model, explainer = _model(tmp_path, draw="heatmaps", target="required")
    # OpenCV resizes differently from Pillow: a photo of the model's size isolates the network.
    photo = _photo(tmp_path, 48, 64)
    source = (_EXAMPLES / "opencv" / "explain.py").read_text(encoding="utf-8")
    (tmp_path / "explain.py").write_text(source.replace("(224, 224)", "(48, 64)"), encoding="utf-8")
    target = int(np.argsort(-explainer(photo).logits[0])[-1])
    found = _explain([sys.executable, tmp_path / "explain.py"], model, photo, target, tmp_path)
    assert relative_error(found, explainer(photo, target=target).heatmaps) < _BOUND
