"""The kernel of ``pallas_mosaic_gpu``: a persistent grid, one warpgroup that copies and others that compute.

A tile of the result is made transposed, out.T = weight.T · x.T: the left operand of wgmma may come from registers, and
the weights have just been dequantised there. Each compute warpgroup makes 64 columns of the result. It dequantises half
a chunk, 64 rows of the weight, while its wgmma of the half before is still running; the tensor cores also have the
other warpgroup's to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.ring import Ring, give_registers, plgpu, swizzled, take_registers
from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall
from pallas_kernels.w4a16_matmul.hopper_tiles import COLUMNS, TILE_N, WARPGROUPS, HopperTiles
from pallas_kernels.w4a16_matmul.layout import CHUNK, WORD_ROWS

_HALF = CHUNK // 2

_SWATH = 16
"""Tiles along M that are made one after the other, so that what they read of the weights is still in L2."""

_PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""How a vector lies in registers that has one element for each row of a matrix of ``Layout.WGMMA``."""


def matmul(call: W4A16MatmulCall, tiles: HopperTiles, target: Target) -> jax.Array:
    """Run the kernel → [M, N]; M is a multiple of 8."""
    x, packed = call.x, call.packed
    (m, _), n = x.shape, packed.shape[2]
    work = (pl.cdiv(m, tiles.tile_m), n // (TILE_N * tiles.cluster))
    shared = partial(plgpu.SMEM, dtype=x.dtype, transforms=swizzled(_HALF, x.dtype))
    through_memory = tiles.through_memory
    released: Any = plgpu.Barrier
    if tiles.cluster > 1:
        released = partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    out: jax.Array = plgpu.kernel(
        partial(_kernel, tiles=tiles, work=work),
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        scratch_types={
            "activations": shared((tiles.halves, tiles.tile_m, _HALF)),
            "chunks": plgpu.SMEM((tiles.chunks, packed.shape[1], TILE_N), jnp.int32),
            "results": shared((WARPGROUPS, 2, _HALF, COLUMNS)),
            "weights": shared((WARPGROUPS, 2, COLUMNS, _HALF)) if through_memory else None,
            "activations_full": plgpu.Barrier(num_barriers=tiles.halves),
            "activations_empty": released(num_arrivals=WARPGROUPS, num_barriers=tiles.halves),
            "chunks_full": plgpu.Barrier(num_barriers=tiles.chunks),
            "chunks_empty": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.chunks),
        },
        grid=(min((target.cores or 2 * tiles.cluster) // tiles.cluster, work[0] * work[1]),),
        grid_names=("cta",),
        **({"cluster": (tiles.cluster,), "cluster_names": ("cluster",)} if tiles.cluster > 1 else {}),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if target.interpret else None,
        kernel_name="w4a16_matmul",
    )(*jax.tree.leaves(call))
    return out


def _kernel(
    x: Any,
    packed: Any,
    *refs: Any,
    tiles: HopperTiles,
    work: tuple[int, int],
    activations: Any,
    chunks: Any,
    results: Any,
    weights: Any,
    activations_full: Any,
    activations_empty: Any,
    chunks_full: Any,
    chunks_empty: Any,
) -> None:
    """``refs`` are (bias, out) where there is a bias, else (out); ``work`` counts tiles in M and clusters in N."""
    *bias, out = refs
    steps = packed.shape[0]
    warpgroup = lax.axis_index("warpgroup")
    words = Ring(tiles.chunks, chunks_full, chunks_empty)
    halves = Ring(tiles.halves, activations_full, activations_empty)

    def each_tile(body: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """``body`` gets a tile's first row and column, and how many chunks this CTA has seen before it."""

        def tile(loop: Any) -> None:
            i, j = plgpu.planar_snake(loop.index[0], work, 0, _SWATH)
            if tiles.cluster > 1:
                j = j * tiles.cluster + lax.axis_index("cluster")
            body(i * tiles.tile_m, j * TILE_N, loop.local_index * steps)

        plgpu.nd_loop((work[0] * work[1],), collective_axes="cta")(tile)

    @pl.when(warpgroup == WARPGROUPS)
    def _copy() -> None:
        give_registers(WARPGROUPS)

        def tile(row: jax.Array, column: jax.Array, done: jax.Array) -> None:
            def chunk(k: jax.Array, _: None) -> None:
                words.fill(done + k, partial(copy_words, k, column))
                for half in range(2):
                    halves.fill(2 * (done + k) + half, partial(copy_activations, row, 2 * k + half))

            lax.fori_loop(0, steps, chunk, None)

        def copy_words(k: jax.Array, column: jax.Array, slot: jax.Array, barrier: Any) -> None:
            plgpu.copy_gmem_to_smem(packed.at[k, :, pl.ds(column, TILE_N)], chunks.at[slot], barrier)

        def copy_activations(row: jax.Array, half: jax.Array, slot: jax.Array, barrier: Any) -> None:
            source = x.at[pl.ds(row, tiles.tile_m), pl.ds(half * _HALF, _HALF)]
            axes = "cluster" if tiles.cluster > 1 else None
            plgpu.copy_gmem_to_smem(source, activations.at[slot], barrier, collective_axes=axes)

        each_tile(tile)
        total = pl.cdiv(work[0] * work[1] - lax.axis_index("cta"), lax.axis_size("cta")) * steps
        words.drain(total)
        halves.drain(2 * total)

    @pl.when(warpgroup < WARPGROUPS)
    def _compute() -> None:
        take_registers(WARPGROUPS)
        mine = pl.ds(warpgroup * COLUMNS, COLUMNS)

        def tile(row: jax.Array, column: jax.Array, done: jax.Array) -> None:
            product = partial(multiply, done)
            acc = pl.run_scoped(product, plgpu.ACC((COLUMNS, tiles.tile_m), jnp.float32))
            column += warpgroup * COLUMNS
            if bias:
                per_column = plgpu.load(bias[0].at[pl.ds(column, COLUMNS)], layout=_PER_ROW, optimized=False)
                acc += lax.broadcast_in_dim(per_column.astype(jnp.float32), acc.shape, (0,))
            store(acc.astype(x.dtype), row, column)

        def multiply(done: jax.Array, acc: Any) -> jax.Array:
            def chunk(k: jax.Array, _: None) -> None:
                step = done + k
                slot = words.wait(step)
                quantized, groups = _load_chunk(chunks.at[slot, :, mine])
                words.release(step)
                for half in range(2):
                    tile = _dequantize(quantized, groups, half, x.dtype)
                    at = halves.wait(2 * step + half)
                    if weights is not None:
                        weights[warpgroup, half] = tile
                        plgpu.commit_smem()
                        tile = weights.at[warpgroup, half]
                    plgpu.wgmma(acc, tile, activations.at[at].transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    pl.when((k > 0) | (half > 0))(partial(halves.release, 2 * step + half - 1))

            lax.fori_loop(0, steps, chunk, None)
            plgpu.wgmma_wait(0)
            halves.release(2 * (done + steps) - 1)
            product: jax.Array = acc[...]
            return product

        def store(tile: jax.Array, row: jax.Array, column: jax.Array) -> None:
            for i in range(tiles.tile_m // _HALF):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                staged = results.at[warpgroup, i % 2]
                staged.transpose((1, 0))[...] = tile[:, i * _HALF : (i + 1) * _HALF]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(row + i * _HALF, _HALF), pl.ds(column, COLUMNS)])

        each_tile(tile)
        plgpu.wait_smem_to_gmem(0)


def _load_chunk(chunk: Any) -> tuple[jax.Array, list[jax.Array]]:
    """A packed chunk int32 [16 + 128/g, n] → its words, transposed [n, 16], and its group rows, [n] each.

    TMA cannot swizzle rows that do not come in eights, and so lanes meet in the same banks here.
    """
    transposed = chunk.at[pl.ds(0, WORD_ROWS)].transpose((1, 0))
    words = plgpu.load(transposed, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
    rows = range(WORD_ROWS, chunk.shape[0])
    groups = [plgpu.load(chunk.at[row], layout=_PER_ROW) for row in rows]
    return plgpu.layout_cast(words, plgpu.Layout.WGMMA), groups


def _dequantize(words: jax.Array, groups: list[jax.Array], half: int, dtype: Any) -> jax.Array:
    """Rows 64·half … 64·half + 63 of a chunk of the weight, transposed: [n, 64].

    Nibble j goes where ``128 + q`` is a float32, and one fused multiply-add makes ``(q - zero) · scale`` of it. That is
    exact, since 128 + q times a float16 fits into 24 bits; only then is the weight rounded to ``dtype``.
    """
    tiles = []
    for j in range(4 * half, 4 * half + 4):
        row = groups[j * len(groups) // 8]
        scale = lax.bitcast_convert_type((row & 0xFFFF).astype(jnp.int16), jnp.float16).astype(jnp.float32)
        offset = (lax.shift_right_logical(row, 16).astype(jnp.float32) + 128) * -scale
        left = 16 - 4 * j
        placed = words << left if left >= 0 else lax.shift_right_logical(words, -left)
        shifted = lax.bitcast_convert_type((placed & 0x000F0000) | 0x43000000, jnp.float32)
        scale, offset = (lax.broadcast_in_dim(v, words.shape, (0,)) for v in (scale, offset))
        tiles.append((shifted * scale + offset).astype(dtype))
    return jnp.concatenate(tiles, axis=1)
