"""Matrix product of int8 weights and activations, which are quantised per token on the way in.

As in SmoothQuant, arXiv:2211.10438. The weight lies as [N, K], output rows first, as checkpoints store it: integer
tensor cores take four values along K in a register, so that a tile goes from memory to them untouched. From [K, N] it
would be moved byte by byte: 2.9 instead of 0.9 instructions per weight at M = 1, and 3.1 instead of 1.3 at M = 4096
(sm_90).
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.w8a8_matmul.call import W8A8MatmulCall
from pallas_kernels.w8a8_matmul.tiles import Tiles

__all__ = ["BACKENDS", "W8A8MatmulCall", "w8a8_matmul"]

BACKENDS = {
    "pallas_triton": "pallas_kernels.w8a8_matmul.pallas_triton",
    "xla": "pallas_kernels.w8a8_matmul.xla",
    "reference": "pallas_kernels.w8a8_matmul.reference",
}
"""In order of preference; each module refuses what it cannot do."""


def w8a8_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None = None,
    *,
    backend: str | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """``x · weightᵀ · scales + bias``, with ``x`` rounded to int8 steps of its own for each token.

    A token's step is its largest magnitude / 127; products are summed exactly, in int32.

    Args:
        x: [M, K] float.
        weight: int8 [N, K], symmetric.
        scales: float32 [N], what a step of each output column's weights is worth.
        bias: [N] float, added in float32.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: for the Pallas backend; ``None`` takes the measured ones, else the heuristic's.

    Returns:
        [M, N], dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not fit together. NoBackendError: every backend refused.
    """
    call = W8A8MatmulCall(x, weight, scales, bias)
    out: jax.Array = dispatch(call, backend=backend, tiles=tiles)
    return out
