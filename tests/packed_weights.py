"""The layout of packed 4-bit weights, read word by word."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def weight_of(packed: Array) -> Array:
    """The weight float64 [K, N], word by word as the layout is described."""
    chunks, rows, n = packed.shape
    words = packed.astype(np.int64) & 0xFFFFFFFF
    size = 128 // (rows - 16)
    weight = np.zeros((chunks * 128, n))
    for chunk, row in np.ndindex(chunks, 128):
        q = words[chunk, row % 16] >> 4 * (row // 16) & 15
        meta = words[chunk, 16 + row // size]
        scale = (meta & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
        weight[chunk * 128 + row] = (q - (meta >> 16)) * scale
    return weight
