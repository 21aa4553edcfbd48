"""Prefill on Hopper: weights are dequantised into the registers from which wgmma reads them. jax 0.11.2 and newer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.dispatch import RefusalError
from pallas_kernels.hopper import ATOM, SHARED_MEMORY, need_hopper, need_jax
from pallas_kernels.target import Target, current_target
from pallas_kernels.w4a16_matmul.tiles import Tiles, key

if TYPE_CHECKING:
    from pallas_kernels.w4a16_matmul.shapes import Shape

TABLE = "w4a16_matmul_hopper"
"""Its tuning table: tiles here are not those of other backends."""

LEAST_ROWS = 128
"""Fewest rows of activations: with fewer, fetching and dequantising the weights is what takes time."""

WARPGROUPS = 2
"""That compute; one more only copies."""

COLUMNS = 64
"""Columns of the result that a compute warpgroup makes at a time: rows of its wgmmas."""

TILE_N = WARPGROUPS * COLUMNS

_HALVES = {256: 5, 192: 6, 128: 8}
"""Rows of a tile → half chunks of activations that shared memory has room for."""

_CHUNKS = 3

_FIXED = 32
"""What does not shrink with a tile, above all dequantising, in rows that would take as long."""

_CORES = 132
"""Multiprocessors, where the target does not say."""


@dataclass(frozen=True)
class HopperTiles:
    """How a product is cut up.

    Attributes:
        tile_m: rows of the result that a CTA makes at a time, a multiple of 64 up to 256: the N of its wgmmas.
        chunks: of packed weights in flight.
        halves: half chunks of activations in flight, 64 columns each: 2 or more, for one is released when the next is
            in use.
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


def check(target: Target) -> None:
    """Refuse all but Hopper, and a jax without what the kernel is written with."""
    need_hopper(target)


def run(
    x: jax.Array, packed: jax.Array, bias: jax.Array | None, *, tiles: HopperTiles | Tiles | None = None
) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; refuses decode, and other backends' ``tiles``."""
    need_jax()
    (m, k), (_, rows, n), target = x.shape, packed.shape, current_target()
    if m < LEAST_ROWS:
        raise RefusalError(f"is for prefill: M={m} is below {LEAST_ROWS}")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise RefusalError(f"multiplies bfloat16 or float16, have {x.dtype}")
    if tiles is not None and not isinstance(tiles, HopperTiles):
        raise RefusalError(f"takes HopperTiles, have {tiles}")
    call = key(m, k, n, 128 // (rows - 16), x.dtype)
    chosen = tuning.choose(TABLE, target.kind, call, tiles, heuristic(m, n, target))
    if n % (TILE_N * chosen.cluster):
        raise RefusalError(f"needs a multiple of {TILE_N * chosen.cluster} columns, have N={n}")
    if chosen.halves < 2 or chosen.shared_memory(rows) > SHARED_MEMORY:
        raise ValueError(f"tiles={chosen} must have 2 halves or more and fit into {SHARED_MEMORY} bytes; change halves")
    if target.interpret:
        chosen = replace(chosen, through_memory=True)
    from pallas_kernels.w4a16_matmul.hopper_kernel import matmul

    padded = jnp.pad(x, ((0, -m % ATOM), (0, 0)))
    return matmul(padded, packed, bias, chosen, target)[:m]


def heuristic(m: int, n: int, target: Target) -> HopperTiles:
    """The tile whose rounds over all multiprocessors take least. Neighbours share activations where N allows it."""
    cluster = 2 if n % (2 * TILE_N) == 0 else 1
    at_once = (target.cores or _CORES) // cluster

    def time(tile_m: int) -> int:
        rounds = pl.cdiv(pl.cdiv(m, tile_m) * (n // (TILE_N * cluster)), at_once)
        return int(rounds * (tile_m + _FIXED))

    tile_m = min(_HALVES, key=time)
    return HopperTiles(tile_m, _CHUNKS, _HALVES[tile_m], cluster)


def candidates(m: int, n: int) -> Iterator[HopperTiles]:
    """What the tuner tries: nothing for fewer rows than the backend accepts, which are those of the smallest tile."""
    for tile_m, most in _HALVES.items():
        for halves, cluster in product((most - 1, most), (1, 2)):
            if tile_m <= m and n % (TILE_N * cluster) == 0:
                yield HopperTiles(tile_m, _CHUNKS, halves, cluster)


def candidates_for(shape: Shape) -> Iterator[HopperTiles]:
    """``candidates`` of a shape of the op."""
    return candidates(shape.m, shape.n)
