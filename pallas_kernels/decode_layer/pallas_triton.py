"""The layer as seven Pallas-Triton kernels: qkv, attend, out, norm, gate-up, down, norm (eight with ``combine``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.attend import AttentionTile, attend
from pallas_kernels.decode_layer.call import DecodeLayerCall
from pallas_kernels.decode_layer.linear import Source, Tile, gated, split_k_matmul
from pallas_kernels.decode_layer.reduce_norm import reduce_norm
from pallas_kernels.decode_layer.tiles import ProblemSize, Tiles, choose, fits
from pallas_kernels.decode_layer.weights import weight_shape
from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size
from pallas_kernels.target import Target, current_target
from pallas_kernels.w4a16_matmul.layout import CHUNK


def check_device(target: Target) -> None:
    """Ampere and newer."""
    need_gpu(target)


def check(call: DecodeLayerCall) -> None:
    """Refuse dtypes, sizes, pools and options of the scores that the kernels do not take."""
    call.scores.refuse("softcap", "slopes", "sinks")
    dtype, pool, head_dim = call.x.dtype, call.pool, call.heads.size
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise RefusalError(f"takes bfloat16 and float16, not {dtype}")
    if head_dim % 16 or head_dim > 256:
        raise RefusalError(f"takes a head_dim that is a multiple of 16 up to 256, not {head_dim}")
    size = block_size(pool)
    if size < 16 or size & (size - 1):
        raise RefusalError(f"takes a block_size that is a power of two from 16 on, not {size}")
    if not isinstance(pool, QuantizedPool) and pool.dtype != dtype:
        raise RefusalError(f"takes a pool of x's dtype {dtype}, not {pool.dtype}")
    if isinstance(pool, QuantizedPool) and pool.calibrated:
        raise RefusalError("takes each key's and value's own range, not one that was calibrated")
    for name in ("wqkv", "wo", "gate_up", "down"):
        rows, _ = weight_shape(getattr(call.weights, name))
        if rows % CHUNK:
            raise RefusalError(f"takes weights whose rows are a multiple of {CHUNK}, not {name} with {rows}")


def run(call: DecodeLayerCall, tiles: Tiles | None = None) -> tuple[jax.Array, jax.Array, Pool]:
    """See ``pallas_kernels.decode_layer.decode_layer``; refuses tiles that do not divide the layer."""
    weights, axis_name, problem = call.weights, call.axis_name, ProblemSize.of(call)
    chosen = choose(current_target(), problem, tiles)
    if not fits(chosen, problem):
        raise RefusalError(f"has no tiles for this layer: {chosen} do not divide {problem}")

    def linear(columns: int, splits: int = 1) -> Tile:
        return Tile(columns, splits, chosen.linear_warps, chosen.linear_stages)

    def end_branch(
        x: jax.Array, source: Source, weight: jax.Array, bias: jax.Array | None, tile: Tile, norm: jax.Array, name: str
    ) -> tuple[jax.Array, jax.Array]:
        """Add the product to the residual stream and normalise; between devices the sums travel in ``x``'s dtype."""
        out_dtype = jnp.dtype(jnp.float32) if axis_name is None or tile.splits > 1 else x.dtype
        partials = split_k_matmul(source, weight, call.tokens, tile, out_dtype=out_dtype, name=name)
        if axis_name is not None:
            local = partials[0] if tile.splits == 1 else partials.sum(axis=0).astype(x.dtype)
            partials = jax.lax.psum(local, axis_name)[None]
        return reduce_norm(partials, bias, x, norm, eps=call.eps, num_warps=chosen.norm_warps, name=f"{name}_norm")

    qkv = split_k_matmul(
        call.normed,
        weights.wqkv,
        call.tokens,
        linear(chosen.qkv_columns, chosen.qkv_splits),
        out_dtype=jnp.dtype(jnp.float32),
        name="decode_layer_qkv",
    )
    attention_tile = AttentionTile(
        chosen.attend_splits, chosen.attend_tokens, chosen.attend_warps, chosen.attend_stages
    )
    attended, pool = attend(call, qkv, attention_tile)
    out_tile = linear(chosen.out_columns, chosen.out_splits)
    x, normed = end_branch(call.x, attended, weights.wo, weights.bo, out_tile, weights.mlp_norm, "decode_layer_out")
    inner = gated(
        normed, weights.gate_up, weights.gate_up_bias, linear(chosen.gate_up_columns), name="decode_layer_gate_up"
    )
    down_tile = linear(chosen.down_columns, chosen.down_splits)
    x, normed = end_branch(x, inner, weights.down, weights.down_bias, down_tile, call.next_norm, "decode_layer_down")
    return x, normed, pool
