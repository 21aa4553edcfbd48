"""The layer as seven Pallas-Triton kernels: qkv, attend, out, norm, gate-up, down, norm (eight with ``combine``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.attend import AttentionTile, Heads, attend
from pallas_kernels.decode_layer.linear import Source, Tile, gated, split_k_matmul
from pallas_kernels.decode_layer.reduce_norm import reduce_norm
from pallas_kernels.decode_layer.tiles import Call, Tiles, choose, fits
from pallas_kernels.decode_layer.weights import LayerWeights, is_packed, weight_shape
from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size, pool_bits, stored
from pallas_kernels.target import Target, current_target
from pallas_kernels.w4a16_matmul.dequant import CHUNK


def check(target: Target) -> None:
    """Ampere and newer."""
    need_gpu(target)


def run(
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
    window: int | None,
    axis_name: str | None,
    tiles: Tiles | None,
) -> tuple[jax.Array, jax.Array, Pool]:
    """See ``pallas_kernels.decode_layer.decode_layer``."""
    tokens, rows = positions.shape[0], x.shape[0]
    heads = Heads(num_heads, stored(pool).shape[2], 2 * cos.shape[1])
    call = _describe(x, weights, pool, block_tables, heads, parallel=axis_name is not None)
    _refuse(x, weights, pool, heads)
    chosen = choose(current_target(), call, tiles)
    if not fits(chosen, call):
        raise RefusalError(f"has no tiles for this layer: {chosen} do not divide {call}")

    def linear(columns: int, splits: int = 1) -> Tile:
        return Tile(columns, splits, chosen.linear_warps, chosen.linear_stages)

    def end_branch(
        source: Source, weight: jax.Array, bias: jax.Array | None, tile: Tile, norm: jax.Array, name: str
    ) -> tuple[jax.Array, jax.Array]:
        """Add the product to the residual stream and normalise; between devices the sums travel in ``x``'s dtype."""
        out_dtype = jnp.dtype(jnp.float32) if axis_name is None or tile.splits > 1 else x.dtype
        partials = split_k_matmul(source, weight, tokens, tile, out_dtype=out_dtype, name=name)
        if axis_name is not None:
            local = partials[0] if tile.splits == 1 else partials.sum(axis=0).astype(x.dtype)
            partials = jax.lax.psum(local, axis_name)[None]
        return reduce_norm(partials, bias, x, norm, eps=eps, num_warps=chosen.norm_warps, name=f"{name}_norm")

    qkv = split_k_matmul(
        normed,
        weights.wqkv,
        tokens,
        linear(chosen.qkv_columns, chosen.qkv_splits),
        out_dtype=jnp.dtype(jnp.float32),
        name="decode_layer_qkv",
    )
    attended, pool = attend(
        qkv,
        weights.bqkv,
        pool,
        block_tables,
        positions,
        cos,
        sin,
        heads=heads,
        rows=rows,
        scale=scale,
        window=window,
        dtype=x.dtype,
        tile=AttentionTile(chosen.attend_splits, chosen.attend_tokens, chosen.attend_warps, chosen.attend_stages),
    )
    out_tile = linear(chosen.out_columns, chosen.out_splits)
    x, normed = end_branch(attended, weights.wo, weights.bo, out_tile, weights.mlp_norm, "decode_layer_out")
    inner = gated(
        normed, weights.gate_up, weights.gate_up_bias, linear(chosen.gate_up_columns), name="decode_layer_gate_up"
    )
    down_tile = linear(chosen.down_columns, chosen.down_splits)
    x, normed = end_branch(inner, weights.down, weights.down_bias, down_tile, next_norm, "decode_layer_down")
    return x, normed, pool


def _describe(
    x: jax.Array, weights: LayerWeights, pool: Pool, block_tables: jax.Array, heads: Heads, *, parallel: bool
) -> Call:
    tokens, entries = block_tables.shape
    return Call(
        tokens=tokens,
        hidden=x.shape[1],
        heads=heads.queries,
        kv_heads=heads.kv,
        head_dim=heads.size,
        mlp=weight_shape(weights.down)[0],
        block_size=block_size(pool),
        context=entries,
        weight_bits=4 if is_packed(weights.wqkv) else 16,
        kv_bits=pool_bits(pool, heads.size) or 16,
        parallel=parallel,
    )


def _refuse(x: jax.Array, weights: LayerWeights, pool: Pool, heads: Heads) -> None:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise RefusalError(f"takes bfloat16 and float16, not {x.dtype}")
    if heads.size % 16 or heads.size > 256:
        raise RefusalError(f"takes a head_dim that is a multiple of 16 up to 256, not {heads.size}")
    size = block_size(pool)
    if size < 16 or size & (size - 1):
        raise RefusalError(f"takes a block_size that is a power of two from 16 on, not {size}")
    if not isinstance(pool, QuantizedPool) and pool.dtype != x.dtype:
        raise RefusalError(f"takes a pool of x's dtype {x.dtype}, not {pool.dtype}")
    if isinstance(pool, QuantizedPool) and pool.calibrated:
        raise RefusalError("takes each key's and value's own range, not one that was calibrated")
    for name in ("wqkv", "wo", "gate_up", "down"):
        rows, _ = weight_shape(getattr(weights, name))
        if rows % CHUNK:
            raise RefusalError(f"takes weights whose rows are a multiple of {CHUNK}, not {name} with {rows}")
