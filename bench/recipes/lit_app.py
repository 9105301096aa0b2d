"""The recipe in LitServe: `python -m bench.recipes.lit_app PORT WORKERS`."""

import sys
from typing import Any

import litserve
from fastapi import Response, UploadFile

from bench.recipes.explaining import explainer


class Heatmaps(litserve.LitAPI):
    """A photo in the form's field "request", a JPEG back."""

    def setup(self, device: str) -> None:
        """Open the model, once in each worker."""
        self.explain = explainer()

    def decode_request(self, request: UploadFile) -> bytes:
        """Return the photo."""
        return request.file.read()

    def predict(self, photo: bytes) -> bytes:
        """Return the overlay."""
        return self.explain(photo)

    def encode_response(self, overlay: bytes) -> Any:
        """Return the answer."""
        return Response(content=overlay, media_type="image/jpeg")


if __name__ == "__main__":
    port, workers = map(int, sys.argv[1:])
    server = litserve.LitServer(Heatmaps(), accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")
