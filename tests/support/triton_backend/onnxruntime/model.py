"""Stands for Triton's ONNX Runtime backend, in its Python backend: joins requests, and runs the repository's file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# The server's interpreter is its own: it knows no virtual environment, and imports what follows from here.
sys.path[:0] = os.environ["FASTCAM_TRITON_PACKAGES"].split(os.pathsep)


class TritonPythonModel:
    """What the Python backend loads."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, arguments: dict[str, str]) -> None:
        import onnxruntime

        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        import numpy as np
        import triton_python_backend_utils as triton

        given = [
            {name: triton.get_input_tensor_by_name(one, name).as_numpy() for name in self._inputs} for one in requests
        ]
        feeds = {name: np.concatenate([one[name] for one in given]) for name in self._inputs}
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        # In the server's log.
        print(f"a batch of {len(feeds[self._inputs[0]])}", flush=True)
        answers, start = [], 0
        for request, one in zip(requests, given, strict=True):
            rows = slice(start, start + len(one[self._inputs[0]]))
            start = rows.stop
            names = request.requested_output_names()
            tensors = [triton.Tensor(name, np.ascontiguousarray(found[name][rows])) for name in names]
            answers.append(triton.InferenceResponse(output_tensors=tensors))
        return answers
