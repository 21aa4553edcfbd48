"""Weights are dequantised in registers on their way to the tensor cores. sm_80 and newer.

Few rows: K is split among programs, each writes float32 sums of the real rows, and what follows in XLA adds them up.
Many rows: each program makes a whole tile of the result.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.target import Target, current_target
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall
from pallas_kernels.w4a16_matmul.dequant import STEP, add_chunk, load_chunk
from pallas_kernels.w4a16_matmul.layout import CHUNK, group_size
from pallas_kernels.w4a16_matmul.tiles import Tiles, choose

_WEIGHTS_FIRST = 64
"""From this ``tile_m`` on the weights are the left operand of the dots."""


def check_device(target: Target) -> None:
    """Refuse what is no GPU of sm_80 or newer."""
    need_gpu(target)


def check(call: W4A16MatmulCall) -> None:
    """Refuse float32, and N that is not a multiple of 16."""
    n = call.packed.shape[2]
    if call.x.dtype not in (jnp.bfloat16, jnp.float16):
        raise RefusalError(f"multiplies bfloat16 or float16, have {call.x.dtype}")
    if n % 16:
        raise RefusalError(f"needs a multiple of 16 columns, have N={n}")


def run(call: W4A16MatmulCall, tiles: Any = None) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; refuses other backends' ``tiles``."""
    if tiles is not None and not isinstance(tiles, Tiles):
        raise RefusalError(f"takes Tiles, have {tiles}")
    x, packed, bias, target = call.x, call.packed, call.bias, current_target()
    (m, k), n = x.shape, packed.shape[2]
    chosen = choose(m, k, n, group_size(packed.shape), x.dtype, target, tiles)
    _validate(chosen, k, n)
    if chosen.split_k == 1:
        return _multiply(call, chosen, x.dtype, target.interpret)[0]
    total = _multiply(replace(call, bias=None), chosen, jnp.float32, target.interpret).sum(axis=0)
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(x.dtype)


def _validate(tiles: Tiles, k: int, n: int) -> None:
    if n % tiles.tile_n or not 1 <= tiles.split_k <= k // CHUNK:
        raise ValueError(f"{tiles} does not fit K={k}, N={n}; tile_n must divide N, and split_k be at most K / {CHUNK}")


def _multiply(call: W4A16MatmulCall, tiles: Tiles, dtype: Any, interpret: bool) -> jax.Array:
    """The products of the parts of K, [split_k, M, N]."""
    x, packed, bias = call.x, call.packed, call.bias
    (m, k), (chunks, rows, n) = x.shape, packed.shape
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    in_specs = [
        pl.BlockSpec((tile_m, k), lambda i, j, part: (i, 0)),
        pl.BlockSpec((chunks, rows, tile_n), lambda i, j, part: (0, 0, j)),
    ]
    if bias is not None:
        in_specs.append(pl.BlockSpec((tile_n,), lambda i, j, part: (j,)))
    out: jax.Array = pl.pallas_call(
        partial(_kernel, m=m, tiles=tiles, interpret=interpret),
        grid=(pl.cdiv(m, tile_m), n // tile_n, tiles.split_k),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((None, tile_m, tile_n), lambda i, j, part: (part, i, j)),
        out_shape=jax.ShapeDtypeStruct((tiles.split_k, m, n), dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="w4a16_matmul",
    )(*jax.tree.leaves(call))
    return out


def _kernel(x_ref: Any, packed_ref: Any, *refs: Any, m: int, tiles: Tiles, interpret: bool) -> None:
    """``refs`` are (bias, out) where there is a bias, else (out)."""
    *bias_refs, out_ref = refs
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    weights_first, ragged = tile_m >= _WEIGHTS_FIRST, m % tile_m != 0
    real = pl.program_id(0) * tile_m + jnp.arange(tile_m, dtype=jnp.int32) < m

    def mask(columns: int) -> jax.Array | None:
        return jnp.broadcast_to(real[:, None], (tile_m, columns)) if ragged else None

    def visit(chunk: jax.Array, acc: jax.Array) -> jax.Array:
        def load_x(j: int) -> jax.Array:
            at = x_ref.at[:, pl.ds(chunk * CHUNK + j * STEP, STEP)]
            return plt.load(at, mask=mask(STEP), other=0.0 if ragged else None)

        words, groups = load_chunk(packed_ref, chunk)
        return add_chunk(acc, load_x, words, groups, weights_first=weights_first, interpret=interpret)

    part, chunks = pl.program_id(2), packed_ref.shape[0]
    per_part, longer = divmod(chunks, tiles.split_k)
    first = part * per_part + jnp.minimum(part, longer)
    # The minimum changes nothing, but tells the compiler that offsets are small, so that it computes fewer of them.
    end = jnp.minimum(first + per_part + (part < longer).astype(jnp.int32), chunks)
    empty = jnp.zeros((tile_n, tile_m) if weights_first else (tile_m, tile_n), jnp.float32)
    acc = lax.fori_loop(first, end, visit, empty)
    acc = acc.T if weights_first else acc
    for bias_ref in bias_refs:
        acc += bias_ref[...].astype(jnp.float32)[None, :]
    plt.store(out_ref.at[:, :], acc.astype(out_ref.dtype), mask=mask(tile_n))
