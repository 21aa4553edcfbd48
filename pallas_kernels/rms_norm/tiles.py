"""How tokens are shared out to programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.target import Target


@dataclass(frozen=True)
class Tiles:
    """``tile_m`` tokens, a power of two, for each program of ``num_warps`` warps."""

    tile_m: int
    num_warps: int


def key(tokens: int, width: int, dtype: DTypeLike, residual: bool) -> str:
    """What a call is called in the tuning table: T rounded up to a power of two."""
    added = " residual" if residual else ""
    return f"t{pl.next_power_of_2(tokens)} d{width} {jnp.dtype(dtype).name}{added}"


def heuristic(width: int) -> Tiles:
    """One token for each program; several only where a token is too small to keep a few warps busy.

    16 elements of a thread are two 16-byte loads of 2-byte floats.
    """
    padded = pl.next_power_of_2(width)
    tile_m = max(1, 1024 // padded)
    return Tiles(tile_m, min(16, max(1, tile_m * padded // (32 * 16))))


def candidates(width: int) -> Iterator[Tiles]:
    """What the tuner tries: 4 to 64 elements for a thread."""
    padded = pl.next_power_of_2(width)
    for tile_m in (1, 2, 4, 8):
        for num_warps in (1, 2, 4, 8, 16, 32):
            if 4 <= tile_m * padded // (32 * num_warps) <= 64:
                yield Tiles(tile_m, num_warps)


def choose(
    tokens: int, width: int, dtype: DTypeLike, residual: bool, target: Target, explicit: Tiles | None = None
) -> Tiles:
    """The tiles of a call on ``target``: ``explicit``, else measured, else the heuristic's."""
    call = key(tokens, width, dtype, residual)
    return tuning.choose("rms_norm", target.kind, call, explicit, heuristic(width))
