"""Explain a photo with an exported file and OpenCV 5: no ONNX Runtime, no fastcam.

OpenCV's networks take float inputs, so this program prepares the photo itself. It is for a file exported with
draw="heatmaps", target="required" and without picture; preprocessing "imagenet", NCHW.

python explain.py MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]
"""

import sys

import cv2
import numpy as np

INPUT, SIZE = "image", (224, 224)
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
SCALE = 1 / (np.array([0.229, 0.224, 0.225], np.float32) * 255)


def main(model: str, photo: str, target: str, overlay: str, heatmap: str | None = None) -> None:
    """Write the overlay of one class (-1: the top one) and, if requested, its heatmap as raw float32."""
    picture = cv2.imread(photo)
    if picture is None:
        sys.exit(f"{photo}: cannot be read")
    small = cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_AREA)
    image = ((small[..., ::-1] - MEAN) * SCALE).transpose(2, 0, 1)[None]
    network = cv2.dnn.readNetFromONNX(model)
    network.setInput(np.ascontiguousarray(image, np.float32), INPUT)
    network.setInput(np.array([[int(target)]]), "target")
    # It returns either one output or all of them.
    names = network.getUnconnectedOutLayersNames()
    outputs = dict(zip(names, network.forward(names), strict=True))
    explained = int(outputs["targets"][0, 0])
    if explained < 0:
        sys.exit(f"{model} has no class {target}")
    print(f"class {explained}, score {outputs['logits'][0, explained]:.4f}")
    heat = outputs["heatmaps"][0, 0]
    colors = cv2.applyColorMap(np.rint(255 * heat).astype(np.uint8), cv2.COLORMAP_JET)
    cv2.imwrite(overlay, cv2.addWeighted(small, 0.5, colors, 0.5, 0))
    if heatmap is not None:
        heat.tofile(heatmap)


if __name__ == "__main__":
    main(*sys.argv[1:])
