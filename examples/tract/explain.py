"""Explain a photo with an exported file and tract, Sonos' Rust runtime, through its Python package: no ONNX Runtime.

python explain.py MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]
"""

import sys

import numpy as np
import tract
from PIL import Image, ImageOps


def main(model: str, photo: str, target: str, overlay: str, heatmap: str | None = None) -> None:
    """Write the overlay of one class (-1: the top one) and, if requested, its heatmap as raw float32."""
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))[None]
    inputs = {"pictures": pixels, "target": np.array([[int(target)]])}
    network = tract.onnx().load(model)
    names = [network.input_name(position) for position in range(network.input_count())]
    for position, name in enumerate(names):
        kind = "u8" if name == "pictures" else "i64"
        network.set_input_fact(position, ",".join([*map(str, inputs[name].shape), kind]))
    network.analyse()
    outputs = network.into_model().into_runnable().run([inputs[name] for name in names])
    # Outputs are in the file's order: logits, targets, maps, heatmaps, overlays.
    logits, targets, _, heatmaps, overlays = (tensor.to_numpy() for tensor in outputs)
    if targets[0, 0] < 0:
        sys.exit(f"{model} has no class {target}")
    print(f"class {targets[0, 0]}, score {logits[0, targets[0, 0]]:.4f}")
    Image.fromarray(overlays[0, 0]).save(overlay)
    if heatmap is not None:
        heatmaps[0, 0].tofile(heatmap)


if __name__ == "__main__":
    main(*sys.argv[1:])
