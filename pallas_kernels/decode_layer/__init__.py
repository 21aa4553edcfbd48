"""One transformer layer for one new token of every sequence: the decode step's inner part, in seven launches."""

from __future__ import annotations

import jax

from pallas_kernels.decode_layer.tiles import OP, Tiles
from pallas_kernels.decode_layer.weights import LayerWeights, weight_shape
from pallas_kernels.dispatch import dispatch
from pallas_kernels.kv_pool import Pool, QuantizedPool

__all__ = ["BACKENDS", "LayerWeights", "Tiles", "decode_layer", "padded_rows"]

BACKENDS = {
    "pallas_triton": "pallas_kernels.decode_layer.pallas_triton",
    "reference": "pallas_kernels.decode_layer.reference",
}
"""In order of preference; each module refuses what it cannot do."""


def padded_rows(tokens: int) -> int:
    """Rows of the activations of ``tokens`` sequences: whole tensor-core tiles of 16."""
    return -(-tokens // 16) * 16


def decode_layer(
    x: jax.Array,
    normed: jax.Array,
    weights: LayerWeights,
    next_norm: jax.Array,
    pool: Pool,
    block_tables: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    num_heads: int,
    scale: float,
    eps: float,
    window: int | None = None,
    axis_name: str | None = None,
    backend: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, Pool]:
    """Attention and gated MLP of a pre-norm layer with rotary positions, over a paged KV cache.

    The activations of a step stay padded to ``padded_rows(B)`` rows from the first layer to the last; rows from B on
    are never looked at, and come back as zeros.

    Args:
        x: bfloat16 or float16 [padded_rows(B), D], the residual stream.
        normed: the same shape and dtype, ``x`` after this layer's first norm.
        weights: of this layer; under tensor parallelism this device's share of them.
        next_norm: [D], scale of the RMSNorm that follows: the next layer's first, or the model's last.
        pool: [P, 2, K, S, H] or ``QuantizedPool``; finite everywhere, unused slots included. Updated in place where
            donated.
        block_tables: int32 [B, M], physical blocks of each sequence; entries beyond its length are not used.
        positions: int32 [B], where the new token stands: as many tokens of the sequence are in the pool already. A row
            with −1 has no token: nothing is written for it, and what it returns means nothing.
        cos: float32 [B, H/2], of the rotary angles of ``positions``; element i is paired with i + H/2.
        sin: float32 [B, H/2].
        num_heads: N, of this device.
        scale: what scores are multiplied by.
        eps: of both norms.
        window: a token sees itself and the ``window - 1`` tokens before it; ``None`` sees all.
        axis_name: the mesh axis, inside ``shard_map``, over whose devices the heads and the MLP are spread.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: for ``pallas_triton``; ``None`` takes measured ones, else a heuristic's.

    Returns:
        (x, normed, pool) for the next layer.

    Raises:
        ValueError: shapes that do not fit together. NoBackendError: every backend refused.
    """
    _validate(x, normed, weights, pool, block_tables, positions, cos, sin, num_heads)
    args = (x, normed, weights, next_norm, pool, block_tables, positions, cos, sin)
    options = {"num_heads": num_heads, "scale": scale, "eps": eps, "window": window, "axis_name": axis_name}
    result: tuple[jax.Array, jax.Array, Pool] = dispatch(OP, BACKENDS, backend, *args, **options, tiles=tiles)
    return result


def _validate(
    x: jax.Array,
    normed: jax.Array,
    weights: LayerWeights,
    pool: Pool,
    block_tables: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    num_heads: int,
) -> None:
    tokens, hidden, size = positions.shape[0], x.shape[1], 2 * cos.shape[1]
    kv_heads = (pool.values if isinstance(pool, QuantizedPool) else pool).shape[2]
    if x.shape != normed.shape or x.shape[0] != padded_rows(tokens):
        raise ValueError(
            f"x {x.shape} and normed {normed.shape} must have {padded_rows(tokens)} rows for {tokens} positions; "
            "pad them with padded_rows"
        )
    if {array.shape[0] for array in (block_tables, cos, sin)} != {tokens}:
        raise ValueError(
            f"block_tables {block_tables.shape}, cos {cos.shape} and sin {sin.shape} must each have one row for each "
            f"of the {tokens} positions"
        )
    if num_heads % kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of the pool's {kv_heads} KV heads")
    mlp = weight_shape(weights.down)[0]
    expected = {
        "wqkv": (hidden, (num_heads + 2 * kv_heads) * size),
        "wo": (num_heads * size, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
    }
    for name, shape in expected.items():
        if weight_shape(getattr(weights, name)) != shape:
            raise ValueError(f"weights.{name} is {weight_shape(getattr(weights, name))}, expected {shape}")
