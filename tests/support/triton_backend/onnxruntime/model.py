"""Stands for Triton's ONNX Runtime backend, in its Python backend: joins requests, and runs the repository's file."""

from __future__ import annotations

import os
import sys

# The server's interpreter is its own: it knows no virtual environment.
sys.path[:0] = os.environ["FASTCAM_TRITON_PACKAGES"].split(os.pathsep)

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402 - the server provides it


class TritonPythonModel:
    """What the Python backend loads."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, arguments: dict[str, str]) -> None:
        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
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
            tensors = [
                triton.Tensor(name, np.ascontiguousarray(found[name][rows]))
                for name in request.requested_output_names()
            ]
            answers.append(triton.InferenceResponse(output_tensors=tensors))
        return answers
