"""The kernels of a CUDA device: arrays in its memory, owned by the caller, and a stream to work on.

Nothing here waits for the device or allocates: a call enqueues its work on the stream and returns. Two backends do the
same work from one source, `csrc/cam_kernels.cuh`: `cuda`, the native module that nvcc compiled, and `nvrtc`, which
compiles it through CuPy if that module is missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..boundary import Normalize, Weighting

DeviceType: TypeAlias = Literal["float32", "float16", "bfloat16", "uint8", "int32", "int64"]


@dataclass(frozen=True)
class DeviceArray:
    """A dense array in device memory.

    Attributes
    ----------
    pointer : int
        Address of its first element, 16-byte aligned.
    shape : tuple of int
        Logical shape; C-contiguous unless a call says that the channels are last in memory.
    dtype : str
        Type of an element.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: DeviceType


@dataclass(frozen=True)
class DeviceOverlay:
    """Pictures to blend the colours of the heatmaps over.

    Attributes
    ----------
    images : DeviceArray
        (N,H,W,3) uint8.
    palette : DeviceArray
        (256,3) uint8.
    alpha : float
        Opacity of the colours, 0..1.
    out : DeviceArray
        (N,K,H,W,3) uint8, to write to.
    """

    images: DeviceArray
    palette: DeviceArray
    alpha: float
    out: DeviceArray


@dataclass(frozen=True)
class DeviceRender:
    """One batch from activations and weights to maps, heatmaps and overlays, as `boundary.Kernels.render`.

    Attributes
    ----------
    activations : DeviceArray
        (N,C,h,w) float32, float16 or bfloat16.
    channels_last : bool
        Whether the channels of `activations` (and of weights that have the shape of gradients) are last in memory.
    weights : DeviceArray
        (N,K,C) for weighting "channel"; (N,K,C,h,w) for "pooled" and "element"; float32, float16 or bfloat16.
    weighting, normalize : str
        As in `boundary.Kernels.render`.
    maps : DeviceArray
        (N,K,h,w) float32, to write to.
    heatmaps : DeviceArray or None
        (N,K,H,W) float32, to write to; None if only the maps are wanted.
    overlay : DeviceOverlay or None
    finite : DeviceArray
        (N,K) int32, to write to: 1 for a map that is finite, 0 for one that is not, which is written as zeros. The
        caller reads it with the results, so that no check waits for the device.
    evidence : DeviceArray
        (N,K) float32, to write to: as in `boundary.Rendered`; 0 for a map that is not finite.
    workspace : DeviceArray
        (bytes,) uint8, of at least `DeviceKernels.workspace_bytes`; its content does not matter before or after.
    """

    activations: DeviceArray
    channels_last: bool
    weights: DeviceArray
    weighting: Weighting
    normalize: Normalize
    maps: DeviceArray
    heatmaps: DeviceArray | None
    overlay: DeviceOverlay | None
    finite: DeviceArray
    evidence: DeviceArray
    workspace: DeviceArray


@dataclass(frozen=True)
class DevicePrepare:
    """Pictures of the network's size to its input: channel order, mean and scale of `pictures.preparing.prepare`.

    Attributes
    ----------
    images : DeviceArray
        (N,H,W,3) uint8 RGB, or (N,H,W,1) for a network with one channel.
    input : DeviceArray
        (N,H,W,C) or (N,C,H,W) float32, to write to: ``(images[..., order] - mean) * scale``, as
        `pictures.preparing.prepare` computes it.
    channels_last : bool
        Which of the two shapes `input` has: True for (N,H,W,C).
    reversed_order : bool
        Whether the network takes BGR.
    mean, scale : tuple of float
        In the order of the network's channels.
    """

    images: DeviceArray
    input: DeviceArray
    channels_last: bool
    reversed_order: bool
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]


class DeviceKernels(ABC):
    """The kernels on a CUDA device. Streams are addresses of a cudaStream_t, as ONNX Runtime takes them."""

    @abstractmethod
    def workspace_bytes(
        self, activations: tuple[int, int, int, int], maps: int, weighting: Weighting, *, channels_last: bool
    ) -> int:
        """Bytes that `render` needs in addition to its outputs, for activations (N,C,h,w) and K = ``maps``."""

    @abstractmethod
    def render(self, call: DeviceRender, stream: int) -> None:
        """Enqueue one batch: two launches at most, no wait.

        Raises
        ------
        KernelError
            Shapes or types do not fit each other, the workspace is too small, or a launch failed.
        """

    @abstractmethod
    def prepare(self, call: DevicePrepare, stream: int) -> None:
        """Enqueue the preprocessing of one batch: one launch, no wait.

        Raises
        ------
        KernelError
            As `render`.
        """

    @abstractmethod
    def check_rows(self, rows: DeviceArray, finite: DeviceArray, stream: int) -> None:
        """Enqueue a check of float32 (N, ...): ``finite``, (N,) int32, becomes 1 for each row without NaN or infinity.

        Raises
        ------
        KernelError
            As `render`.
        """
