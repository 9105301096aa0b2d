"""The native backend: `_cpu`, C++ with a thread pool, using the best instruction set of the processor."""

from __future__ import annotations

from ..arrays import Floats, Pixels
from . import _cpu
from .boundary import Kernels, MapCall, Overlay

_WEIGHTINGS = {
    "channel": _cpu.Weighting.channel,
    "pooled": _cpu.Weighting.pooled,
    "element": _cpu.Weighting.element,
}
_NORMALIZATIONS = {
    None: _cpu.Normalization.none,
    "max": _cpu.Normalization.max,
    "minmax": _cpu.Normalization.minmax,
}


class CpuKernels(Kernels):
    """Passes validated arrays to the module `_cpu`."""

    def first_not_finite(self, array: Floats) -> int | None:
        """See `Kernels`."""
        return _cpu.first_not_finite(array)

    def describe(self) -> dict[str, str | int]:
        """Backend "native", the instruction set in use, and the processors of this process."""
        return {"backend": "native", "instruction_set": _cpu.instruction_set(), "threads": _cpu.processor_count()}

    def _default_threads(self) -> int:
        return _cpu.processor_count()

    def _render(self, call: MapCall, heatmaps: Floats, overlay: Overlay | None, threads: int) -> int | None:
        return _cpu.render(
            call.activations,
            call.weights,
            _WEIGHTINGS[call.weighting],
            _NORMALIZATIONS[call.normalize],
            call.channels_last,
            call.maps,
            call.evidence,
            heatmaps,
            *_overlay_arguments(overlay),
            threads,
        )

    def _view(
        self, maps: Floats, size: tuple[int, int], heatmaps: Floats | None, overlay: Overlay | None, threads: int
    ) -> int | None:
        height, width = size
        return _cpu.view(maps, height, width, heatmaps, *_overlay_arguments(overlay), threads)

    def _prepare(
        self, image: Pixels, levels: Floats, input_out: Floats, *, reversed_order: bool, channels_last: bool
    ) -> None:
        _cpu.prepare(image, levels, reversed_order, channels_last, input_out)


def _overlay_arguments(overlay: Overlay | None) -> tuple[Pixels | None, Pixels | None, float, Pixels | None]:
    if overlay is None:
        return None, None, 0.0, None
    return overlay.images, overlay.palette, overlay.alpha, overlay.out


KERNELS = CpuKernels()
