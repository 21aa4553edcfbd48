"""Two kernels: one quantises the tokens, the other multiplies integers and scales what comes out. sm_80 and newer.

Each token is quantised once, not by every program that multiplies it: all of K has to be seen before its step is known.
Where K is split, partial sums are integers, so that their order does not matter; XLA adds them up.
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
from pallas_kernels.target import Target, current_target
from pallas_kernels.w8a8_matmul.call import W8A8MatmulCall
from pallas_kernels.w8a8_matmul.reference import MIN_PEAK, rescale
from pallas_kernels.w8a8_matmul.tiles import MIN_TILE_K, Tiles, choose

MAX_K = 32768
"""K beyond which the registers of one program no longer hold a token."""

GROUP = 8
"""Programs that run together cover this many rows of tiles, so that they share tokens and weights in the L2 cache."""


def check_device(target: Target) -> None:
    """Refuse what is no GPU of sm_80 or newer."""
    need_gpu(target)


def check(call: W8A8MatmulCall) -> None:
    """Refuse a K beyond ``MAX_K``, or one that is not a multiple of the smallest tile."""
    k = call.x.shape[1]
    if k > MAX_K or k % MIN_TILE_K:
        raise RefusalError(f"needs K up to {MAX_K} in steps of {MIN_TILE_K}, have K={k}")


def run(call: W8A8MatmulCall, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.w8a8_matmul.w8a8_matmul``; refuses a K that the tiles do not divide."""
    x, weight = call.x, call.weight
    (m, k), n = x.shape, weight.shape[0]
    chosen = choose(m, k, n, x.dtype, current_target(), tiles)
    if k % (chosen.tile_k * chosen.splits):
        raise RefusalError(f"needs K in {chosen.splits} splits of {chosen.tile_k} times a whole number, have K={k}")
    quantized, steps = _quantize(x)
    if chosen.splits == 1:
        return _multiply(quantized, weight, chosen, x.dtype, steps, call.scales, call.bias)[0]
    partials = _multiply(quantized, weight, chosen, jnp.int32)
    return rescale(partials.sum(axis=0), steps, call.scales, call.bias).astype(x.dtype)


def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` [M, K] → (int8 [M, K], step of each token float32 [M]); one program a token."""
    m, k = x.shape
    quantized: jax.Array
    steps: jax.Array
    quantized, steps = pl.pallas_call(
        _quantize_kernel,
        grid=(m,),
        out_shape=[jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct((m,), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=min(16, max(4, k // 512)), num_stages=1),
        interpret=current_target().interpret,
        name="w8a8_matmul_quantize",
    )(x)
    return quantized, steps


def _quantize_kernel(x_ref: Any, quantized_ref: Any, steps_ref: Any) -> None:
    token, k = pl.program_id(0), x_ref.shape[1]
    columns = jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
    mask = columns < k
    x = plt.load(x_ref.at[token, columns], mask=mask, other=0.0).astype(jnp.float32)
    peak = jnp.maximum(jnp.max(jnp.abs(x)), MIN_PEAK)
    plt.store(quantized_ref.at[token, columns], _round(x * (127 / peak)), mask=mask)
    plt.store(steps_ref.at[token], peak / 127)


def _round(x: jax.Array) -> jax.Array:
    """To the nearest integer, halves to even, as int8; for magnitudes below 2^22.

    Added to 1.5 · 2^23, a float32 has no bits left for fractions, and its lowest ones are the integer's: Triton has no
    rounding instruction to lower ``jnp.round`` to.
    """
    return lax.bitcast_convert_type(x + jnp.float32(1.5 * 2**23), jnp.int32).astype(jnp.int8)


def _multiply(
    quantized: jax.Array,
    weight: jax.Array,
    tiles: Tiles,
    dtype: Any,
    steps: jax.Array | None = None,
    scales: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """int8 [M, K] · int8 [N, K] → [splits, M, N]; bare int32 sums where there are no steps and scales."""
    m, n = quantized.shape[0], weight.shape[0]
    epilogue = [array for array in (steps, scales, bias) if array is not None]
    out: jax.Array = pl.pallas_call(
        partial(_multiply_kernel, tiles=tiles),
        grid=(pl.cdiv(m, tiles.tile_m) * pl.cdiv(n, tiles.tile_n), tiles.splits),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, m, n), dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=current_target().interpret,
        name="w8a8_matmul",
    )(quantized, weight, *epilogue)
    return out


def _multiply_kernel(x_ref: Any, weight_ref: Any, *refs: Any, tiles: Tiles) -> None:
    """``refs`` are what ``_multiply`` was given for the epilogue, and the result."""
    *epilogue, out_ref = refs
    (m, k), n = x_ref.shape, weight_ref.shape[0]
    row, column = _tile(pl.program_id(0), pl.cdiv(m, tiles.tile_m), pl.cdiv(n, tiles.tile_n))
    rows = row * tiles.tile_m + jnp.arange(tiles.tile_m, dtype=jnp.int32)
    columns = column * tiles.tile_n + jnp.arange(tiles.tile_n, dtype=jnp.int32)
    # Beyond the edges the last row is read again: nothing of it is stored, and the loads need no mask.
    x_rows, weight_rows = jnp.minimum(rows, m - 1), jnp.minimum(columns, n - 1)
    offsets = jnp.arange(tiles.tile_k, dtype=jnp.int32)
    trips = k // tiles.splits // tiles.tile_k
    first = pl.program_id(1) * trips
    policy = "evict_first" if m <= tiles.tile_m else None  # each weight is read by one program only

    def step(trip: jax.Array, sums: jax.Array) -> jax.Array:
        part = ((first + trip) * tiles.tile_k + offsets)[None, :]
        x = plt.load(x_ref.at[x_rows[:, None], part])
        weight = plt.load(weight_ref.at[weight_rows[:, None], part], eviction_policy=policy)
        contract_k = (((1,), (1,)), ((), ()))
        return sums + lax.dot_general(x, weight, contract_k, preferred_element_type=jnp.int32)

    out = lax.fori_loop(0, trips, step, jnp.zeros((tiles.tile_m, tiles.tile_n), jnp.int32))
    if epilogue:
        steps = plt.load(epilogue[0].at[x_rows])
        scales, *bias = (plt.load(ref.at[weight_rows]) for ref in epilogue[1:])
        out = rescale(out, steps, scales, bias[0][None, :] if bias else None)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    plt.store(out_ref.at[pl.program_id(1), rows[:, None], columns[None, :]], out.astype(out_ref.dtype), mask=mask)


def _tile(program: jax.Array, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The (row, column) of a program's tile: ``GROUP`` rows at a time, down before across."""
    if rows == 1:
        return jnp.int32(0), program
    group = program // (GROUP * columns)
    height = jnp.minimum(rows - group * GROUP, GROUP)
    place = program % (GROUP * columns)
    return group * GROUP + place % height, place // height
