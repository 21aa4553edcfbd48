"""How the two products are cut into pieces for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.lora_matmul.call import LoRAMatmulCall
from pallas_kernels.target import Target

MAX_DECODE = 256
"""T up to which every token is taken to have an adapter of its own; beyond, neighbours share one."""

MAX_TILE_R = 64
"""Ranks that a program holds at once; those of larger adapters are spread over programs, and then walked through."""

MIN_TILE = 16
"""Rows, columns and depth of the smallest product that Triton makes with tensor cores."""

MAX_SPLITS = 16
"""Parts of K at most: the second kernel has to add them up."""

MAX_HELD = 4096
"""Partial sums that a program can hold for each of its warps: it has those of all parts of K at once."""

SMALL_BYTES = 2**23
"""Bytes of partial sums that may be read in any case: they come out of the L2 cache."""


@dataclass(frozen=True)
class Tiles:
    """``tile_m`` tokens for each program of both kernels; ``teams`` of programs share out the adapters among them.

    The first kernel walks K / ``splits`` in steps of ``tile_k``; the second makes ``tile_n`` columns of the result. All
    but ``teams`` and ``num_stages`` are powers of two.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    splits: int
    teams: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProblemSize:
    """T, K, N, R and S of ``lora_matmul``, its dtype, and the number M of modules."""

    tokens: int
    k: int
    n: int
    rank: int
    candidates: int
    dtype: str
    modules: int = 1

    @classmethod
    def of(cls, call: LoRAMatmulCall) -> ProblemSize:
        """Return the sizes of ``call``."""
        (tokens, k), (_, rank, n) = call.x.shape, call.b.shape
        return cls(tokens, k, n, rank, call.candidates.size, call.x.dtype.name, len(call.widths))

    @property
    def key(self) -> str:
        """What it is called in the tuning table: T rounded up to a power of two."""
        sizes = f"k{self.k} n{self.n} r{self.rank}x{self.modules} s{self.candidates}"
        return f"t{pl.next_power_of_2(self.tokens)} {sizes} {jnp.dtype(self.dtype).name}"

    @property
    def decode(self) -> bool:
        """Whether it is limited by reading adapters, rather than tokens and results."""
        return self.tokens <= MAX_DECODE


def tile_r(rank: int) -> int:
    """Ranks in a program's piece, of ``rank`` in all."""
    return _within(rank, MIN_TILE, MAX_TILE_R)


def heuristic(problem: ProblemSize, cores: int) -> Tiles:
    """Up to 64 tokens, 128 of many, so that an adapter is read once or a few times. In decode it has a team.

    In prefill neighbours share adapters: there are a few teams where that makes no more than eight programs a core, for
    tokens of decoding sequences may be among those of prompts. Columns are cut narrower while cores would be without
    work. K is split until each core has two programs or a program one step, four in prefill; at most so often that
    reading the sums, again for each tile of columns, stays small beside tokens and result.
    """
    width = tile_r(problem.modules * problem.rank)
    tile_m = _within(problem.tokens, MIN_TILE, 128 if problem.tokens > 1024 and width < MAX_TILE_R else 64)
    tile_k = _within(problem.k, MIN_TILE, 128)
    rows = pl.cdiv(problem.tokens, tile_m)
    busy = rows * min(problem.tokens, problem.candidates) if problem.decode else rows
    tile_n = next((n for n in (128, 64) if busy * pl.cdiv(problem.n, n) >= 2 * cores), 32)
    columns = pl.cdiv(problem.n, tile_n)
    num_warps = 4 if tile_m * max(tile_n, width) <= 64 * 128 else 8
    splits = min(
        MAX_SPLITS,
        2 * cores // busy,
        problem.k // (tile_k if problem.decode else 4 * tile_k),
        MAX_HELD * num_warps // (tile_m * width),
        max(SMALL_BYTES, 4 * problem.tokens * (problem.k + problem.n)) // (4 * problem.tokens * problem.rank * columns),
    )
    teams = _power_of_two(min(8, problem.candidates, 8 * cores // (rows * columns)))
    if problem.decode:
        teams = problem.candidates if problem.tokens > 1 else 1
    return Tiles(tile_m, tile_k, tile_n, _power_of_two(splits), teams, num_warps, 3)


def candidates(problem: ProblemSize, cores: int) -> Iterator[Tiles]:
    """What the tuner tries: half and twice of what the heuristic says, as far as a program's registers hold it."""
    guess, width = heuristic(problem, cores), tile_r(problem.modules * problem.rank)
    for tile_m, tile_n, splits, num_warps in product(
        _around(guess.tile_m, 16, 128), _around(guess.tile_n, 32, 256), _around(guess.splits, 1, 32), (4, 8)
    ):
        held = tile_m * max(tile_n // 2, splits * width // 4, width)
        if held <= MAX_HELD // 4 * num_warps and (splits - 1) * guess.tile_k < problem.k:
            yield replace(guess, tile_m=tile_m, tile_n=tile_n, splits=splits, num_warps=num_warps)
    if guess.teams > 1:
        yield replace(guess, teams=1)


def _within(size: int, minimum: int, maximum: int) -> int:
    """``size`` as a power of two, rounded up, within bounds."""
    return int(min(maximum, max(minimum, pl.next_power_of_2(size))))


def _power_of_two(maximum: int) -> int:
    """The largest power of two up to ``maximum``; 1 if that is less."""
    return 1 << max(1, maximum).bit_length() - 1


def _around(size: int, minimum: int, maximum: int) -> list[int]:
    """``size``, half and twice of it, within bounds."""
    return [near for near in (size // 2, size, size * 2) if minimum <= near <= maximum]


def choose(problem: ProblemSize, target: Target, explicit: Tiles | None = None) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    return tuning.choose("lora_matmul", target.kind, problem.key, explicit, heuristic(problem, target.cores or 1))
