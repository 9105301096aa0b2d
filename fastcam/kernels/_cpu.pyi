from collections.abc import Iterable
from enum import Enum

from ..arrays import Floats, HalfOrFloats, Pixels

class Weighting(Enum):
    channel = ...
    pooled = ...
    element = ...

class Normalization(Enum):
    none = ...
    max = ...
    minmax = ...

def render(
    activations: HalfOrFloats,
    weights: HalfOrFloats,
    weighting: Weighting,
    normalization: Normalization,
    channels_last: bool,
    maps: Floats,
    evidence: Floats,
    heatmaps: Floats,
    images: Pixels | None,
    palette: Pixels | None,
    alpha: float,
    overlays: Pixels | None,
    threads: int,
) -> int | None: ...
def view(
    maps: Floats,
    height: int,
    width: int,
    heatmaps: Floats | None,
    images: Pixels | None,
    palette: Pixels | None,
    alpha: float,
    overlays: Pixels | None,
    threads: int,
) -> int | None: ...
def prepare(image: Pixels, levels: Floats, reversed_order: bool, channels_last: bool, target: Floats) -> None: ...
def first_not_finite(array: Floats) -> int | None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def processor_count() -> int: ...

class ConvolutionLayer:
    def __init__(
        self,
        *,
        channels: tuple[int, int],
        kernel: tuple[int, int],
        stride: int,
        pads: tuple[int, int, int, int],
        channels_first: bool,
        residual: bool,
        pool: bool,
        low: float,
        high: float,
    ) -> None: ...

class Algorithm(Enum):
    winograd_4x4 = ...
    winograd_6x6 = ...
    pointwise = ...
    gathered = ...

def convolution_supported() -> bool: ...
def choose_algorithm(layer: ConvolutionLayer, height: int, width: int) -> Algorithm | None: ...

class PublishedConvolution:
    def __init__(
        self, layer: ConvolutionLayer, algorithm: Algorithm, weights: Floats, bias: Floats | None, threads: int
    ) -> None: ...
    @property
    def number(self) -> int: ...

class PublishedDense:
    @staticmethod
    def publish(
        inputs: int, outputs: int, bias: Floats | None, low: float, high: float, blocks: Iterable[Floats]
    ) -> PublishedDense | None: ...
    @property
    def number(self) -> int: ...
