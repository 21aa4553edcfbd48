"""Rotary positions and the write into the KV cache, in one pass over a step's queries, keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.kv_cache_write.tiles import Tiles
from pallas_kernels.kv_pool import Pool, fits, stored

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
        qkv: [T, K, N / K + 2, H] float: each KV head's query heads, its key, its value.
        cos: float32 [T, H / 2].
        sin: float32 [T, H / 2].
        pool: [P, 2, K, S, H] float, or a ``QuantizedPool``; updated in place where it is donated.
        slots: int32 [T], block · S + offset of each token, different for each; one beyond the pool writes nothing.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: how the kernel cuts the call up; ``None`` takes what is measured, or a heuristic.

    Returns:
        The rotated queries [T, N, H], dtype of ``qkv``, and the pool.

    Raises:
        ValueError: shapes that do not fit together.
        NoBackendError: every backend refused.
    """
    _validate(qkv, cos, sin, pool, slots)
    out: tuple[jax.Array, Pool] = dispatch("kv_cache_write", BACKENDS, backend, qkv, cos, sin, pool, slots, tiles=tiles)
    return out


def _validate(qkv: jax.Array, cos: jax.Array, sin: jax.Array, pool: Pool, slots: jax.Array) -> None:
    tokens, kv_heads, vectors, size = qkv.shape
    if vectors < 3 or size % 2:
        raise ValueError(f"qkv {qkv.shape} must be [T, K, N / K + 2, H], with an even H")
    if stored(pool).shape[2] != kv_heads or not fits(pool, kv_heads, size):
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", pool)
        expected = f"[P, 2, {kv_heads}, S, {size}], or a QuantizedPool of it"
        raise ValueError(f"pool={shapes} does not fit qkv {qkv.shape}; expected {expected}")
    if slots.shape != (tokens,) or any(table.shape != (tokens, size // 2) for table in (cos, sin)):
        shapes = f"cos {cos.shape}, sin {sin.shape} and slots {slots.shape}"
        raise ValueError(f"{shapes} do not fit qkv {qkv.shape}; expected [T, H / 2] twice, and [T]")
    if (cos.dtype, sin.dtype) != (jnp.float32, jnp.float32):
        raise ValueError(f"cos is {cos.dtype} and sin {sin.dtype}; both must be float32, which angles need")
