"""The op in plain XLA: some columns of the weight at a time are dequantised to the dtype of ``x``, then multiplied.

XLA does not fuse group-wise dequantisation into a product of many rows: it writes the weights to memory. Going by
columns bounds how much of it that takes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall
from pallas_kernels.w4a16_matmul.reference import weight

MAX_WEIGHTS = 2**24
"""That are dequantised at a time, where a divisor of N allows it."""


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: W4A16MatmulCall) -> None:
    """Accepts every call."""


def run(call: W4A16MatmulCall, tiles: Any = None) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; ignores ``tiles``."""
    x, packed, bias = call.x, call.packed, call.bias
    (m, k), n = x.shape, packed.shape[2]
    width = max(size for size in range(1, n + 1) if n % size == 0 and (size == 1 or size * k <= MAX_WEIGHTS))
    wide_bias = jnp.zeros(n, jnp.float32) if bias is None else bias.astype(jnp.float32)

    def add(index: jax.Array, out: jax.Array) -> jax.Array:
        first = index * width
        weights = weight(lax.dynamic_slice_in_dim(packed, first, width, axis=2)).astype(x.dtype)
        product = jnp.dot(x, weights, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
        columns = product + lax.dynamic_slice_in_dim(wide_bias, first, width)
        return lax.dynamic_update_slice_in_dim(out, columns.astype(x.dtype), first, axis=1)

    filled: jax.Array = lax.fori_loop(0, n // width, add, jnp.zeros((m, n), x.dtype))
    return filled
