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
from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.paged_attention.hopper_tiles import HopperTiles, candidates, heads_together, heuristic, unsupported
from pallas_kernels.paged_attention.tiles import Call, Tiles
from pallas_kernels.target import Target, current_target

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.shapes import Shape

TABLE = "paged_attention_hopper"
"""Its tuning table: tiles here are not those of other backends."""


def check(target: Target) -> None:
    """Refuse all but Hopper, and a jax without what the kernel is written with."""
    need_hopper(target)


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
    tiles: HopperTiles | Tiles | None = None,
) -> jax.Array:
    """See ``pallas_kernels.paged_attention.paged_attention``; the whole pool must be finite, also where no token is.

    Refuses decode, pools that are quantised or of another dtype than ``q``, shapes that fill no wgmma, and other
    backends' ``tiles``.
    """
    need_jax()
    target = current_target()
    if isinstance(pool, QuantizedPool):
        raise RefusalError("needs a plain pool, have a quantised one")
    if tiles is not None and not isinstance(tiles, HopperTiles):
        raise RefusalError(f"takes HopperTiles, have {tiles}")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or pool.dtype != q.dtype:
        raise RefusalError(f"needs queries and keys in bfloat16 or both in float16, have {q.dtype} and {pool.dtype}")
    call = Call.of(q, pool, block_tables)
    if reason := unsupported(call):
        raise RefusalError(reason)
    chosen = tuning.choose(TABLE, target.kind, call.key, tiles, heuristic(call))
    if chosen.tile_n % call.block_size or chosen.shared_memory(call.head_dim) > SHARED_MEMORY:
        raise ValueError(
            f"tiles={chosen} must have a tile_n that is a multiple of block_size={call.block_size}, and fit into "
            f"{SHARED_MEMORY} bytes of shared memory for head_dim={call.head_dim}"
        )
    if target.interpret:
        chosen = replace(chosen, through_memory=True)
    from pallas_kernels.paged_attention.hopper_kernel import HopperKernel

    kernel = HopperKernel(chosen, heads_together(call.group), scale, window, softcap)
    queries = q.shape[1]
    padded = jnp.pad(q, ((0, 0), (0, -queries % ATOM), (0, 0), (0, 0)))
    return kernel(padded, pool, block_tables, first_positions, lengths, interpret=target.interpret)[:, :queries]


def candidates_for(shape: Shape) -> Iterator[HopperTiles]:
    """``candidates`` of a shape of the op."""
    return candidates(shape.call)
