"""Rotary positions and the write into the KV cache, in one pass over a step's queries, keys and values."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.kv_cache_write.call import KVCacheWriteCall
from pallas_kernels.kv_cache_write.tiles import Tiles
from pallas_kernels.kv_pool import Pool

__all__ = ["BACKENDS", "KVCacheWriteCall", "kv_cache_write"]

BACKENDS = {
    "pallas_triton": "pallas_kernels.kv_cache_write.pallas_triton",
    "reference": "pallas_kernels.kv_cache_write.reference",
}
"""In order of preference; each module refuses what it cannot do."""


def kv_cache_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pool: Pool,
    slots: jax.Array,
    *,
    backend: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, Pool]:
    """Rotate queries and keys; put keys and values into their slots of ``pool``.

    Rotary embedding as in arXiv:2104.09864, computed in float32, with element i paired with i + H / 2. A quantised pool
    takes keys as they are after rounding to the dtype of ``qkv``.

    Args:
        qkv: see ``KVCacheWriteCall`` for this and the other operands.
        cos: cosines of the rotary angles.
        sin: sines of the rotary angles.
        pool: the KV pool.
        slots: the slot of each token.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: how the kernel divides the call; ``None`` takes the measured ones, else the heuristic's.

    Returns:
        The rotated queries [T, N, H], dtype of ``qkv``, and the pool.

    Raises:
        ValueError: shapes that do not fit together.
        NoBackendError: every backend refused.
    """
    call = KVCacheWriteCall(qkv, cos, sin, pool, slots)
    out: tuple[jax.Array, Pool] = dispatch(call, backend=backend, tiles=tiles)
    return out
