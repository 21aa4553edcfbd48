"""How the two products are cut into pieces for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.target import Target

LARGEST_DECODE = 256
"""T up to which every token is taken to have an adapter of its own; beyond, neighbours share one."""

LARGEST_TILE_R = 64
"""Ranks that a program holds at once; those of larger adapters are spread over programs, and then walked through."""

SMALLEST_TILE = 16
"""Rows, columns and depth of the smallest product that Triton makes with tensor cores."""

MOST_SPLITS = 16
MOST_HELD = 4096
"""Partial sums that a program can hold for each of its warps: it has those of all parts of K at once."""

SMALL_BYTES = 2**23
"""Partial sums whose reading takes no time to speak of: they come out of the L2 cache."""


@dataclass(frozen=True)
class Tiles:
    """``tile_m`` tokens for each program of both kernels; ``teams`` of programs share out the adapters among them.

    The first kernel walks K / ``splits`` in steps of ``tile_k``; the second makes ``tile_n`` columns of the result.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    splits: int
    teams: int
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
        return cls(x.shape[0], x.shape[1], b.shape[2], b.shape[1], candidates.size, x.dtype.name)

    @property
    def key(self) -> str:
        """What it is called in the tuning table: T rounded up to a power of two."""
        sizes = f"k{self.k} n{self.n} r{self.rank} s{self.candidates}"
        return f"t{pl.next_power_of_2(self.tokens)} {sizes} {jnp.dtype(self.dtype).name}"

    @property
    def decode(self) -> bool:
        """Whether it is limited by reading adapters, rather than tokens and results."""
        return self.tokens <= LARGEST_DECODE


def tile_r(rank: int) -> int:
    """Ranks in a program's piece, of an R of ``rank``."""
    return int(min(LARGEST_TILE_R, max(SMALLEST_TILE, pl.next_power_of_2(rank))))


def heuristic(call: Call, cores: int) -> Tiles:
    """In decode a team for each candidate, and up to 64 tokens, so that an adapter is read once or a few times.

    In prefill, where neighbours share adapters, up to 128 tokens, and a few teams where that makes no more than eight
    programs a core: tokens of decoding sequences may be among them. Columns are cut narrower while cores would be
    without work. K is split until each core has two programs, or its pieces come down to one step, four in prefill; at
    most so often that reading the sums, again for each tile of columns, stays small beside tokens and result.
    """
    tile_k = min(128, max(SMALLEST_TILE, pl.next_power_of_2(call.k)))
    widest = 64 if call.decode or tile_r(call.rank) > 32 else 128
    tile_m = min(widest, max(SMALLEST_TILE, pl.next_power_of_2(call.tokens)))
    rows = pl.cdiv(call.tokens, tile_m)
    busy = rows * min(call.tokens, call.candidates) if call.decode else rows
    tile_n = next((n for n in (128, 64) if busy * pl.cdiv(call.n, n) >= 2 * cores), 32)
    sums = 4 * call.tokens * call.rank * pl.cdiv(call.n, tile_n)
    allowed = max(SMALL_BYTES, 4 * call.tokens * (call.k + call.n))
    least, splits = (1, 1) if call.decode else (4, 1)
    num_warps = 4 if tile_m * max(tile_n, tile_r(call.rank)) <= 64 * 128 else 8
    held = MOST_HELD * num_warps // (tile_m * tile_r(call.rank))
    while (
        busy * splits < 2 * cores
        and call.k >= 2 * splits * least * tile_k
        and 2 * splits * sums <= allowed
        and 2 * splits <= min(MOST_SPLITS, held)
    ):
        splits *= 2
    programs = rows * pl.cdiv(call.n, tile_n)
    teams = call.candidates if 1 < call.tokens <= LARGEST_DECODE else 1
    while not call.decode and 2 * teams <= min(call.candidates, 8) and 2 * teams * programs <= 8 * cores:
        teams *= 2
    return Tiles(tile_m, tile_k, tile_n, splits, teams, num_warps, 3)


def candidates(call: Call, cores: int) -> Iterator[Tiles]:
    """What the tuner tries: half and twice of what the heuristic says, as far as a program's registers hold it."""
    guess = heuristic(call, cores)
    for tile_m, tile_n, splits, num_warps in product(
        _around(guess.tile_m, 16, 128), _around(guess.tile_n, 32, 256), _around(guess.splits, 1, 32), (4, 8)
    ):
        if (
            tile_m * max(tile_n, tile_r(call.rank)) <= 2048 * num_warps
            and splits * guess.tile_k < call.k + guess.tile_k
        ):
            yield replace(guess, tile_m=tile_m, tile_n=tile_n, splits=splits, num_warps=num_warps)
    if guess.teams > 1:
        yield replace(guess, teams=1)


def _around(size: int, least: int, most: int) -> list[int]:
    """``size``, half and twice of it, within bounds."""
    return [near for near in (size // 2, size, size * 2) if least <= near <= most]


def choose(call: Call, target: Target, explicit: Tiles | None = None) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    return tuning.choose("lora_matmul", target.kind, call.key, explicit, heuristic(call, target.cores or 1))
