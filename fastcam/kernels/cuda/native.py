"""The CUDA backend: the module `_cuda`, whose kernels nvcc compiled when fastcam was installed."""

from __future__ import annotations

from . import _cuda
from .launches import Launch, LaunchedKernels


class CudaKernels(LaunchedKernels):
    """Passes launches to the CUDA runtime, on the current device."""

    def _launch(self, launch: Launch, stream: int) -> None:
        _cuda.launch(launch.kernel, launch.blocks, launch.threads, launch.shared_bytes, launch.arguments, stream)
