"""Prefill on Hopper, over plain pools: blocks come straight from the pool by TMA. jax 0.11.2 and newer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import RefusalError
from pallas_kernels.hopper import ATOM, SHARED_MEMORY, need_hopper, need_jax
from pallas_kernels.kv_pool import QuantizedPool
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.paged_attention.hopper_tiles import HopperTiles, candidates, heads_together, heuristic, unsupported
from pallas_kernels.paged_attention.tiles import ProblemSize, Tiles
from pallas_kernels.target import Target, current_target

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.shapes import Shape

TABLE = "paged_attention_hopper"
"""Its tuning table: tiles here are not those of other backends."""


def check_device(target: Target) -> None:
    """Refuse all but Hopper, and a jax without what the kernel is written with."""
    need_hopper(target)


def check(call: PagedAttentionCall) -> None:
    """Refuse decode, pools that are quantised or of another dtype than the queries, and shapes that fill no wgmma."""
    need_jax()
    call.scores.refuse("slopes", "sinks")
    if isinstance(call.pool, QuantizedPool):
        raise RefusalError("needs a plain pool, have a quantised one")
    dtype, kept = call.queries.dtype, call.pool.dtype
    if dtype not in (jnp.bfloat16, jnp.float16) or kept != dtype:
        raise RefusalError(f"needs queries and keys in bfloat16 or both in float16, have {dtype} and {kept}")
    if reason := unsupported(ProblemSize.of(call)):
        raise RefusalError(reason)


def run(call: PagedAttentionCall, tiles: HopperTiles | Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``; refuses other backends' ``tiles``.

    The whole pool must be finite, unused slots included.
    """
    if tiles is not None and not isinstance(tiles, HopperTiles):
        raise RefusalError(f"takes HopperTiles, have {tiles}")
    target, problem = current_target(), ProblemSize.of(call)
    chosen = tuning.choose(TABLE, target.kind, problem.key, tiles, heuristic(problem))
    if chosen.tile_n % problem.block_size or chosen.shared_memory(problem.head_dim) > SHARED_MEMORY:
        raise ValueError(
            f"tiles={chosen} must have a tile_n that is a multiple of block_size={problem.block_size}, and fit into "
            f"{SHARED_MEMORY} bytes of shared memory for head_dim={problem.head_dim}"
        )
    if target.interpret:
        chosen = replace(chosen, through_memory=True)
    from pallas_kernels.paged_attention.hopper_kernel import HopperKernel

    scores, tokens = call.scores, problem.queries
    kernel = HopperKernel(chosen, heads_together(call.group), scores.scale, scores.window, scores.softcap)
    padded = jnp.pad(call.queries, ((0, 0), (0, -tokens % ATOM), (0, 0), (0, 0)))
    return kernel(replace(call, queries=padded), interpret=target.interpret)[:, :tokens]


def candidates_for(shape: Shape) -> Iterator[HopperTiles]:
    """``candidates`` of a shape of the op."""
    return candidates(shape.problem)
