"""How the two products are cut into pieces for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.target import Target

LARGEST_DECODE = 256
"""T up to which every token is taken to have an adapter of its own; beyond, neighbours share one."""

LARGEST_TILE_R = 64
"""Ranks that a program holds at once; those of larger adapters are spread over programs, and then walked through."""

SMALLEST_TILE = 16
"""Rows, columns and depth of the smallest product that Triton makes with tensor cores."""


@dataclass(frozen=True)
class Tiles:
    """``tile_m`` tokens for each program of both kernels.

    The first walks K / ``splits`` in steps of ``tile_k``; the second makes ``tile_n`` columns of the result.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Call:
    """T, K, N, R and S of ``lora_matmul``, and its dtype."""

    tokens: int
    k: int
    n: int
    rank: int
    candidates: int
    dtype: str

    @classmethod
    def of(cls, x: jax.Array, b: jax.Array, candidates: jax.Array) -> Call:
        """The call that these arguments make."""
        return cls(*x.shape, b.shape[2], b.shape[1], candidates.size, x.dtype.name)

    @property
    def key(self) -> str:
        """What it is called in the tuning table: T rounded up to a power of two."""
        sizes = f"k{self.k} n{self.n} r{self.rank} s{self.candidates}"
        return f"t{pl.next_power_of_2(self.tokens)} {sizes} {jnp.dtype(self.dtype).name}"

    @property
    def decode(self) -> bool:
        """Whether it is limited by reading adapters, rather than tokens and results."""
        return self.tokens <= LARGEST_DECODE

    @property
    def busy(self) -> int:
        """Adapters that a tile of tokens is expected to use."""
        return min(self.tokens, self.candidates) if self.decode else 1


def tile_r(rank: int) -> int:
    """Ranks in a program's piece, of an R of ``rank``."""
    return int(min(LARGEST_TILE_R, max(SMALLEST_TILE, pl.next_power_of_2(rank))))


def heuristic(call: Call, cores: int) -> Tiles:
    """Up to 64 tokens in decode, so that an adapter is read once or a few times; 128 in prefill, for the same of tokens.

    K is split until each core has two programs, or its pieces come down to one step, four in prefill. Columns are
    narrow while cores would be without work.
    """
    tile_k = min(128, max(SMALLEST_TILE, pl.next_power_of_2(call.k)))
    if call.decode:
        tile_m, least, most = min(64, max(SMALLEST_TILE, pl.next_power_of_2(call.tokens))), 1, 16
    else:
        tile_m, least, most = 128, 4, 8
    programs = pl.cdiv(call.tokens, tile_m) * call.busy
    splits = 1
    while splits < most and programs * splits < 2 * cores and call.k >= 2 * splits * least * tile_k:
        splits *= 2
    widest = 64 if call.decode else 128
    tile_n = next((n for n in (128, 64, 32) if n <= widest and programs * pl.cdiv(call.n, n) >= cores), 32)
    num_warps = 4 if tile_m * max(tile_n, tile_r(call.rank)) <= 64 * 64 else 8
    return Tiles(tile_m, tile_k, tile_n, splits, num_warps, 3)


def candidates(call: Call, cores: int) -> Iterator[Tiles]:
    """What the tuner tries: half and twice of what the heuristic says, K that is split into no more than its steps."""
    guess = heuristic(call, cores)
    sizes_m = {size for size in (guess.tile_m // 2, guess.tile_m, guess.tile_m * 2) if 16 <= size <= 128}
    splits = {count for count in (guess.splits // 2, guess.splits, guess.splits * 2) if count}
    for tile_m, tile_n, count, num_warps in product(
        sorted(sizes_m), (guess.tile_n, guess.tile_n * 2), sorted(splits), (guess.num_warps // 2, guess.num_warps)
    ):
        if tile_m * tile_n <= 2048 * num_warps and count * guess.tile_k <= max(call.k, guess.tile_k):
            yield replace(guess, tile_m=tile_m, tile_n=tile_n, splits=count, num_warps=num_warps)


def choose(call: Call, target: Target, explicit: Tiles | None = None) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    return tuning.choose("lora_matmul", target.kind, call.key, explicit, heuristic(call, target.cores or 1))
