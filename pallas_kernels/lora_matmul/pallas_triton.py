"""Two kernels: one multiplies tokens down to ranks, the other from there up to the result. sm_80 and newer.

A program has a tile of tokens and goes through the adapters that occur in it. It reads the rows of one adapter's tokens
alone, and writes their rows: a token has one adapter, so no two programs meet in a row, and nothing is added up between
adapters. Where many may occur in a tile, teams of programs share them out. Where K is split, the first kernel leaves
float32 sums of each part, which the second adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.lora_matmul.call import LoRAMatmulCall
from pallas_kernels.lora_matmul.tiles import ProblemSize, Tiles, choose, tile_r
from pallas_kernels.target import Target, current_target

RANK_BLOCK = 16
"""Ranks that are read or skipped together."""


def check_device(target: Target) -> None:
    """Refuse what is no GPU of sm_80 or newer."""
    need_gpu(target)


def check(call: LoRAMatmulCall) -> None:
    """Refuse an R that is not a multiple of ``RANK_BLOCK``."""
    rank = call.b.shape[1]
    if rank % RANK_BLOCK or not rank:
        raise RefusalError(f"needs R in steps of {RANK_BLOCK}, have R={rank}; pad a and b with zeros")


def run(call: LoRAMatmulCall, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.lora_matmul.lora_matmul``.

    Between the products a token is rounded to the dtype of ``x``, which tensor cores take. Only the number of
    ``candidates`` matters here, for the tiles.
    """
    x, a, b = call.x, call.a, call.b
    (tokens, _), (_, rank, n), ranks_together = x.shape, b.shape, a.shape[2]
    target = current_target()
    chosen = choose(ProblemSize.of(call), target, tiles)
    rows = pl.cdiv(tokens, chosen.tile_m)
    launch = partial(
        pl.pallas_call,
        compiler_params=plt.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages),
        interpret=target.interpret,
    )
    down = launch(
        partial(_shrink_kernel, rank=rank, tiles=chosen),
        grid=(chosen.splits * pl.cdiv(ranks_together, tile_r(ranks_together)), rows, chosen.teams),
        out_shape=jax.ShapeDtypeStruct((chosen.splits, tokens, ranks_together), jnp.float32),
        name="lora_matmul_shrink",
    )(x, a, call.adapter, call.ranks)
    out: jax.Array = launch(
        partial(_expand_kernel, segments=call.widths, tiles=chosen),
        grid=(pl.cdiv(n, chosen.tile_n), rows, chosen.teams),
        out_shape=jax.ShapeDtypeStruct((tokens, n), x.dtype),
        name="lora_matmul_expand",
    )(down, b, call.adapter, call.ranks)
    return out


def _shrink_kernel(
    x_ref: Any, a_ref: Any, adapter_ref: Any, ranks_ref: Any, out_ref: Any, *, rank: int, tiles: Tiles
) -> None:
    """Rows of the team's tokens in ``out_ref`` [splits, T, M·R]: a part of K, ``tile_r`` columns of ``a_ref``."""
    k, together = a_ref.shape[1:]
    width = tile_r(together)
    split, first = pl.program_id(0) % tiles.splits, pl.program_id(0) // tiles.splits * width
    rows, users = _users(adapter_ref, tiles)
    columns = first + jnp.arange(width, dtype=jnp.int32)
    steps = pl.cdiv(k, tiles.splits * tiles.tile_k)
    even = k % (tiles.splits * tiles.tile_k) == 0

    def multiply(entry: jax.Array, own: jax.Array) -> None:
        in_use = _in_use(lax.rem(columns, jnp.int32(rank)), plt.load(ranks_ref.at[entry]))
        wanted = (columns < together) & in_use
        used = wanted[None, :]

        def step(index: jax.Array, sums: jax.Array) -> jax.Array:
            part = (split * steps + index) * tiles.tile_k + jnp.arange(tiles.tile_k, dtype=jnp.int32)
            inside = jnp.full(part.shape, True) if even else part < k
            x = plt.load(x_ref.at[rows[:, None], part[None, :]], mask=own[:, None] & inside[None, :], other=0.0)
            a = plt.load(a_ref.at[entry, part[:, None], columns[None, :]], mask=inside[:, None] & used, other=0.0)
            return sums + _dot(x, a)

        trips = jnp.where(jnp.max(wanted.astype(jnp.int32)) > 0, jnp.int32(steps), jnp.int32(0))
        sums = lax.fori_loop(0, trips, step, jnp.zeros((tiles.tile_m, width), jnp.float32))
        plt.store(out_ref.at[split, rows[:, None], columns[None, :]], sums, mask=own[:, None] & used)

    _for_each_adapter(users, tiles, multiply)


