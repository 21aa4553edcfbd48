"""How the kernels of a layer are cut up: the parameters, what a call is keyed by, and where to start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pallas_kernels import tuning
from pallas_kernels.decode_layer.call import DecodeLayerCall
from pallas_kernels.decode_layer.weights import weight_shape
from pallas_kernels.kv_pool import block_size, pool_bits
from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.layout import CHUNK, is_packed

_CORES = 132
"""Of a device that does not say."""
_PROGRAMS_PER_CORE, _ATTENTION_PER_CORE = 3, 2
_MAX_SPLITS = 8


@dataclass(frozen=True)
class Tiles:
    """Columns of a program, and splits of the sum, for each of the four products; splits of the context for attention.

    ``gate_up`` is not split: its activation needs the whole sum. ``attend_tokens`` are read at a time. Any number of
    splits is correct; those that do not divide the 128-row chunks of the weight leave the last program with less to do.
    """

    qkv_columns: int
    qkv_splits: int
    attend_splits: int
    attend_tokens: int
    out_columns: int
    out_splits: int
    gate_up_columns: int
    down_columns: int
    down_splits: int
    linear_warps: int = 4
    linear_stages: int = 4
    attend_warps: int = 4
    attend_stages: int = 3
    norm_warps: int = 8


@dataclass(frozen=True)
class ProblemSize:
    """What the tiles depend on. Widths are the device's own; ``weight_bits`` 16 or 4, ``kv_bits`` 16, 8 or 4."""

    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    block_size: int
    context: int
    weight_bits: int
    kv_bits: int
    parallel: bool

    @classmethod
    def of(cls, call: DecodeLayerCall) -> ProblemSize:
        """Return the sizes of ``call``."""
        heads = call.heads
        tokens, entries = call.block_tables.shape
        return cls(
            tokens=tokens,
            hidden=call.x.shape[1],
            heads=heads.queries,
            kv_heads=heads.kv,
            head_dim=heads.size,
            mlp=weight_shape(call.weights.down)[0],
            block_size=block_size(call.pool),
            context=entries,
            weight_bits=4 if is_packed(call.weights.wqkv) else 16,
            kv_bits=pool_bits(call.pool, heads.size) or 16,
            parallel=call.axis_name is not None,
        )

    @property
    def qkv(self) -> int:
        """Columns of the QKV projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def key(self) -> str:
        """The name of this call in the table of measured tiles; B is rounded up to a power of two."""
        batch = 1 << max(0, self.tokens - 1).bit_length()
        return (
            f"b{batch} d{self.hidden} n{self.heads} k{self.kv_heads} h{self.head_dim} f{self.mlp} s{self.block_size} "
            f"m{self.context} w{self.weight_bits} kv{self.kv_bits}" + (" parallel" if self.parallel else "")
        )


def choose(target: Target, problem: ProblemSize, explicit: Tiles | None) -> Tiles:
    """The tiles of a call: explicit, measured, or the heuristic's."""
    return tuning.choose("decode_layer", target.kind, problem.key, explicit, heuristic(target, problem))


def heuristic(target: Target, problem: ProblemSize) -> Tiles:
    """Enough programs to keep memory busy, and no more parts to add up than that takes.

    A product takes the widest columns that divide the weight's (up to 128, or 64 of plain weights, which are four times
    the bytes), and splits its sum until there are about three programs a core, eight splits at most. Where devices add
    up their products right away there are no splits, and narrow columns give the programs. Attention has two programs a
    core, but no split of less than 256 tokens, nor, where the whole table has no more than 8192, more splits than the
    output projection combines on its way.
    """
    cores = target.cores or _CORES
    plain = problem.weight_bits == 16
    widest = 64 if plain else 128
    narrow = 32 if problem.parallel else widest
    qkv, out = _widest(problem.qkv, widest), _widest(problem.hidden, narrow)
    gate_up = _widest(problem.mlp, 64 if problem.mlp >= 64 * cores else 32)
    context = problem.context * problem.block_size
    wanted = -(-_ATTENTION_PER_CORE * cores // (problem.tokens * problem.kv_heads))
    return Tiles(
        qkv_columns=qkv,
        qkv_splits=_splits(problem.hidden, problem.qkv // qkv, cores),
        attend_splits=max(1, min(wanted, context // 256, 8 if context <= 8192 else 32)),
        attend_tokens=64,
        out_columns=out,
        out_splits=1 if problem.parallel else _splits(problem.heads * problem.head_dim, problem.hidden // out, cores),
        gate_up_columns=gate_up,
        down_columns=out,
        down_splits=1 if problem.parallel else _splits(problem.mlp, problem.hidden // out, cores),
        linear_stages=3 if plain else 4,
    )


def candidates(target: Target, problem: ProblemSize) -> Iterator[Tiles]:
    """The heuristic's tiles and its neighbours, one parameter changed at a time."""
    start = heuristic(target, problem)
    yield start
    choices = {
        "qkv_columns": (64, 128),
        "qkv_splits": (1, 2, 4, 8),
        "attend_splits": (1, 2, 4, 8, 16, 32),
        "attend_tokens": (32, 64, 128),
        "out_columns": (32, 64, 128),
        "out_splits": (1, 2, 4, 8, 16),
        "gate_up_columns": (32, 64, 128),
        "down_columns": (32, 64, 128),
        "down_splits": (1, 2, 4, 8, 16),
        "linear_warps": (4, 8),
        "linear_stages": (3, 4, 5),
        "attend_warps": (2, 4),
        "attend_stages": (2, 3, 4),
        "norm_warps": (4, 8, 16),
    }
    for field, values in choices.items():
        for value in values:
            tiles = replace(start, **{field: value})
            if value != getattr(start, field) and fits(tiles, problem):
                yield tiles


def fits(tiles: Tiles, problem: ProblemSize) -> bool:
    """Whether ``tiles`` divide the call's columns and blocks."""
    columns = (
        (problem.qkv, tiles.qkv_columns),
        (problem.hidden, tiles.out_columns),
        (problem.mlp, tiles.gate_up_columns),
        (problem.hidden, tiles.down_columns),
    )
    blocks = (problem.block_size % tiles.attend_tokens, tiles.attend_tokens % problem.block_size)
    return all(whole % part == 0 for whole, part in columns) and 0 in blocks


def _widest(columns: int, limit: int) -> int:
    """The widest tile up to ``limit`` that divides ``columns``."""
    return next(tile for tile in (128, 64, 32, 16) if tile <= limit and columns % tile == 0)


def _splits(rows: int, programs: int, cores: int) -> int:
    """As many as make ``programs`` enough; none of them without a chunk of the weight's ``rows``."""
    chunks = rows // CHUNK
    wanted = max(1, min(_MAX_SPLITS, _PROGRAMS_PER_CORE * cores // programs))
    per_split = -(-chunks // wanted)
    return -(-chunks // per_split)
