"""How a product is cut up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.layout import CHUNK

MAX_DECODE_ROWS = 64
"""Most rows of activations that one program takes at once; reading the weights is what takes the time until there."""

_CORES = 132
"""Multiprocessors, where the target does not say."""

_RESIDENT = {16: 4, 32: 3, 64: 2, 128: 1}
"""``tile_m`` → programs that the registers of a multiprocessor hold."""


@dataclass(frozen=True)
class Tiles:
    """A program makes ``tile_m`` rows and ``tile_n`` columns of the result out of one of ``split_k`` parts of K.

    ``tile_m`` and ``tile_n`` are powers of two, from 16 on.
    """

    tile_m: int
    tile_n: int
    split_k: int
    num_warps: int
    num_stages: int


def key(m: int, k: int, n: int, group_size: int, dtype: DTypeLike) -> str:
    """What a call is called in the tuning table: M rounded up to a power of two."""
    return f"m{pl.next_power_of_2(m)} k{k} n{n} g{group_size} {jnp.dtype(dtype).name}"


def heuristic(m: int, k: int, n: int, group_size: int, target: Target) -> Tiles:
    """Tiles of 128 columns and all rows, or 128 of many rows; 8 KB of words for each stage in flight.

    K is split until each multiprocessor has the programs that it can hold, as long as a program keeps 4 chunks to
    overlap and the partial sums stay below half of the weights' bytes. Up to 64 rows this depends on M only through
    ``tile_m``, so that a sequence's numbers do not change with the few that it shares a step with.

    Each group of a chunk has an accumulator of its own: small groups need more threads to hold them, and on Blackwell,
    where they lie in tensor memory, fewer rows.
    """
    blackwell = target.capability is not None and target.capability[0] == 10
    tile_m = min(64 if blackwell and group_size == 32 else 128, max(16, pl.next_power_of_2(m)))
    tile_n = min(128, n & -n)
    rows = pl.cdiv(m, tile_m) * tile_m
    programs = rows // tile_m * (n // tile_n)
    wanted = _RESIDENT[tile_m] * (target.cores or _CORES) // programs
    split_k = max(1, min(wanted, k // (4 * CHUNK), k // (16 * rows)))
    crowded = tile_m == 128 or (tile_m == 64 and group_size < 128)
    return Tiles(tile_m, tile_n, split_k, num_warps=8 if crowded else 4, num_stages=3 if tile_m == 128 else 4)


def candidates(m: int, k: int, n: int) -> Iterator[Tiles]:
    """What the tuner tries: for few rows, as many programs as can matter."""
    if m > MAX_DECODE_ROWS:
        sizes = [(64, 128, 4), (128, 64, 4), (128, 128, 8), (256, 128, 8), (128, 256, 8)]
        splits, stages = ([1, 2] if m <= 512 else [1]), [2, 3, 4]
    else:
        tile_m = max(16, pl.next_power_of_2(m))
        sizes = [(tile_m, 64, 4), (tile_m, 128, 4), (tile_m, 128, 8) if tile_m == 64 else (tile_m, 256, 4)]
        splits, stages = [1, 2, 3, 4, 6, 8, 12, 16, 20], [3, 4]
    for (tile_m, tile_n, num_warps), split_k, num_stages in itertools.product(sizes, splits, stages):
        matters = m > MAX_DECODE_ROWS or _CORES // 2 <= n // tile_n * split_k <= 6 * _CORES
        if matters and n % tile_n == 0 and 2 * split_k <= k // CHUNK:
            yield Tiles(tile_m, tile_n, split_k, num_warps, num_stages)


def choose(
    m: int, k: int, n: int, group_size: int, dtype: DTypeLike, target: Target, explicit: Tiles | None = None
) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    call = key(m, k, n, group_size, dtype)
    return tuning.choose("w4a16_matmul", target.kind, call, explicit, heuristic(m, k, n, group_size, target))
