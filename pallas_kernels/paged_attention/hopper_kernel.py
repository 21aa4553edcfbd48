"""The kernel of ``pallas_mosaic_gpu``: in each CTA one warpgroup copies keys and values, others attend.

A compute warpgroup has V = 64 query vectors: T neighbouring tokens of a row, with several of the query heads of one KV
head. Vector i is token i mod T of head i div T, so that a head's tokens come and go in one copy. The softmax is the
running one of arXiv:1805.02867, with exponents to base 2; warpgroups hide it behind each other's matrix products
(arXiv:2407.08608).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.ring import Ring, give_registers, plgpu, swizzled, take_registers
from pallas_kernels.kv_pool import stored
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.paged_attention.hopper_tiles import VECTORS, HopperTiles, tokens_together

_KEYS, _VALUES = 0, 1
_LOG2_E = math.log2(math.e)

_LOWEST = -1e30
"""Peak of a vector that has seen nothing: finite, so that differences of peaks are numbers."""

_TINY = 1e-30
"""Least sum of weights that is divided by."""

_MATRIX = plgpu.Layout.WGMMA
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)


class _Range(NamedTuple):
    """Tiles of the context: the first, the first that some query does not see all of, and the last + 1."""

    begin: jax.Array
    whole: jax.Array
    stop: jax.Array


class _Running(NamedTuple):
    """The softmax so far: highest logit [V] and sum of weights [V], and the output [V, H]."""

    peak: jax.Array
    total: jax.Array
    out: jax.Array


@dataclass(frozen=True)
class HopperKernel:
    """What is known of a call when it is compiled. ``heads`` query heads of one KV head go together."""

    tiles: HopperTiles
    heads: int
    scale: float
    window: int | None
    softcap: float | None

    def __call__(self, call: PagedAttentionCall, *, interpret: bool) -> jax.Array:
        """Run the kernel; see ``pallas_kernels.paged_attention.paged_attention``. The pool is a plain one."""
        q, pool = call.queries, stored(call.pool)
        rows, queries, heads, size = q.shape
        tiles = self.tiles
        slots, parts = tiles.slots, tiles.tile_n // pool.shape[3]
        shared = partial(plgpu.SMEM, dtype=q.dtype)
        context = shared((slots, tiles.tile_n, size), transforms=swizzled(size, q.dtype))
        weights = (tiles.warpgroups, VECTORS, tiles.tile_n)
        full = plgpu.Barrier(num_arrivals=parts, num_barriers=slots)
        empty = plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=slots)
        out: jax.Array = plgpu.kernel(
            self._body,
            out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
            scratch_types={
                "vectors": shared((tiles.warpgroups, VECTORS, size), transforms=swizzled(size, q.dtype)),
                "keys": context,
                "values": context,
                "weights": shared(weights, transforms=swizzled(tiles.tile_n, q.dtype))
                if tiles.through_memory
                else None,
                "vectors_full": plgpu.Barrier(num_arrivals=self.heads, num_barriers=tiles.warpgroups),
                "keys_full": full,
                "keys_empty": empty,
                "values_full": full,
                "values_empty": empty,
            },
            grid=(rows, pl.cdiv(queries, self.tokens * tiles.warpgroups), heads // self.heads),
            grid_names=("row", "tile", "heads"),
            num_threads=tiles.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            interpret=plgpu.InterpretGPUParams() if interpret else None,
            kernel_name="paged_attention",
        )(q, pool, call.block_tables, call.first_positions, call.lengths)
        return out

    @property
    def tokens(self) -> int:
        """T, query tokens of a warpgroup."""
        return tokens_together(self.heads)

    def _body(
        self,
        q: Any,
        pool: Any,
        tables: Any,
        firsts: Any,
        lengths: Any,
        out: Any,
        *,
        vectors: Any,
        keys: Any,
        values: Any,
        weights: Any,
        vectors_full: Any,
        keys_full: Any,
        keys_empty: Any,
        values_full: Any,
        values_empty: Any,
    ) -> None:
        # The last rows of a sequence see most: they go first, and what is left at the end is short.
        row = q.shape[0] - 1 - lax.axis_index("row")
        start = lax.axis_index("tile") * (self.tokens * self.tiles.warpgroups)
        head = lax.axis_index("heads") * self.heads
        warpgroup = lax.axis_index("warpgroup")
        first = firsts[row] + start
        real = jnp.minimum(lengths[row] - start, self.tokens * self.tiles.warpgroups)
        end = jnp.where(real > 0, first + real, 0)
        seen = self._range(first, end)
        barriers = ((keys_full, keys_empty), (values_full, values_empty))
        rings = [Ring(self.tiles.slots, full, empty) for full, empty in barriers]

        @pl.when(warpgroup == self.tiles.warpgroups)
        def _copy() -> None:
            give_registers(self.tiles.warpgroups)
            size = pool.shape[3]
            parts = self.tiles.tile_n // size
            kv_head = lax.div(head, jnp.int32(q.shape[2] // pool.shape[2]))
            last = lax.div(end - 1, jnp.int32(size))

            def tile(index: jax.Array, _: None) -> None:
                entries = [index * parts + part for part in range(parts)]
                # A tile may reach beyond the context, where the table says nothing: any block will do.
                blocks = [tables[row, jnp.minimum(entry, last)] for entry in entries]
                for half, tiles in ((_KEYS, keys), (_VALUES, values)):
                    rings[half].fill(index - seen.begin, partial(copy, blocks, half, tiles))

            def copy(blocks: list[jax.Array], half: int, tiles: Any, slot: jax.Array, barrier: Any) -> None:
                for part, block in enumerate(blocks):
                    place = tiles.at[slot, pl.ds(part * size, size)]
                    plgpu.copy_gmem_to_smem(pool.at[block, half, kv_head], place, barrier)

            lax.fori_loop(seen.begin, seen.stop, tile, None)
            for ring in rings:
                ring.drain(seen.stop - seen.begin)

        @pl.when(warpgroup < self.tiles.warpgroups)
        def _attend() -> None:
            take_registers(self.tiles.warpgroups)
            mine = vectors.at[warpgroup]
            token = start + warpgroup * self.tokens
            places = [
                (mine.at[pl.ds(i * self.tokens, self.tokens)], (row, pl.ds(token, self.tokens), head + i))
                for i in range(self.heads)
            ]
            for place, at in places:
                plgpu.copy_gmem_to_smem(q.at[at], place, vectors_full.at[warpgroup])
            plgpu.barrier_wait(vectors_full.at[warpgroup])

            def visit(index: jax.Array, running: _Running, *, masked: bool) -> _Running:
                step = index - seen.begin
                slot = rings[_KEYS].wait(step)
                scores = _product(mine, keys.at[slot].transpose((1, 0)))
                rings[_KEYS].release(step)
                visible = self._visible(firsts[row] + token, index) if masked else None
                running, shares, shrink = self._softmax(running, self._capped(scores), visible)
                out = running.out * lax.broadcast_in_dim(shrink, running.out.shape, (0,))
                narrow = shares.astype(q.dtype)
                slot = rings[_VALUES].wait(step)
                if weights is None:
                    out = _add_product(out, narrow, values.at[slot])
                else:
                    weights[warpgroup] = narrow
                    plgpu.commit_smem()
                    out += _product(weights.at[warpgroup], values.at[slot])
                rings[_VALUES].release(step)
                return running._replace(out=out)

            running = self._empty(q.shape[3])
            running = lax.fori_loop(seen.begin, seen.whole, partial(visit, masked=False), running)
            running = lax.fori_loop(seen.whole, seen.stop, partial(visit, masked=True), running)
            share = 1 / jnp.maximum(running.total, _TINY)
            mine[...] = (running.out * lax.broadcast_in_dim(share, running.out.shape, (0,))).astype(q.dtype)
            plgpu.commit_smem()
            for place, at in places:
                plgpu.copy_smem_to_gmem(place, out.at[at])
            plgpu.wait_smem_to_gmem(0)

    def _range(self, first: jax.Array, end: jax.Array) -> _Range:
        """What queries from position ``first`` on see of the context before ``end``."""
        wide = jnp.int32(self.tiles.tile_n)
        stop = lax.div(end + wide - 1, wide)
        if self.window is None:
            begin = jnp.int32(0)
            return _Range(begin, jnp.minimum(lax.div(first + 1, wide), stop), stop)
        begin = jnp.minimum(lax.div(jnp.maximum(first - self.window + 1, 0), wide), stop)
        return _Range(begin, begin, stop)

    def _visible(self, first: jax.Array, index: jax.Array) -> jax.Array:
        """Which tokens of tile ``index`` each vector sees, bool [V, tile_n]; vector 0 stands at position ``first``."""
        shape = (VECTORS, self.tiles.tile_n)
        vector, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_MATRIX) for axis in (0, 1))
        age = (vector & (self.tokens - 1)) - column + (first - index * self.tiles.tile_n)
        visible: jax.Array = age >= 0 if self.window is None else (age >= 0) & (age < self.window)
        return visible

    def _capped(self, scores: jax.Array) -> jax.Array:
        if self.softcap is None:
            return scores
        return 1 - 2 / (1 + jnp.exp2(scores * (2 * _LOG2_E * self.scale / self.softcap)))  # the tangens hyperbolicus

    def _softmax(
        self, running: _Running, scores: jax.Array, visible: jax.Array | None
    ) -> tuple[_Running, jax.Array, jax.Array]:
        """Take in a tile's scores → the state but for its output, the weights, what that output shrinks by [V]."""
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        factor = _LOG2_E * (self.scale if self.softcap is None else self.softcap)
        peak = jnp.maximum(running.peak, scores.max(axis=1) * factor)
        shrink = jnp.exp2(running.peak - peak)
        shares = jnp.exp2(scores * factor - lax.broadcast_in_dim(peak, scores.shape, (0,)))
        return _Running(peak, running.total * shrink + shares.sum(axis=1), running.out), shares, shrink

    def _empty(self, size: int) -> _Running:
        def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
            same: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
            return same

        lowest, nothing = full((VECTORS,), _LOWEST, _PER_ROW), full((VECTORS,), 0.0, _PER_ROW)
        return _Running(lowest, nothing, full((VECTORS, size), 0.0, _MATRIX))


def _product(left: Any, right: Any) -> jax.Array:
    """``left`` [V, K], in registers or shared memory, times ``right`` [K, N] in shared memory → float32 [V, N]."""

    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, left, right)
        return acc[...]

    product: jax.Array = pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))
    return product


def _add_product(acc: jax.Array, left: jax.Array, right: Any) -> jax.Array:
    """``acc`` [V, N] plus such a product, in the same registers; Pallas' interpreter cannot do it."""

    def multiply(ref: Any) -> None:
        plgpu.wgmma(ref, left, right)

    total: jax.Array = pl.run_state(multiply)(plgpu.ACC.init(acc))
    return total
