"""Prefill on Hopper: weights are dequantised into the registers from which wgmma reads them. jax 0.11.2 and newer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import RefusalError
from pallas_kernels.hopper import ATOM, SHARED_MEMORY, need_hopper, need_jax
from pallas_kernels.target import Target, current_target
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall
from pallas_kernels.w4a16_matmul.hopper_tiles import TILE_N, HopperTiles, candidates, heuristic
from pallas_kernels.w4a16_matmul.layout import group_size
from pallas_kernels.w4a16_matmul.tiles import Tiles, key

if TYPE_CHECKING:
    from pallas_kernels.w4a16_matmul.shapes import Shape

TABLE = "w4a16_matmul_hopper"
"""Its tuning table: tiles here are not those of other backends."""

MIN_ROWS = 128
"""Fewest rows of activations: with fewer, fetching and dequantising the weights is what takes time."""


def check_device(target: Target) -> None:
    """Refuse all but Hopper, and a jax without what the kernel is written with."""
    need_hopper(target)


def check(call: W4A16MatmulCall) -> None:
    """Refuse decode, and float32."""
    need_jax()
    if call.x.shape[0] < MIN_ROWS:
        raise RefusalError(f"is for prefill: M={call.x.shape[0]} is below {MIN_ROWS}")
    if call.x.dtype not in (jnp.bfloat16, jnp.float16):
        raise RefusalError(f"multiplies bfloat16 or float16, have {call.x.dtype}")


def run(call: W4A16MatmulCall, tiles: HopperTiles | Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; refuses N that the tiles do not divide, and other ``tiles``."""
    if tiles is not None and not isinstance(tiles, HopperTiles):
        raise RefusalError(f"takes HopperTiles, have {tiles}")
    (m, k), (_, rows, n), target = call.x.shape, call.packed.shape, current_target()
    chosen = tuning.choose(
        TABLE,
        target.kind,
        key(m, k, n, group_size(call.packed.shape), call.x.dtype),
        tiles,
        heuristic(m, n, target),
    )
    if n % (TILE_N * chosen.cluster):
        raise RefusalError(f"needs a multiple of {TILE_N * chosen.cluster} columns, have N={n}")
    if chosen.halves < 2 or chosen.shared_memory(rows) > SHARED_MEMORY:
        raise ValueError(f"tiles={chosen} must have 2 halves or more and fit into {SHARED_MEMORY} bytes; change halves")
    if target.interpret:
        chosen = replace(chosen, through_memory=True)
    from pallas_kernels.w4a16_matmul.hopper_kernel import matmul

    return matmul(replace(call, x=jnp.pad(call.x, ((0, -m % ATOM), (0, 0)))), chosen, target)[:m]


def candidates_for(shape: Shape) -> Iterator[HopperTiles]:
    """``candidates`` of a shape of the op."""
    return candidates(shape.m, shape.n)
