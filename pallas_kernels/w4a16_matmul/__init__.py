"""Product of 16-bit activations with 4-bit weights that have a scale and a zero point for each group of rows.

The weight comes packed for the kernels; ``packing`` makes it from plain integers, or from what AWQ and GPTQ store. M, K
and N are the letters of a matrix product here: rows of activations, inputs, outputs.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall

__all__ = ["BACKENDS", "W4A16MatmulCall", "w4a16_matmul"]

BACKENDS = {
    "pallas_mosaic_gpu": "pallas_kernels.w4a16_matmul.pallas_mosaic_gpu",
    "pallas_triton": "pallas_kernels.w4a16_matmul.pallas_triton",
    "xla": "pallas_kernels.w4a16_matmul.xla",
    "reference": "pallas_kernels.w4a16_matmul.reference",
}
"""In order of preference; each refuses what it cannot do."""


def w4a16_matmul(
    x: jax.Array,
    packed: jax.Array,
    bias: jax.Array | None = None,
    *,
    backend: str | None = None,
    tiles: Any = None,
) -> jax.Array:
    """``x · weight + bias``, summed in float32; the weight is ``(q - zero) · scale``.

    Args:
        x: [M, K] bfloat16 or float16 (float32 for ``xla`` and ``reference``).
        packed: int32 [K / 128, 16 + 128 / g, N], the weight; see ``layout``.
        bias: [N], dtype of ``x``.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: how a Pallas backend divides the call, ``Tiles`` for Triton; ``None`` takes the measured ones, else the
            heuristic's. A backend refuses those of another.

    Returns:
        [M, N], dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        NoBackendError: every backend refused.
    """
    out: jax.Array = dispatch(W4A16MatmulCall(x, packed, bias), backend=backend, tiles=tiles)
    return out
