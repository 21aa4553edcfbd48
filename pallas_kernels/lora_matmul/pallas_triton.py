"""Two kernels: one multiplies tokens down to ranks, the other from there up to the result. sm_80 and newer.

A program has a tile of tokens and one candidate. It looks which of the tokens are the candidate's and returns if none
is; otherwise it reads the rows of those tokens, and writes their rows. As a token has one adapter, no two programs write
the same row: neither sums nor atomics bring the candidates together, and adapters are read side by side. Where K is
split, the first kernel leaves float32 sums of each part, which the second adds up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.lora_matmul.tiles import Call, Tiles, choose, tile_r
from pallas_kernels.target import Target, current_target

RANK_BLOCK = 16
"""Ranks that are read or skipped together: a mask that is the same for 16 neighbours leaves wide loads whole."""


def check(target: Target) -> None:
    """Refuse what is no GPU of sm_80 or newer."""
    need_gpu(target)


def run(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    adapter: jax.Array,
    candidates: jax.Array,
    ranks: jax.Array,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See ``pallas_kernels.lora_matmul.lora_matmul``; refuses an R that is not a multiple of ``RANK_BLOCK``.

    Between the products a token is rounded to the dtype of ``x``, which tensor cores take.
    """
    (tokens, _), rank, n = x.shape, a.shape[2], b.shape[2]
    if rank % RANK_BLOCK or not rank:
        raise RefusalError(f"needs R in steps of {RANK_BLOCK}, have R={rank}; pad a and b with zeros")
    target = current_target()
    chosen = choose(Call.of(x, b, candidates), target, tiles)
    rows, slots = pl.cdiv(tokens, chosen.tile_m), candidates.size
    launch = partial(
        pl.pallas_call,
        compiler_params=plt.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages),
        interpret=target.interpret,
    )
    down = launch(
        partial(_shrink_kernel, tiles=chosen),
        grid=(chosen.splits * pl.cdiv(rank, tile_r(rank)), rows, slots),
        out_shape=jax.ShapeDtypeStruct((chosen.splits, tokens, rank), jnp.float32),
        name="lora_matmul_shrink",
    )(x, a, adapter, candidates, ranks)
    out: jax.Array = launch(
        partial(_expand_kernel, tiles=chosen),
        grid=(pl.cdiv(n, chosen.tile_n), rows, slots),
        out_shape=jax.ShapeDtypeStruct((tokens, n), x.dtype),
        name="lora_matmul_expand",
    )(down, b, adapter, candidates, ranks)
    return out


def _shrink_kernel(
    x_ref: Any, a_ref: Any, adapter_ref: Any, candidates_ref: Any, ranks_ref: Any, out_ref: Any, *, tiles: Tiles
) -> None:
    """Rows of the candidate's tokens in ``out_ref`` [splits, T, R]: a part of K, ``tile_r`` ranks."""
    k, width = x_ref.shape[1], tile_r(a_ref.shape[2])
    split, entry = pl.program_id(0) % tiles.splits, plt.load(candidates_ref.at[pl.program_id(2)])
    rows, users = _users(adapter_ref, tiles)
    own = (users == entry) & (users >= 0)
    first = pl.program_id(0) // tiles.splits * width
    columns = first + jnp.arange(width, dtype=jnp.int32)
    rank = plt.load(ranks_ref.at[jnp.maximum(entry, 0)])
    used = _in_use(columns, rank)[None, :]
    steps = pl.cdiv(k, tiles.splits * tiles.tile_k)
    even = k % (tiles.splits * tiles.tile_k) == 0

    @pl.when(_any(own) & (first < rank))
    def _multiply() -> None:
        def step(index: jax.Array, sums: jax.Array) -> jax.Array:
            part = (split * steps + index) * tiles.tile_k + jnp.arange(tiles.tile_k, dtype=jnp.int32)
            inside = jnp.full(part.shape, True) if even else part < k
            x = plt.load(x_ref.at[rows[:, None], part[None, :]], mask=own[:, None] & inside[None, :], other=0.0)
            a = plt.load(a_ref.at[entry, part[:, None], columns[None, :]], mask=inside[:, None] & used, other=0.0)
            return sums + _dot(x, a)

        sums = lax.fori_loop(0, steps, step, jnp.zeros((tiles.tile_m, width), jnp.float32))
        plt.store(out_ref.at[split, rows[:, None], columns[None, :]], sums, mask=own[:, None] & used)


def _expand_kernel(
    down_ref: Any, b_ref: Any, adapter_ref: Any, candidates_ref: Any, ranks_ref: Any, out_ref: Any, *, tiles: Tiles
) -> None:
    """Rows of the candidate's tokens in ``out_ref`` [T, N], and for the first candidate those of tokens without."""
    (splits, _, rank_most), n = down_ref.shape, out_ref.shape[1]
    width = tile_r(rank_most)
    entry = plt.load(candidates_ref.at[pl.program_id(2)])
    rows, users = _users(adapter_ref, tiles)
    own = (users == entry) & (users >= 0)
    columns = pl.program_id(0) * tiles.tile_n + jnp.arange(tiles.tile_n, dtype=jnp.int32)
    inside = (columns < n)[None, :]
    place = out_ref.at[rows[:, None], columns[None, :]]

    @pl.when(_any(own))
    def _multiply() -> None:
        rank = plt.load(ranks_ref.at[entry])

        def step(index: jax.Array, sums: jax.Array) -> jax.Array:
            depth = index * width + jnp.arange(width, dtype=jnp.int32)
            used = _in_use(depth, rank)
            mask = own[:, None] & used[None, :]
            b = plt.load(b_ref.at[entry, depth[:, None], columns[None, :]], mask=used[:, None] & inside, other=0.0)
            down = sum(
                plt.load(down_ref.at[split, rows[:, None], depth[None, :]], mask=mask, other=0.0)
                for split in range(splits)
            )
            return sums + _dot(down.astype(b.dtype), b)

        sums = jnp.zeros((tiles.tile_m, tiles.tile_n), jnp.float32)
        sums = step(jnp.int32(0), sums) if rank_most <= width else lax.fori_loop(0, pl.cdiv(rank, width), step, sums)
        plt.store(place, sums.astype(out_ref.dtype), mask=own[:, None] & inside)

    without = (users < 0) & (rows < out_ref.shape[0])

    @pl.when((pl.program_id(2) == 0) & _any(without))
    def _clear() -> None:
        zeros = jnp.zeros((tiles.tile_m, tiles.tile_n), out_ref.dtype)
        plt.store(place, zeros, mask=without[:, None] & inside)


def _users(adapter_ref: Any, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """The tokens of a program's tile, and the adapter of each; none beyond the last token."""
    rows = pl.program_id(1) * tiles.tile_m + jnp.arange(tiles.tile_m, dtype=jnp.int32)
    return rows, plt.load(adapter_ref.at[rows], mask=rows < adapter_ref.shape[0], other=-1)


def _in_use(columns: jax.Array, rank: jax.Array) -> jax.Array:
    """Whether each of the ranks ``columns`` lies in a block that an entry of ``rank`` uses."""
    return columns // RANK_BLOCK < pl.cdiv(rank, RANK_BLOCK)


def _any(which: jax.Array) -> jax.Array:
    return jnp.max(which.astype(jnp.int32)) > 0


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums in float32, of products in the precision of the operands."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
