"""The op spelled out: unpack the weight to float32, multiply."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.target import Target


def check(target: Target) -> None:
    """Runs everywhere."""


def run(x: jax.Array, packed: jax.Array, bias: jax.Array | None, *, tiles: Any = None) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; there are no ``tiles`` to choose."""
    out = jnp.dot(x.astype(jnp.float32), weight(packed), precision=lax.Precision.HIGHEST)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def weight(packed: jax.Array) -> jax.Array:
    """The weight float32 [K, N] that ``packed`` int32 [C, 16 + 128/g, N] stands for (C is K / 128)."""
    chunks, _, n = packed.shape
    words, meta = packed[:, None, :16], packed[:, 16:]
    shifts = 4 * jnp.arange(8, dtype=jnp.int32)[:, None, None]
    q = lax.shift_right_logical(words, jnp.broadcast_to(shifts, (chunks, 8, 16, n))) & 15
    scale = lax.bitcast_convert_type(meta.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    zero = lax.shift_right_logical(meta, jnp.full_like(meta, 16))
    groups = q.reshape(-1, 128 // meta.shape[1], n)
    shifted = (groups - zero.reshape(-1, 1, n)).astype(jnp.float32)
    return (shifted * scale.reshape(-1, 1, n)).reshape(-1, n)
