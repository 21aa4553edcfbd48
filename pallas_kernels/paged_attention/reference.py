"""The op in plain XLA: any platform, any dtype. Each row visits its blocks in order with a running softmax.

A row visits only the blocks that it sees, so work grows with the context and not with the size of the block table.
The running softmax is that of arXiv:1805.02867.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import RefusalError
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size, dequantize, stored
from pallas_kernels.target import Target, current_target

_MASKED = -1e30

_Softmax = tuple[jax.Array, jax.Array, jax.Array]


def check(target: Target) -> None:
    """Runs everywhere."""


def run(
    q: jax.Array,
    pool: Pool,
    block_tables: jax.Array,
    first_positions: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    tiles: Any = None,
) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``."""
    if tiles is not None:
        raise RefusalError("has no tiles")
    rows, queries, heads, size = q.shape
    kv_heads = stored(pool).shape[2]
    grouped = q.reshape(rows, queries, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)

    flat = grouped.reshape(rows, kv_heads, -1, size)
    positions = jnp.tile(first_positions[:, None] + jnp.arange(queries, dtype=jnp.int32), heads // kv_heads)
    ends = jnp.where(lengths > 0, first_positions + lengths, 0)
    score = partial(_scores, scale=scale, softcap=softcap)

    def attend(row: tuple[jax.Array, ...]) -> jax.Array:
        return _attend_row(*row, pool=pool, score=score, window=window)

    per_row = (flat, block_tables, positions, ends)
    out: jax.Array = jax.lax.map(attend, per_row) if _one_by_one() else jax.vmap(attend)(per_row)
    return out.astype(q.dtype).reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _one_by_one() -> bool:
    """Row after row keeps a CPU in its caches; on a GPU each loop would wait for the host, so all rows share one."""
    return current_target().platform == "cpu"


def _attend_row(
    q: jax.Array, table: jax.Array, positions: jax.Array, end: jax.Array, *, pool: Pool, score: Any, window: int | None
) -> jax.Array:
    """One row: ``q`` [K, R, H] at ``positions`` [R] sees keys before ``end`` → float32 [K, R, H]."""
    size = block_size(pool)

    def visit(index: jax.Array, running: _Softmax) -> _Softmax:
        keys, values = (_half_block(pool, table[index], half, q.shape[-1]) for half in (0, 1))
        age = positions[:, None] - (index * size + jnp.arange(size, dtype=jnp.int32))
        visible = (age >= 0) if window is None else (age >= 0) & (age < window)
        return _accumulate(running, jnp.where(visible, score(q, keys), _MASKED), values)

    first_block = 0 if window is None else jnp.maximum(positions[0] - window + 1, 0) // size
    empty = (jnp.full(q.shape[:2], _MASKED), jnp.zeros(q.shape[:2]), jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(first_block, -(-end // size), visit, empty)
    attended: jax.Array = out / jnp.maximum(total, 1e-30)[..., None]
    return attended


def _half_block(pool: Pool, block: jax.Array, half: int, head_dim: int) -> jax.Array:
    """Keys (``half`` 0) or values (1) of a block, [K, S, H].

    Sliced straight from the pool: where a reshaped pool is sliced, XLA:CPU may copy all of it first.
    """
    if isinstance(pool, QuantizedPool):
        values, scales = (_sliced(array, block, half) for array in (pool.values, pool.scales))
        return dequantize(values, scales.swapaxes(-1, -2), pool.bits(head_dim))
    return _sliced(pool, block, half)


def _sliced(array: jax.Array, block: jax.Array, half: int) -> jax.Array:
    return jax.lax.dynamic_slice(array, (block, half, 0, 0, 0), (1, 1, *array.shape[2:]))[0, 0]


def _scores(q: jax.Array, keys: jax.Array, *, scale: float, softcap: float | None) -> jax.Array:
    """``q`` [K, R, H] and ``keys`` [K, S, H] → float32 [K, R, S]."""
    scores = jnp.einsum("krh,ksh->krs", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _accumulate(running: _Softmax, scores: jax.Array, values: jax.Array) -> _Softmax:
    """Add a block with ``scores`` [K, R, S] and ``values`` [K, S, H] to the running (peak, total, output)."""
    peak, total, out = running
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weights = jnp.exp(scores - new_peak[..., None])
    shrink = jnp.exp(peak - new_peak)
    added = jnp.einsum("krs,ksh->krh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_peak, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + added
