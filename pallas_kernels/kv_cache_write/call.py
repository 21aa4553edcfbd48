"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.kv_pool import Pool, fits, stored


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCacheWriteCall:
    """Queries, keys and values of T new tokens, and where their keys and values go.

    Attributes:
        qkv: [T, K, N / K + 2, H] float: each KV head's query heads, its key, its value.
        cos: float32 [T, H / 2].
        sin: float32 [T, H / 2].
        pool: [P, 2, K, S, H] float, or a ``QuantizedPool``; updated in place if it is donated.
        slots: int32 [T], block · S + offset of each token, all different. A slot beyond the pool writes nothing.
    """

    OP: ClassVar = "kv_cache_write"

    qkv: jax.Array
    cos: jax.Array
    sin: jax.Array
    pool: Pool
    slots: jax.Array

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes that do not fit together."""
        tokens, kv_heads, vectors, size = self.qkv.shape
        if vectors < 3 or size % 2:
            raise ValueError(f"qkv {self.qkv.shape} must be [T, K, N / K + 2, H], with an even H")
        if stored(self.pool).shape[2] != kv_heads or not fits(self.pool, kv_heads, size):
            shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", self.pool)
            expected = f"[P, 2, {kv_heads}, S, {size}], or a QuantizedPool of it"
            raise ValueError(f"pool={shapes} does not fit qkv {self.qkv.shape}; expected {expected}")
        tables = (self.cos, self.sin)
        if self.slots.shape != (tokens,) or any(table.shape != (tokens, size // 2) for table in tables):
            shapes = f"cos {self.cos.shape}, sin {self.sin.shape} and slots {self.slots.shape}"
            raise ValueError(f"{shapes} do not fit qkv {self.qkv.shape}; expected [T, H / 2] twice, and [T]")
        if any(table.dtype != jnp.float32 for table in tables):
            raise ValueError(f"cos is {self.cos.dtype} and sin {self.sin.dtype}; both must be float32")
