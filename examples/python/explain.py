"""Explain a photo with an exported file, ONNX Runtime, NumPy and Pillow: no fastcam.

python explain.py MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, photo: str, target: str, overlay: str, heatmap: str | None = None) -> None:
    """Write the overlay of one class (-1: the top one) and, if requested, its heatmap as raw float32."""
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))[None]
    session = onnxruntime.InferenceSession(model)
    inputs = {"pictures": pixels, "target": np.array([[int(target)]])}
    names = ["logits", "targets", "heatmaps", "overlays"]
    logits, targets, heatmaps, overlays = session.run(names, inputs)
    if targets[0, 0] < 0:
        sys.exit(f"{model} has no class {target}")
    print(f"class {targets[0, 0]}, score {logits[0, targets[0, 0]]:.4f}")
    Image.fromarray(overlays[0, 0]).save(overlay)
    if heatmap is not None:
        heatmaps[0, 0].tofile(heatmap)


if __name__ == "__main__":
    main(*sys.argv[1:])
