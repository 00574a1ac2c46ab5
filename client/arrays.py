"""Names for array types; shapes stand where an array is used."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Pixels = NDArray[np.uint8]
"""RGB [h, w, 3] unless stated otherwise."""
BinaryMask = NDArray[np.bool_]
"""An image [h, w], True inside."""
KeepMask = NDArray[np.bool_]
"""Coalitions [M, N]: which of N tiles each of M variants of a slide keeps."""
Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
