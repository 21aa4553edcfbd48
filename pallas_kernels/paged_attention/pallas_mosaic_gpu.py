"""Prefill on Hopper, over plain pools: blocks come straight from the pool by TMA. jax 0.11.2 and newer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import RefusalError
from pallas_kernels.hopper import ATOM, SHARED_MEMORY, need_hopper, need_jax
from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.paged_attention.tiles import Call, Tiles
from pallas_kernels.target import Target, current_target

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.shapes import Shape

TABLE = "paged_attention_hopper"
"""Its tuning table: tiles here are not those of other backends."""

VECTORS = 64
"""Query vectors, tokens times heads, of a compute warpgroup: rows of a wgmma."""


@dataclass(frozen=True)
class HopperTiles:
    """How a call is cut up.

    Attributes:
        warpgroups: that compute, 1 or 2, each 64 query vectors; one more only copies.
        tile_n: tokens of the context that are visited at a time, a multiple of the block size; 64 or 128.
        slots: tiles of keys, and of values, in flight.
        through_memory: softmax weights go through shared memory, as Pallas' interpreter needs it.
    """

    warpgroups: int
    tile_n: int
    slots: int
    through_memory: bool = False

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory for 16-bit elements."""
        weights = self.warpgroups * VECTORS * self.tile_n if self.through_memory else 0
        return 2 * (self.warpgroups * VECTORS * head_dim + 2 * self.slots * self.tile_n * head_dim + weights)


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
    if reason := _refusal(call):
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


def heads_together(group: int) -> int:
    """Query heads, of the ``group`` of a KV head, that a warpgroup serves: with 8 tokens or more of each."""
    return next(heads for heads in range(8, 0, -1) if group % heads == 0)


def tokens_together(heads: int) -> int:
    """Query tokens of a warpgroup that serves ``heads`` heads: a power of two."""
    return 1 << (VECTORS // heads).bit_length() - 1


def heuristic(call: Call) -> HopperTiles:
    """Two warpgroups, so that one's softmax hides behind the other's products, over wide tiles of the context."""
    tokens = tokens_together(heads_together(call.group))
    tile_n = max(64 if call.head_dim > 128 else 128, call.block_size)
    return HopperTiles(1 if call.queries <= tokens else 2, tile_n, slots=2 if tile_n * call.head_dim > 8192 else 4)


def candidates(call: Call) -> Iterator[HopperTiles]:
    """What the tuner tries: nothing for a call that is refused."""
    if call.bits or _refusal(call):
        return
    for tile_n in (64, 128):
        for warpgroups in (1, 2):
            for slots in (2, 3, 4):
                tiles = HopperTiles(warpgroups, tile_n, slots)
                if tile_n % call.block_size == 0 and tiles.shared_memory(call.head_dim) <= SHARED_MEMORY:
                    yield tiles


def candidates_for(shape: Shape) -> Iterator[HopperTiles]:
    """``candidates`` of a shape of the op."""
    return candidates(shape.call)


def _refusal(call: Call) -> str:
    """Why a call over a plain pool cannot be done; empty where it can."""
    if call.queries == 1:
        return "is for prefill: rows of Q=1 are decode"
    if call.head_dim not in (64, 128, 256):
        return f"needs a head_dim of 64, 128 or 256, have {call.head_dim}"
    if call.block_size not in (64, 128) or (call.head_dim == 256 and call.block_size == 128):
        return f"needs blocks of 64 tokens, or of 128 below a head_dim of 256, have {call.block_size}"
    if call.queries * heads_together(call.group) < VECTORS // 2:
        return f"fills no wgmma: Q={call.queries} tokens of {call.group} heads that share keys"
    return ""
