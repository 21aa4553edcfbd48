"""Attention on GPUs from Ampere on: one kernel for decode and prefill, and a sum where a context is split.

The kernel is ``triton_kernel``; here it is given its grid, its tiles and what it must refuse.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.kv_pool import Pool, block_size, pool_bits, stored
from pallas_kernels.paged_attention.instructions import exp2
from pallas_kernels.paged_attention.tiles import Call, Tiles, choose
from pallas_kernels.paged_attention.triton_kernel import TritonKernel
from pallas_kernels.paged_attention.words import Words, as_words
from pallas_kernels.target import Target, current_target


def check(target: Target) -> None:
    """Refuse what is no GPU of compute capability 8.0 or newer."""
    need_gpu(target)


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
    tiles: Tiles | None = None,
) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``. Queries for a quantised pool become float16."""
    rows, queries, heads, size = q.shape
    target, kv_heads = current_target(), stored(pool).shape[2]
    _refuse(q, pool, target, tiles)
    chosen = choose(Call.of(q, pool, block_tables), target, tiles)
    kernel = TritonKernel(
        words=Words(pool_bits(pool, size), size),
        group=heads // kv_heads,
        tokens=chosen.tokens(heads // kv_heads),
        tile_n=chosen.tile_n,
        splits=chosen.splits,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    heads_apart = (rows, queries, kv_heads, kernel.group)
    parts = (chosen.splits, *heads_apart)
    whole = [jax.ShapeDtypeStruct((*heads_apart, size), q.dtype)]
    split = [jax.ShapeDtypeStruct((*parts, size), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    out = pl.pallas_call(
        kernel.run,
        grid=(rows, kv_heads, pl.cdiv(queries, kernel.tokens) * chosen.splits),
        out_shape=whole if chosen.splits == 1 else split,
        compiler_params=plt.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages),
        interpret=target.interpret,
        name="paged_attention",
    )(q.reshape(*heads_apart, size), *as_words(pool), block_tables, first_positions, lengths)
    return (out[0] if chosen.splits == 1 else _combine(out[0], out[1], q.dtype, interpret=target.interpret)).reshape(
        q.shape
    )


def _refuse(q: jax.Array, pool: Pool, target: Target, tiles: Any) -> None:
    size, tokens = q.shape[-1], block_size(pool)
    if tiles is not None and not isinstance(tiles, Tiles):
        raise RefusalError(f"takes Tiles, have {tiles}")
    if size % 16 or size > 256:
        raise RefusalError(f"needs a head_dim that is a multiple of 16 up to 256, have {size}")
    if tokens < 16 or tokens & (tokens - 1):
        raise RefusalError(f"needs a block_size that is a power of two from 16 on, have {tokens}")
    if target.is_gpu and jnp.float32 in (q.dtype, stored(pool).dtype):
        raise RefusalError("needs queries and keys that tensor cores take: bfloat16 or float16, have float32")


def _combine(out: jax.Array, weight: jax.Array, dtype: jnp.dtype, *, interpret: bool) -> jax.Array:
    """Splits ``out`` [splits, R, Q, K, N / K, H], whose exponentials sum to 2^``weight`` → [R, Q, K, N / K, H]."""
    splits, *heads, size = out.shape
    lanes, padded = (int(pl.next_power_of_2(n)) for n in (size, splits))
    count = math.prod(heads)

    def kernel(out_ref: Any, weight_ref: Any, combined_ref: Any) -> None:
        head = pl.program_id(0)
        split, lane = jnp.arange(padded, dtype=jnp.int32), jnp.arange(lanes, dtype=jnp.int32)
        there = (split < splits)[:, None] & (lane < size)[None, :]
        weights = plt.load(weight_ref.at[split, head], mask=split < splits, other=-jnp.inf)
        share = exp2(weights - weights.max())
        parts = plt.load(out_ref.at[split[:, None], head, lane[None, :]], mask=there, other=jnp.float32(0))
        combined = (parts * share[:, None]).sum(axis=0) / share.sum()
        plt.store(combined_ref.at[head, lane], combined.astype(dtype), mask=lane < size)

    combined: jax.Array = pl.pallas_call(
        kernel,
        grid=(count,),
        out_shape=jax.ShapeDtypeStruct((count, size), dtype),
        compiler_params=plt.CompilerParams(num_warps=8 if padded * lanes > 8192 else 4, num_stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(out.reshape(splits, count, size), weight.reshape(splits, count))
    return combined
