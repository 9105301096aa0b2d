"""Explain a photo by a Triton server: `python client.py localhost:8000 dogs photo.jpg overlay.png`.

fastcam export dogs.keras dogs.onnx --draw overlays --picture any --target required
fastcam triton dogs.onnx -o repository
tritonserver --model-repository=repository
pip install "tritonclient[http]" pillow
"""

import sys

import numpy as np
import tritonclient.http as triton
from PIL import Image

address, model, photo, overlay = sys.argv[1:5]
client = triton.InferenceServerClient(address)

picture = np.asarray(Image.open(photo).convert("RGB"))[None]
pictures = triton.InferInput(client.get_model_metadata(model)["inputs"][0]["name"], list(picture.shape), "UINT8")
pictures.set_data_from_numpy(picture)
target = triton.InferInput("target", [1, 1], "INT64")
target.set_data_from_numpy(np.array([[-1]]))  # the top class; or the index of another one

# The names of the three top classes come from the repository's labels.
top = triton.InferRequestedOutput("logits", class_count=3)
drawn = triton.InferRequestedOutput("overlays")
answer = client.infer(model, [pictures, target], outputs=[top, drawn])

for row in answer.as_numpy("logits").ravel():
    score, index, name = row.decode().split(":", 2)
    print(f"{float(score):8.2f}  {name} (class {index})")
Image.fromarray(answer.as_numpy("overlays")[0, 0]).save(overlay)
