"""How tokens are shared out to programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.target import Target


@dataclass(frozen=True)
class Tiles:
    """A program has one vector of ``tile_m`` tokens each, a power of two: a query, or a key and a value."""

    tile_m: int
    num_warps: int


def key(tokens: int, kv_heads: int, group: int, head_dim: int, bits: int | None) -> str:
    """What a call is called in the tuning table: T rounded up to a power of two."""
    kv = "float" if bits is None else f"int{bits}"
    return f"t{pl.next_power_of_2(tokens)} k{kv_heads}x{group} h{head_dim} {kv}"


def heuristic(tokens: int, kv_heads: int, group: int, head_dim: int, cores: int) -> Tiles:
    """One token, and 4 elements for each thread; more tokens once every core has eight programs."""
    programs = tokens * kv_heads * (group + 1)
    tile_m = max(1, min(16, int(pl.next_power_of_2(programs // (8 * cores) + 1)) // 2))
    return Tiles(tile_m, max(1, min(8, tile_m * int(pl.next_power_of_2(head_dim)) // 128)))


def candidates(head_dim: int) -> Iterator[Tiles]:
    """What the tuner tries: 2 to 16 elements for a thread."""
    for tile_m, num_warps in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        if 2 <= tile_m * head_dim // (32 * num_warps) <= 16:
            yield Tiles(tile_m, num_warps)


def choose(
    tokens: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    bits: int | None,
    target: Target,
    explicit: Tiles | None = None,
) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    call = key(tokens, kv_heads, group, head_dim, bits)
    guess = heuristic(tokens, kv_heads, group, head_dim, target.cores or 1)
    return tuning.choose("kv_cache_write", target.kind, call, explicit, guess)