def _expand_kernel(
    down_ref: Any,
    b_ref: Any,
    adapter_ref: Any,
    ranks_ref: Any,
    out_ref: Any,
    *,
    segments: tuple[int, ...],
    tiles: Tiles,
) -> None:
    """Rows of the team's tokens in ``out_ref`` [T, N]; the first team also clears those of tokens without adapter."""
    (splits, tokens, _), (_, max_rank, n) = down_ref.shape, b_ref.shape
    width = tile_r(max_rank)
    rows, users = _users(adapter_ref, tiles)
    columns = pl.program_id(0) * tiles.tile_n + jnp.arange(tiles.tile_n, dtype=jnp.int32)
    inside = (columns < n)[None, :]
    modules = tuple(_modules(columns, pl.program_id(0) * tiles.tile_n, segments, tiles))

    def write(values: jax.Array, own: jax.Array) -> None:
        plt.store(out_ref.at[rows[:, None], columns[None, :]], values.astype(out_ref.dtype), mask=own[:, None] & inside)

    parts, zeros = jnp.arange(splits, dtype=jnp.int32), jnp.zeros((tiles.tile_m, tiles.tile_n), jnp.float32)
    without = (users < 0) & (rows < tokens)

    @pl.when((pl.program_id(2) == 0) & (jnp.max(without.astype(jnp.int32)) > 0))
    def _clear() -> None:
        write(zeros, without)

    def multiply(entry: jax.Array, own: jax.Array) -> None:
        rank = plt.load(ranks_ref.at[entry])

        def add(module: int, belongs: jax.Array, sums: jax.Array) -> jax.Array:
            def step(index: jax.Array, sums: jax.Array) -> jax.Array:
                depth = index * width + jnp.arange(width, dtype=jnp.int32)
                used = _in_use(depth, rank)
                place = down_ref.at[parts[:, None, None], rows[None, :, None], module * max_rank + depth[None, None, :]]
                down = plt.load(place, mask=own[None, :, None] & used[None, None, :], other=0.0).sum(axis=0)
                mask = used[:, None] & inside & belongs[None, :]
                b = plt.load(b_ref.at[entry, depth[:, None], columns[None, :]], mask=mask, other=0.0)
                return sums + _dot(down.astype(b.dtype), b)

            return step(jnp.int32(0), sums) if max_rank <= width else lax.fori_loop(0, pl.cdiv(rank, width), step, sums)

        sums = zeros
        for module, (touched, belongs) in enumerate(modules):
            add_own = partial(add, module, belongs)
            sums = lax.cond(touched, add_own, lambda sums: sums, sums) if len(modules) > 1 else add_own(sums)
        write(sums, own)

    _for_each_adapter(users, tiles, multiply)


def _modules(
    columns: jax.Array, first: jax.Array, segments: tuple[int, ...], tiles: Tiles
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Of each module, whether any of the tile's ``columns`` from ``first`` on are its own, and which these are.

    Where tiles divide all segments a tile is one module's: those that have any have all.
    """
    period, whole = sum(segments), len(segments) == 1 or all(width % tiles.tile_n == 0 for width in segments)
    start, within = lax.rem(first, jnp.int32(period)), lax.rem(columns, jnp.int32(period))
    for width, end in zip(segments, accumulate(segments), strict=True):
        begin, beyond = end - width, start + tiles.tile_n
        touched = (start < end) & (beyond > begin) | (beyond > period + begin)
        yield touched, jnp.full(columns.shape, True) if whole else (begin <= within) & (within < end)


def _users(adapter_ref: Any, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """The tokens of a program's tile, and the adapter of each; none beyond the last token."""
    rows = pl.program_id(1) * tiles.tile_m + jnp.arange(tiles.tile_m, dtype=jnp.int32)
    return rows, plt.load(adapter_ref.at[rows], mask=rows < adapter_ref.shape[0], other=-1)


def _for_each_adapter(users: jax.Array, tiles: Tiles, serve: Callable[[jax.Array, jax.Array], None]) -> None:
    """Call ``serve(entry, own)`` for each adapter of the program's team among ``users``; ``own`` are its tokens.

    A team's are those whose number, divided by ``teams``, leaves its own: neighbours in the bank have different teams.
    """
    if tiles.teams > 1:
        users = jnp.where(lax.rem(users, jnp.int32(tiles.teams)) == pl.program_id(2), users, -1)

    def serve_next(waiting: jax.Array) -> jax.Array:
        entry = jnp.max(waiting)
        own = waiting == entry
        serve(entry, own)
        return jnp.where(own, -1, waiting)

    lax.while_loop(lambda waiting: jnp.max(waiting) >= 0, serve_next, users)


def _in_use(columns: jax.Array, rank: jax.Array) -> jax.Array:
    """Whether each of the ranks ``columns`` lies in a block that an entry of ``rank`` uses.

    Compared with a multiple of the block, for Triton to see that neighbours are masked alike: it loads 16 bytes then.
    """
    return columns < lax.div(rank + (RANK_BLOCK - 1), jnp.int32(RANK_BLOCK)) * RANK_BLOCK


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums in float32, of products in the precision of the operands."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
