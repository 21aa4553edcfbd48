"""How a call is cut into pieces for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.kv_pool import block_size, pool_bits
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.paged_attention.words import Words
from pallas_kernels.target import Target

_MIN_TILES = 4
"""Tiles of a full block table that a split has; below that, combining costs more than it gains."""


_MAX_SPLITS = 128
"""That one program combines: each is a row of its matrix."""


@dataclass(frozen=True)
class Tiles:
    """A program has up to ``tile_m`` rows, query tokens times heads; ``splits`` programs share a context.

    They visit ``tile_n`` tokens of it at a time.
    """

    tile_m: int
    tile_n: int
    splits: int
    num_warps: int
    num_stages: int

    def tokens(self, group: int) -> int:
        """Query tokens of a program, with ``group`` query heads to a KV head."""
        return max(1, self.tile_m // int(pl.next_power_of_2(group)))


@dataclass(frozen=True)
class ProblemSize:
    """The sizes that tiles depend on.

    Attributes:
        rows: R.
        queries: Q.
        kv_heads: K.
        group: query heads of a KV head.
        head_dim: H.
        block_size: S.
        context: tokens that a block table has room for.
        bits: bits of an element of a quantised pool, ``None`` for floats.
    """

    rows: int
    queries: int
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    context: int
    bits: int | None

    @classmethod
    def of(cls, call: PagedAttentionCall) -> ProblemSize:
        """Return the sizes of ``call``."""
        rows, queries, _, size = call.queries.shape
        tokens = block_size(call.pool)
        context = call.block_tables.shape[1] * tokens
        bits = pool_bits(call.pool, size)
        return cls(rows, queries, call.kv_heads, call.group, size, tokens, context, bits)

    @property
    def key(self) -> str:
        """Its name in the tuning table: rows, queries and context rounded up to powers of two."""
        rows, queries, context = (pl.next_power_of_2(n) for n in (self.rows, self.queries, self.context))
        kv = "float" if self.bits is None else f"int{self.bits}"
        return f"r{rows} q{queries} k{self.kv_heads}x{self.group} h{self.head_dim} s{self.block_size} c{context} {kv}"

    @property
    def matrix_rows(self) -> int:
        """Rows that all query tokens of a KV head would fill, as a power of two."""
        return int(pl.next_power_of_2(self.queries) * pl.next_power_of_2(self.group))


def heuristic(problem: ProblemSize, cores: int) -> Tiles:
    """What is taken where nothing was measured.

    As many rows as there are or as a program's registers hold, so that keys and values are read seldom. The context is
    split until each core has about one program; or three, where they are so small that they hide one another's waits.
    """
    wide, words = problem.head_dim > 128, Words(problem.bits, problem.head_dim)
    tile_m = max(16, min((32 if problem.bits else 64) if wide else 128, problem.matrix_rows))
    lined_up = tile_m >= words.padded  # Then the compiler puts all warps along the rows, 16 rows to each.
    crowded = problem.bits is not None and tile_m > 16 and (words.padded > words.count or (lined_up and tile_m < 64))
    tile_n = 32 if wide or crowded else 64
    num_warps = 8 if tile_m == 128 or (wide and tile_m == 64) else 4
    if lined_up:
        num_warps = min(num_warps, tile_m // 16)
    tiles = Tiles(tile_m, tile_n, 1, num_warps, 3)
    programs = problem.rows * problem.kv_heads * pl.cdiv(problem.queries, tiles.tokens(problem.group))
    wanted = (3 if tile_m == 16 else 1) * cores // programs
    max_splits = min(_MAX_SPLITS, problem.context // (tile_n * _MIN_TILES))
    return replace(tiles, splits=int(pl.next_power_of_2(max(1, min(wanted, max_splits)))))


def candidates(problem: ProblemSize) -> Iterator[Tiles]:
    """What the tuner tries: no more than fits the registers of a thread, or fills a large GPU ten times over."""
    programs = problem.rows * problem.kv_heads
    if problem.matrix_rows <= 16:
        splits = [1 << n for n in range(8) if programs << n <= 2048 and problem.context >= 64 << n]
        for tile_n, split, num_warps, num_stages in product((32, 64, 128), splits or [1], (1, 2, 4), (2, 3, 4)):
            if 16 * num_warps <= tile_n and tile_n * problem.head_dim <= 4096 * num_warps:
                yield Tiles(16, tile_n, split, num_warps, num_stages)
        return
    split = heuristic(problem, 132).splits
    for tile_m, tile_n, num_warps, num_stages in product((32, 64, 128), (32, 64, 128), (2, 4, 8), (2, 3)):
        if tile_m <= problem.matrix_rows and tile_m * max(tile_n, problem.head_dim) <= 2048 * num_warps:
            yield Tiles(tile_m, tile_n, split, num_warps, num_stages)


def choose(problem: ProblemSize, target: Target, explicit: Tiles | None = None) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    return tuning.choose("paged_attention", target.kind, problem.key, explicit, heuristic(problem, target.cores or 1))
