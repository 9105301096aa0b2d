"""The recipe in BentoML: `python -m bentoml serve bench.recipes.bento_app:Heatmaps --port PORT`."""

import os
from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from bench.recipes.explaining import explainer


@bentoml.service(workers=int(os.environ.get("FASTCAM_WORKERS", "2")))
class Heatmaps:
    """A photo in the form's field "request", a JPEG back."""

    def __init__(self) -> None:
        self.explain = explainer()

    @bentoml.api(route="/predict")
    def predict(
        self, request: Annotated[Path, ContentType("image/jpeg")], context: bentoml.Context
    ) -> Annotated[Path, ContentType("image/jpeg")]:
        """Explain a photo."""
        overlay = Path(context.temp_dir) / "overlay.jpg"
        overlay.write_bytes(self.explain(request.read_bytes()))
        return overlay
