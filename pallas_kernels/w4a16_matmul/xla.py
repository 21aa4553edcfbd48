"""The op in plain XLA: a slab of the weight at a time is dequantised to the dtype of ``x``, then multiplied.

XLA does not fuse group-wise dequantisation into a product: it writes the weights to memory. Slabs bound how much.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.dequant import CHUNK
from pallas_kernels.w4a16_matmul.reference import weight
from pallas_kernels.w4a16_matmul.tiles import Tiles

SLAB = 2**24
"""Most weights that are dequantised at a time."""


def check(target: Target) -> None:
    """Runs everywhere."""


def run(x: jax.Array, packed: jax.Array, bias: jax.Array | None, *, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; there are no ``tiles`` to choose."""
    chunks, _, n = packed.shape
    per_slab = max(d for d in range(1, chunks + 1) if chunks % d == 0 and d * CHUNK * n <= max(SLAB, CHUNK * n))

    def add(slab: jax.Array, acc: jax.Array) -> jax.Array:
        first = slab * per_slab
        weights = weight(lax.dynamic_slice_in_dim(packed, first, per_slab)).astype(x.dtype)
        rows = lax.dynamic_slice_in_dim(x, first * CHUNK, per_slab * CHUNK, axis=1)
        product = jnp.dot(rows, weights, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
        total: jax.Array = acc + product
        return total

    out: jax.Array = lax.fori_loop(0, chunks // per_slab, add, jnp.zeros((x.shape[0], n), jnp.float32))
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)
