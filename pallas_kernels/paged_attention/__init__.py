"""Attention over keys and values that live in the blocks of a pool.

A call is a set of rows. A row is Q consecutive query tokens of one sequence, together with that sequence's block
table: Q is 1 for a decoding sequence, and a chunk of a prompt is cut into rows of more tokens. One op serves both.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.kv_pool import Pool, fits

BACKENDS = {
    "pallas_mosaic_gpu": "pallas_kernels.paged_attention.pallas_mosaic_gpu",
    "pallas_triton": "pallas_kernels.paged_attention.pallas_triton",
    "reference": "pallas_kernels.paged_attention.reference",
}
"""In order of preference; each module refuses what it cannot do."""


def paged_attention(
    q: jax.Array,
    pool: Pool,
    block_tables: jax.Array,
    first_positions: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    tiles: Any = None,
) -> jax.Array:
    """Causal attention of R rows of Q query tokens.

    Args:
        q: [R, Q, N, H] float; token i of row r stands at position ``first_positions[r] + i``.
        pool: [P, 2, K, S, H] float, keys at [:, 0], values at [:, 1]; or a ``QuantizedPool``.
        block_tables: int32 [R, M] physical blocks of the row's sequence; entries beyond its context are not used.
        first_positions: int32 [R].
        lengths: int32 [R], real tokens of each row; those after them give unspecified finite values.
        scale: what the scores are multiplied by; positive.
        window: a query sees itself and the ``window - 1`` tokens before it; ``None`` sees all.
        softcap: scaled scores s become ``softcap · tanh(s / softcap)`` (as in arXiv:2408.00118); ``None`` leaves them.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: how a Pallas backend cuts up the call, ``Tiles`` for Triton; ``None`` takes the measured ones, else the
            heuristic's.

    Returns:
        [R, Q, N, H], dtype of ``q``.

    Raises:
        ValueError: shapes that do not fit together, or an option out of its range.
        NoBackendError: every backend refused.
    """
    _validate(q, pool, block_tables, first_positions, lengths)
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None and value <= 0:
            raise ValueError(
                f"{name}={value} must be positive" + ("; leave it out for none" if name != "scale" else "")
            )
    args = (q, pool, block_tables, first_positions, lengths)
    options = {"scale": scale, "window": window, "softcap": softcap, "tiles": tiles}
    out: jax.Array = dispatch("paged_attention", BACKENDS, backend, *args, **options)
    return out


def _validate(
    q: jax.Array, pool: Pool, block_tables: jax.Array, first_positions: jax.Array, lengths: jax.Array
) -> None:
    rows, _, heads, size = q.shape
    if not fits(pool, heads, size):
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", pool)
        raise ValueError(
            f"pool={shapes} does not fit q {q.shape}; expected [P, 2, K, S, {size}], or a QuantizedPool of it"
        )
    if block_tables.shape[0] != rows or first_positions.shape != (rows,) or lengths.shape != (rows,):
        raise ValueError(
            f"block_tables {block_tables.shape}, first_positions {first_positions.shape} and lengths {lengths.shape} "
            f"must each have one entry for each of the {rows} rows of q"
        )
