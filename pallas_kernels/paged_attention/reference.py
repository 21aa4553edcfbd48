"""The op in plain XLA: any platform, any dtype. Blocks are visited in order with a running softmax (arXiv:1805.02867).

Work grows with the longest context of the call, not with the size of the block table, and shapes do not depend on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_MASKED = -1e30


def check(platform: str) -> None:
    """Runs everywhere."""


def run(
    q: jax.Array,
    pool: jax.Array,
    block_tables: jax.Array,
    first_positions: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``."""
    rows, queries, heads, size = q.shape
    _, _, kv_heads, block_size, _ = pool.shape
    grouped = q.reshape(rows, queries, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4) * scale
    flat = grouped.reshape(rows, kv_heads, -1, size)
    positions = first_positions[:, None] + jnp.arange(queries, dtype=jnp.int32)
    positions = jnp.tile(positions, (1, heads // kv_heads))

    def visit(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        peak, total, out = carry
        block = pool[jax.lax.dynamic_index_in_dim(block_tables, index, axis=1, keepdims=False)]
        scores = jnp.einsum("rkqh,rksh->rkqs", flat, block[:, 0], preferred_element_type=jnp.float32)
        age = positions[:, :, None] - (index * block_size + jnp.arange(block_size, dtype=jnp.int32))
        visible = (age >= 0) if window is None else (age >= 0) & (age < window)
        scores = jnp.where(visible[:, None], scores, _MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        gathered = jnp.einsum(
            "rkqs,rksh->rkqh", weights.astype(block.dtype), block[:, 1], preferred_element_type=jnp.float32
        )
        return new_peak, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + gathered

    shape = flat.shape[:3]
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(flat.shape, jnp.float32))
    first, last = _visited_blocks(first_positions, lengths, window, block_size)
    _, total, out = jax.lax.fori_loop(first, last, visit, start)
    out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
    return out.reshape(rows, kv_heads, -1, queries, size).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _visited_blocks(
    first_positions: jax.Array, lengths: jax.Array, window: int | None, block_size: int
) -> tuple[jax.Array | int, jax.Array]:
    """First and last (exclusive) block index that any real row sees."""
    last = (jnp.max(first_positions + lengths) + block_size - 1) // block_size
    if window is None:
        return 0, last
    oldest = jnp.where(lengths > 0, first_positions - window + 1, jnp.iinfo(jnp.int32).max)
    return jnp.clip(jnp.min(oldest), 0) // block_size, last
