"""The op in plain XLA: any platform, any dtype. Each row visits its blocks in order with a running softmax.

A row visits only the blocks that it sees, so work grows with the context and not with the size of the block table.
The running softmax is that of arXiv:1805.02867.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import RefusalError
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size, dequantize
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.score_options import ScoreOptions
from pallas_kernels.target import Target, current_target

_MASKED = -1e30

_Softmax = tuple[jax.Array, jax.Array, jax.Array]


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: PagedAttentionCall) -> None:
    """Accepts every call."""


def run(call: PagedAttentionCall, tiles: Any = None) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``; refuses ``tiles``, of which it has none."""
    if tiles is not None:
        raise RefusalError("has no tiles")
    rows, tokens, _, size = call.queries.shape
    by_group = call.queries.reshape(rows, tokens, call.kv_heads, call.group, size).transpose(0, 2, 3, 1, 4)

    vectors = by_group.reshape(rows, call.kv_heads, -1, size)
    positions = jnp.tile(call.first_positions[:, None] + jnp.arange(tokens, dtype=jnp.int32), call.group)
    ends = jnp.where(call.lengths > 0, call.first_positions + call.lengths, 0)
    scores = _per_vector(call.scores, call.kv_heads, tokens)

    def attend(row: tuple[jax.Array, ...]) -> jax.Array:
        return _attend_row(*row, pool=call.pool, scores=scores)

    per_row = (vectors, call.block_tables, positions, ends)
    out: jax.Array = jax.lax.map(attend, per_row) if _one_by_one() else jax.vmap(attend)(per_row)
    return out.astype(call.queries.dtype).reshape(by_group.shape).transpose(0, 3, 1, 2, 4).reshape(call.queries.shape)


def _per_vector(scores: ScoreOptions, kv_heads: int, tokens: int) -> ScoreOptions:
    """Return ``scores`` with slopes and sinks as [K, V], for the V query vectors of a KV head: tokens within heads."""

    def spread(per_head: jax.Array | None) -> jax.Array | None:
        return None if per_head is None else jnp.repeat(per_head.reshape(kv_heads, -1), tokens, axis=1)

    return replace(scores, slopes=spread(scores.slopes), sinks=spread(scores.sinks))


def _one_by_one() -> bool:
    """Row after row keeps a CPU in its caches; on a GPU each loop would wait for the host, so all rows share one."""
    return current_target().platform == "cpu"


def _attend_row(
    q: jax.Array, table: jax.Array, positions: jax.Array, end: jax.Array, *, pool: Pool, scores: ScoreOptions
) -> jax.Array:
    """Attend to the keys before ``end`` with one row: ``q`` [K, V, H] at ``positions`` [V] → float32 [K, V, H]."""
    size, window = block_size(pool), scores.window

    def visit(index: jax.Array, running: _Softmax) -> _Softmax:
        keys, values = (_half_block(pool, table[index], half, q.shape[-1]) for half in (0, 1))
        age = positions[:, None] - (index * size + jnp.arange(size, dtype=jnp.int32))
        visible = (age >= 0) if window is None else (age >= 0) & (age < window)
        return _accumulate(running, jnp.where(visible, _scores(q, keys, age, scores), _MASKED), values)

    first_block = 0 if window is None else jnp.maximum(positions[0] - window + 1, 0) // size
    _, total, out = jax.lax.fori_loop(first_block, -(-end // size), visit, _empty(q, scores.sinks))
    attended: jax.Array = out / jnp.maximum(total, 1e-30)[..., None]
    return attended


def _empty(q: jax.Array, sinks: jax.Array | None) -> _Softmax:
    """Return the softmax before the first block; a sink [K, V] is in its denominator already."""
    out = jnp.zeros(q.shape, jnp.float32)
    if sinks is None:
        return jnp.full(q.shape[:2], _MASKED), jnp.zeros(q.shape[:2]), out
    return sinks, jnp.ones_like(sinks), out


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


def _scores(q: jax.Array, keys: jax.Array, age: jax.Array, options: ScoreOptions) -> jax.Array:
    """``q`` [K, V, H], and ``keys`` [K, S, H] that are ``age`` [V, S] tokens older → float32 [K, V, S]."""
    scores = jnp.einsum("krh,ksh->krs", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32) * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    if options.slopes is not None:
        scores -= options.slopes[..., None] * age.astype(jnp.float32)
    return scores


def _accumulate(running: _Softmax, scores: jax.Array, values: jax.Array) -> _Softmax:
    """Add a block with ``scores`` [K, V, S] and ``values`` [K, S, H] to the running (peak, total, output)."""
    peak, total, out = running
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weights = jnp.exp(scores - new_peak[..., None])
    shrink = jnp.exp(peak - new_peak)
    added = jnp.einsum("krs,ksh->krh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_peak, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + added
