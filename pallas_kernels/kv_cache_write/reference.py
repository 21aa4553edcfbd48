"""The op in plain jnp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import RefusalError
from pallas_kernels.kv_cache_write.call import KVCacheWriteCall
from pallas_kernels.kv_pool import Pool, block_size, put
from pallas_kernels.target import Target


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: KVCacheWriteCall) -> None:
    """Accepts every call."""


def run(call: KVCacheWriteCall, tiles: Any = None) -> tuple[jax.Array, Pool]:
    """See ``pallas_kernels.kv_cache_write.kv_cache_write``; refuses ``tiles``, of which it has none."""
    if tiles is not None:
        raise RefusalError("has no tiles")
    tokens, *_, size = call.qkv.shape
    rotated = _rotate(call.qkv[:, :, :-1], call.cos[:, None, None], call.sin[:, None, None])
    both = jnp.stack([rotated[:, :, -1], call.qkv[:, :, -1]], axis=1)
    block, offset = call.slots // block_size(call.pool), call.slots % block_size(call.pool)
    return rotated[:, :, :-1].reshape(tokens, -1, size), put(call.pool, both, block, offset)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
