from enum import Enum

from .boundary import Bytes, Floats, FloatsIn

class Weighting(Enum):
    channel = ...
    pooled = ...
    element = ...

class Normalization(Enum):
    none = ...
    max = ...
    minmax = ...

def render(
    activations: FloatsIn,
    weights: FloatsIn,
    weighting: Weighting,
    normalization: Normalization,
    channels_last: bool,
    maps: Floats,
    heatmaps: Floats,
    images: Bytes | None,
    palette: Bytes | None,
    alpha: float,
    overlays: Bytes | None,
    threads: int,
) -> int | None: ...
def view(
    maps: Floats,
    height: int,
    width: int,
    heatmaps: Floats | None,
    images: Bytes | None,
    palette: Bytes | None,
    alpha: float,
    overlays: Bytes | None,
    threads: int,
) -> int | None: ...
def first_not_finite(array: Floats) -> int | None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def processor_count() -> int: ...
