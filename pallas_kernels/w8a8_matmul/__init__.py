"""Matrix product of int8 weights and activations, which are quantised per token on the way in.

As in SmoothQuant, arXiv:2211.10438. The weight lies as [N, K], output rows first, as checkpoints store it: integer
tensor cores take four values along K in a register, so that a tile goes from memory to them untouched. From [K, N] it
would be moved byte by byte: 2.9 instead of 0.9 instructions per weight at M = 1, and 3.1 instead of 1.3 at M = 4096
(sm_90).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.w8a8_matmul.tiles import Tiles

BACKENDS = {
    "pallas_triton": "pallas_kernels.w8a8_matmul.pallas_triton",
    "xla": "pallas_kernels.w8a8_matmul.xla",
    "reference": "pallas_kernels.w8a8_matmul.reference",
}
"""In order of preference; each module refuses what it cannot do."""

LARGEST_K = (2**31 - 1) // 127**2
"""K beyond which an int32 sum of products could overflow."""


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
    _validate(x, weight, scales, bias)
    out: jax.Array = dispatch("w8a8_matmul", BACKENDS, backend, x, weight, scales, bias, tiles=tiles)
    return out


def _validate(x: jax.Array, weight: jax.Array, scales: jax.Array, bias: jax.Array | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {x.shape} does not fit weight {weight.shape}; expected [M, K] and [N, K]")
    if not jnp.issubdtype(x.dtype, jnp.floating) or weight.dtype != jnp.int8 or scales.dtype != jnp.float32:
        raise ValueError(
            f"x {x.dtype}, weight {weight.dtype}, scales {scales.dtype} must be a float, int8 and float32; cast them"
        )
    for name, array in (("scales", scales), ("bias", bias)):
        if array is not None and array.shape != weight.shape[:1]:
            raise ValueError(f"{name} {array.shape} does not fit weight {weight.shape}; expected [N] and [N, K]")
    if x.shape[1] > LARGEST_K:
        raise ValueError(f"K={x.shape[1]} could overflow the int32 sums; at most {LARGEST_K}")
