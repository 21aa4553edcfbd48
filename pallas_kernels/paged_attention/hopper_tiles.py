"""Tiles of the Hopper kernel: how it cuts a call into work for its warpgroups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.hopper import SHARED_MEMORY
from pallas_kernels.paged_attention.tiles import ProblemSize

VECTORS = 64
"""Query vectors (tokens times heads) of a compute warpgroup: the rows of a wgmma."""


@dataclass(frozen=True)
class HopperTiles:
    """How a call is divided among CTAs.

    Attributes:
        warpgroups: compute warpgroups, 1 or 2, each with 64 query vectors. One more warpgroup only copies.
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


def heads_together(group: int) -> int:
    """Return how many query heads, of the ``group`` of a KV head, one warpgroup serves: with at least 8 tokens each."""
    return next(heads for heads in range(8, 0, -1) if group % heads == 0)


def tokens_together(heads: int) -> int:
    """Return how many query tokens a warpgroup with ``heads`` heads takes: a power of two."""
    return 1 << (VECTORS // heads).bit_length() - 1


def heuristic(problem: ProblemSize) -> HopperTiles:
    """Return two warpgroups over wide tiles of the context, so that softmax overlaps with matrix products."""
    tokens = tokens_together(heads_together(problem.group))
    tile_n = max(64 if problem.head_dim > 128 else 128, problem.block_size)
    return HopperTiles(
        1 if problem.queries <= tokens else 2, tile_n, slots=2 if tile_n * problem.head_dim > 8192 else 4
    )


def candidates(problem: ProblemSize) -> Iterator[HopperTiles]:
    """Yield the tiles that the tuner tries; none for a call that the kernel does not support."""
    if problem.bits or unsupported(problem):
        return
    for tile_n in (64, 128):
        for warpgroups in (1, 2):
            for slots in (2, 3, 4):
                tiles = HopperTiles(warpgroups, tile_n, slots)
                if tile_n % problem.block_size == 0 and tiles.shared_memory(problem.head_dim) <= SHARED_MEMORY:
                    yield tiles


def unsupported(problem: ProblemSize) -> str:
    """Return why the kernel cannot do a call over a plain pool; empty if it can."""
    if problem.queries == 1:
        return "is for prefill: rows of Q=1 are decode"
    if problem.head_dim not in (64, 128, 256):
        return f"needs a head_dim of 64, 128 or 256, have {problem.head_dim}"
    if problem.block_size not in (64, 128) or (problem.head_dim == 256 and problem.block_size == 128):
        return f"needs blocks of 64 tokens, or of 128 below a head_dim of 256, have {problem.block_size}"
    if problem.queries * heads_together(problem.group) < VECTORS // 2:
        return f"fills no wgmma: Q={problem.queries} tokens of {problem.group} heads that share keys"
    return ""
