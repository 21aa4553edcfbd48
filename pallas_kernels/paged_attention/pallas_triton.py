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
from pallas_kernels.kv_pool import block_size, pool_bits, stored
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.paged_attention.instructions import exp2
from pallas_kernels.paged_attention.tiles import ProblemSize, Tiles, choose
from pallas_kernels.paged_attention.triton_kernel import TritonKernel
from pallas_kernels.paged_attention.words import Words, as_words
from pallas_kernels.target import Target, current_target


def check_device(target: Target) -> None:
    """Refuse what is no GPU of compute capability 8.0 or newer."""
    need_gpu(target)


def check(call: PagedAttentionCall) -> None:
    """Refuse sizes of heads and blocks that the kernel cannot divide, and float32 on a GPU."""
    size, tokens = call.queries.shape[-1], block_size(call.pool)
    if size % 16 or size > 256:
        raise RefusalError(f"needs a head_dim that is a multiple of 16 up to 256, have {size}")
    if tokens < 16 or tokens & (tokens - 1):
        raise RefusalError(f"needs a block_size that is a power of two from 16 on, have {tokens}")
    if current_target().is_gpu and jnp.float32 in (call.queries.dtype, stored(call.pool).dtype):
        raise RefusalError("needs queries and keys that tensor cores take: bfloat16 or float16, have float32")


def run(call: PagedAttentionCall, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``. Queries for a quantised pool become float16."""
    if tiles is not None and not isinstance(tiles, Tiles):
        raise RefusalError(f"takes Tiles, have {tiles}")
    queries, scores, target = call.queries, call.scores, current_target()
    rows, tokens, _, size = queries.shape
    chosen = choose(ProblemSize.of(call), target, tiles)
    kernel = TritonKernel(
        words=Words(pool_bits(call.pool, size), size),
        group=call.group,
        tokens=chosen.tokens(call.group),
        tile_n=chosen.tile_n,
        splits=chosen.splits,
        scale=scores.scale,
        window=scores.window,
        softcap=scores.softcap,
        has_slopes=scores.slopes is not None,
        has_sinks=scores.sinks is not None,
    )
    by_group = (rows, tokens, call.kv_heads, call.group)
    parts = (chosen.splits, *by_group)
    whole = [jax.ShapeDtypeStruct((*by_group, size), queries.dtype)]
    split = [jax.ShapeDtypeStruct((*parts, size), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    per_row = (call.block_tables, call.first_positions, call.lengths)
    per_head = [array for array in (scores.slopes, scores.sinks) if array is not None]
    out = pl.pallas_call(
        kernel.run,
        grid=(rows, call.kv_heads, pl.cdiv(tokens, kernel.tokens) * chosen.splits),
        out_shape=whole if chosen.splits == 1 else split,
        compiler_params=plt.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages),
        interpret=target.interpret,
        name="paged_attention",
    )(queries.reshape(*by_group, size), *as_words(call.pool), *per_row, *per_head)
    attended: jax.Array = out[0]
    if chosen.splits > 1:
        attended = _combine(out[0], out[1], queries.dtype, interpret=target.interpret)
    return attended.reshape(queries.shape)


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
