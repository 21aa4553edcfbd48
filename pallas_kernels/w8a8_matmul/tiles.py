"""How a product is cut into pieces for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.target import Target

MAX_DECODE = 64
"""M up to which a call is limited by reading the weight: one row of tiles, K split among programs."""

MIN_TILE_K = 32
"""Values along K of one integer tensor core instruction."""


@dataclass(frozen=True)
class Tiles:
    """A program's piece of the result is ``tile_m`` × ``tile_n``; it walks K / ``splits`` in steps of ``tile_k``."""

    tile_m: int
    tile_n: int
    tile_k: int
    splits: int
    num_warps: int
    num_stages: int


def key(m: int, k: int, n: int, dtype: DTypeLike) -> str:
    """What a call is called in the tuning table: M rounded up to a power of two."""
    return f"m{pl.next_power_of_2(m)} k{k} n{n} {jnp.dtype(dtype).name}"


def heuristic(m: int, k: int, n: int, cores: int) -> Tiles:
    """128 × 128 in prefill, narrower where that leaves cores without work; narrow tiles and split K in decode.

    K is split until each core has three programs, as long as each still makes eight trips and the partial sums, written
    and read, are at most a quarter of the weight's bytes.
    """
    tile_k = largest_divisor(k, 128)
    if m > MAX_DECODE:
        tile_n = 128 if pl.cdiv(m, 128) * pl.cdiv(n, 128) >= cores else 64
        return Tiles(128, tile_n, tile_k, 1, 8, 3)
    tiles = Tiles(max(16, pl.next_power_of_2(m)), 64, tile_k, 1, 4, 4)
    for splits in (2, 4, 8, 16):
        enough = pl.cdiv(n, tiles.tile_n) * tiles.splits >= 3 * cores
        if enough or k % (splits * 8 * tile_k) or splits * m * 8 > k // 4:
            break
        tiles = replace(tiles, splits=splits)
    return tiles


def candidates(m: int, k: int, n: int, cores: int) -> Iterator[Tiles]:
    """What the tuner tries: splits up to twice those of the heuristic."""
    if m > MAX_DECODE:
        for tile_n, tile_k, num_warps, num_stages in product((64, 128, 256), (64, 128), (4, 8), (3, 4)):
            if k % tile_k == 0 and tile_n * 16 <= 512 * num_warps:
                yield Tiles(128, tile_n, tile_k, 1, num_warps, num_stages)
        return
    guess = heuristic(m, k, n, cores)
    factors = [splits for splits in (guess.splits // 2, guess.splits, guess.splits * 2) if splits]
    for tile_n, tile_k, splits, num_stages in product((32, 64, 128), (128, 256), factors, (3, 5)):
        if k % (tile_k * splits) == 0:
            yield Tiles(guess.tile_m, tile_n, tile_k, splits, 4, num_stages)


def choose(m: int, k: int, n: int, dtype: DTypeLike, target: Target, explicit: Tiles | None = None) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    guess = heuristic(m, k, n, target.cores or 1)
    return tuning.choose("w8a8_matmul", target.kind, key(m, k, n, dtype), explicit, guess)


def largest_divisor(size: int, maximum: int) -> int:
    """The largest power of two up to ``maximum``, a power of two, that divides ``size``."""
    return min(maximum, size & -size)
