"""Tiles of the Hopper kernel: how it cuts a product into work for its warpgroups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from jax.experimental import pallas as pl

from pallas_kernels.target import Target

WARPGROUPS = 2
"""Warpgroups that compute; one more only copies."""

COLUMNS = 64
"""Columns of the result that a compute warpgroup makes at a time: rows of its wgmmas."""

TILE_N = WARPGROUPS * COLUMNS

_HALVES = {256: 5, 192: 6, 128: 8}
"""Rows of a tile → half chunks of activations that shared memory has room for."""

_CHUNKS = 3

_FIXED = 32
"""Cost that does not shrink with a tile, above all dequantising, in rows that would take as long."""

_CORES = 132
"""Multiprocessors, where the target does not say."""


@dataclass(frozen=True)
class HopperTiles:
    """How a product is divided among CTAs.

    Attributes:
        tile_m: rows of the result that a CTA makes at a time, a multiple of 64 up to 256: the N of its wgmmas.
        chunks: packed chunks of weights in flight.
        halves: half chunks of activations in flight, 64 columns each. At least 2, since one is released when the next
            is in use.
        cluster: 2 lets two CTAs that need the same activations fetch half of them each; 1 does not.
        through_memory: dequantised weights go through shared memory, as Pallas' interpreter needs it.
    """

    tile_m: int
    chunks: int
    halves: int
    cluster: int = 1
    through_memory: bool = False

    def shared_memory(self, rows: int) -> int:
        """Bytes of shared memory, for packed chunks of ``rows`` rows."""
        packed = 4 * self.chunks * rows * TILE_N
        activations = 2 * 64 * self.halves * self.tile_m
        return packed + activations + 2 * 64 * TILE_N * (4 if self.through_memory else 2)


def heuristic(m: int, n: int, target: Target) -> HopperTiles:
    """Return the tiles with the fewest rounds over all multiprocessors, in clusters if N allows them."""
    cluster = 2 if n % (2 * TILE_N) == 0 else 1
    at_once = (target.cores or _CORES) // cluster

    def time(tile_m: int) -> int:
        rounds = pl.cdiv(pl.cdiv(m, tile_m) * (n // (TILE_N * cluster)), at_once)
        return int(rounds * (tile_m + _FIXED))

    tile_m = min(_HALVES, key=time)
    return HopperTiles(tile_m, _CHUNKS, _HALVES[tile_m], cluster)


def candidates(m: int, n: int) -> Iterator[HopperTiles]:
    """Yield the tiles that the tuner tries; none below the smallest tile, which the backend refuses."""
    for tile_m, max_halves in _HALVES.items():
        for halves, cluster in product((max_halves - 1, max_halves), (1, 2)):
            if tile_m <= m and n % (TILE_N * cluster) == 0:
                yield HopperTiles(tile_m, _CHUNKS, halves, cluster)
