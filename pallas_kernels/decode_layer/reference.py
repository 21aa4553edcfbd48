"""The layer out of plain jnp operations, one after the other: any platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_layer.call import DecodeLayerCall
from pallas_kernels.decode_layer.tiles import Tiles
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size, dequantize, pool_bits, put, stored
from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.layout import is_packed
from pallas_kernels.w4a16_matmul.reference import weight as unpacked


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: DecodeLayerCall) -> None:
    """Refuse options of the scores that the layer does not implement."""
    call.scores.refuse("softcap", "slopes", "sinks")


def run(call: DecodeLayerCall, tiles: Tiles | None = None) -> tuple[jax.Array, jax.Array, Pool]:
    """See ``pallas_kernels.decode_layer.decode_layer``; ignores ``tiles``."""
    tokens, heads, weights, dtype = call.tokens, call.heads, call.weights, call.x.dtype
    stream = call.x[:tokens].astype(jnp.float32)

    def end_branch(
        stream: jax.Array, rows: jax.Array, weight: jax.Array, bias: jax.Array | None, norm: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        out = product(rows, weight)
        if call.axis_name is not None:
            out = lax.psum(out.astype(dtype), call.axis_name).astype(jnp.float32)
        stream = rounded(stream + _with_bias(out, bias), dtype)
        return stream, rms_norm(stream, norm, call.eps)

    projected = rounded(_with_bias(product(call.normed[:tokens], weights.wqkv), weights.bqkv), dtype)
    grouped = projected.reshape(tokens, heads.kv, -1, heads.size)
    queries = rotate(grouped[:, :, :-2], call.cos, call.sin)
    key = rounded(rotate(grouped[:, :, -2:-1], call.cos, call.sin), dtype)
    vectors = jnp.concatenate([key, grouped[:, :, -1:]], axis=2)
    pool = write(call.pool, vectors, call.block_tables, call.positions)
    scaled = rounded(queries * call.scores.scale, dtype)
    attended = attention(scaled, pool, call.block_tables, call.positions, call.scores.window)
    attended = attended.reshape(tokens, -1).astype(dtype)
    stream, normed = end_branch(stream, attended, weights.wo, weights.bo, weights.mlp_norm)
    gate, up = jnp.split(_with_bias(product(normed, weights.gate_up), weights.gate_up_bias), 2, axis=1)
    inner = (jax.nn.silu(gate) * up).astype(dtype)
    stream, normed = end_branch(stream, inner, weights.down, weights.down_bias, call.next_norm)
    padding = ((0, call.x.shape[0] - tokens), (0, 0))
    return jnp.pad(stream.astype(dtype), padding), jnp.pad(normed, padding), pool


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x`` [B, rows] · ``weight`` → float32 [B, columns]."""
    matrix = unpacked(weight) if is_packed(weight) else weight.astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding (arXiv:2104.09864) of float32 [B, K, heads, H]; element i is paired with i + H/2."""
    cos, sin = cos[:, None, None], sin[:, None, None]
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def write(pool: Pool, vectors: jax.Array, block_tables: jax.Array, positions: jax.Array) -> Pool:
    """Put ``vectors`` float32 [B, K, 2, H], a key and a value a head, where ``positions`` are; −1 is nowhere."""
    size = block_size(pool)
    place = jnp.maximum(positions, 0)
    block = jnp.take_along_axis(block_tables, (place // size)[:, None], axis=1)[:, 0]
    block = jnp.where(positions >= 0, block, stored(pool).shape[0])
    return put(pool, jnp.swapaxes(vectors, 1, 2), block, place % size)


def attention(
    queries: jax.Array, pool: Pool, block_tables: jax.Array, positions: jax.Array, window: int | None
) -> jax.Array:
    """Softmax over everything that is visible: ``queries`` float32 [B, K, G, H] → the same shape."""
    tokens, entries = block_tables.shape
    size, width = block_size(pool), queries.shape[-1]
    if isinstance(pool, QuantizedPool):
        scales = jnp.swapaxes(pool.scales[block_tables], -1, -2)
        gathered = dequantize(pool.values[block_tables], scales, pool_bits(pool, width) or 8)
    else:
        gathered = pool[block_tables].astype(jnp.float32)
    keys, values = (
        jnp.swapaxes(gathered[:, :, half], 1, 2).reshape(tokens, -1, entries * size, width) for half in (0, 1)
    )
    age = positions[:, None] - jnp.arange(entries * size, dtype=jnp.int32)
    visible = (age >= 0) if window is None else (age >= 0) & (age < window)
    scores = jnp.einsum("bkgh,bkth->bkgt", queries, keys, precision=lax.Precision.HIGHEST)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("bkgt,bkth->bkgh", weights, values, precision=lax.Precision.HIGHEST)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv:1910.07467) of float32 [B, D], in the dtype of ``scale``."""
    normed = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return normed.astype(scale.dtype) * scale


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Float32 values that ``dtype`` can represent."""
    return x.astype(dtype).astype(jnp.float32)


def _with_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias.astype(jnp.float32)
