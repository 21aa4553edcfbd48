"""The op in plain jnp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import RefusalError
from pallas_kernels.kv_pool import Pool, block_size, put
from pallas_kernels.target import Target


def check(target: Target) -> None:
    """Runs everywhere."""


def run(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, pool: Pool, slots: jax.Array, *, tiles: Any = None
) -> tuple[jax.Array, Pool]:
    """See ``pallas_kernels.kv_cache_write.kv_cache_write``."""
    if tiles is not None:
        raise RefusalError("has no tiles")
    tokens, *_, size = qkv.shape
    rotated = _rotate(qkv[:, :, :-1], cos[:, None, None], sin[:, None, None])
    both = jnp.stack([rotated[:, :, -1], qkv[:, :, -1]], axis=1)
    block, offset = slots // block_size(pool), slots % block_size(pool)
    return rotated[:, :, :-1].reshape(tokens, -1, size), put(pool, both, block, offset)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
