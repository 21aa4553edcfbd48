"""Attention over keys and values that live in the blocks of a pool.

A call is a set of rows. A row is Q consecutive query tokens of one sequence, together with that sequence's block
table: Q is 1 for a decoding sequence, and a chunk of a prompt is cut into rows of more tokens. One op serves both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch

BACKENDS = {"reference": "pallas_kernels.paged_attention.reference"}
"""In order of preference; each module refuses what it cannot do."""


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    block_tables: jax.Array,
    first_positions: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention of R rows of Q query tokens.

    Args:
        q: [R, Q, N, H] float; token i of row r stands at position ``first_positions[r] + i``.
        pool: [P, 2, K, S, H] float; keys at [:, 0], values at [:, 1].
        block_tables: int32 [R, M] physical blocks of the row's sequence; entries beyond its context are not used.
        first_positions: int32 [R].
        lengths: int32 [R], real tokens of each row; those after them give unspecified finite values.
        scale: what the scores are multiplied by.
        window: a query sees itself and the ``window - 1`` tokens before it; ``None`` sees all.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.

    Returns:
        [R, Q, N, H], dtype of ``q``.

    Raises:
        ValueError: shapes that do not fit together. NoBackendError: every backend refused.
    """
    _validate(q, pool, block_tables, first_positions, lengths)
    args = (q, pool, block_tables, first_positions, lengths)
    out: jax.Array = dispatch("paged_attention", BACKENDS, backend, *args, scale=scale, window=window)
    return out


def write_kv(pool: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """Put the keys and values [T, K, H] of T tokens into their slots (int32 [T], block · S + offset) of ``pool``.

    A slot beyond the pool writes nothing. The pool is updated in place where its buffer is donated.
    """
    block_size = pool.shape[3]
    both = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return pool.at[slots // block_size, :, :, slots % block_size].set(both, mode="drop")


def _validate(
    q: jax.Array, pool: jax.Array, block_tables: jax.Array, first_positions: jax.Array, lengths: jax.Array
) -> None:
    rows, _, heads, size = q.shape
    _, two, kv_heads, _, pool_size = pool.shape
    if two != 2 or pool_size != size or heads % kv_heads:
        raise ValueError(f"q {q.shape} does not fit pool {pool.shape}; expected [R, Q, N, H] and [P, 2, K, S, H]")
    if block_tables.shape[0] != rows or first_positions.shape != (rows,) or lengths.shape != (rows,):
        raise ValueError(
            f"block_tables {block_tables.shape}, first_positions {first_positions.shape} and lengths {lengths.shape} "
            f"must each have one entry for each of the {rows} rows of q"
        )
