"""Array types, named by their contents."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]
HalfOrFloats: TypeAlias = NDArray[np.float32] | NDArray[np.float16]
Doubles: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]
Pixels: TypeAlias = NDArray[np.uint8]
"""Pictures with their components last, and colour tables."""
Bytes: TypeAlias = NDArray[np.uint8]
"""Raw memory."""
