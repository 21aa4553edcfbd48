"""Matrix products of a few rows: split along the weight's rows, or gate and up together with what follows them.

Kernels 1, 3, 5 and 6 of the set. Every weight is read once, 128 rows (a chunk) at a time, and each product of a chunk
goes through ``_add_chunk``, which knows both kinds of weight. The output projection may begin with combining the splits
of attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_layer.weights import weight_shape
from pallas_kernels.paged_attention.instructions import exp2
from pallas_kernels.target import current_target
from pallas_kernels.w4a16_matmul.dequant import STEP, add_chunk, load_chunk
from pallas_kernels.w4a16_matmul.layout import CHUNK, is_packed

_PLAIN_STEP = 64
"""Rows of a plain weight in one dot."""

LOWEST = -1e30
"""The log-sum-exp of a split of attention that has seen no token: finite, so that differences are numbers."""


@dataclass(frozen=True)
class SplitAttention:
    """Attention in splits of the context, which are to be combined.

    Attributes:
        out: float32 [A, B, N, H], attention to each of A splits.
        weight: float32 [A, B, N], the log-sum-exp, to base 2, of what each has seen.
        rows: to how many rows B is padded.
        dtype: of the combined attention.
    """

    out: jax.Array
    weight: jax.Array
    rows: int
    dtype: jnp.dtype

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """What kernels read."""
        return self.out, self.weight

    @property
    def combined(self) -> jax.ShapeDtypeStruct:
        """The attention: activations [rows, N · H]."""
        return jax.ShapeDtypeStruct((self.rows, self.out.shape[2] * self.out.shape[3]), self.dtype)

    def combine_tile(self, refs: tuple[Any, ...], x: Any, first_row: jax.Array, rows: int, head: jax.Array) -> None:
        """Inside a kernel: combine one head of ``rows`` rows (a power of two) into ``x`` [self.rows, N · H]."""
        out, weight = refs
        splits, tokens, _, size = self.out.shape
        row, lane = first_row + jnp.arange(rows, dtype=jnp.int32), jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
        real = row < tokens
        mask = real[:, None] & (lane < size)[None, :]

        def share(split: int) -> jax.Array:
            return plt.load(weight.at[jnp.int32(split), row, head], mask=real, other=jnp.float32(LOWEST))

        weights = [share(split) for split in range(splits)]
        peak = functools.reduce(jnp.maximum, weights)
        attended, total = jnp.zeros(mask.shape, jnp.float32), jnp.zeros(row.shape, jnp.float32)
        for split in range(splits):
            part = exp2(weights[split] - peak)
            at = out.at[jnp.int32(split), row[:, None], head, lane[None, :]]
            attended += plt.load(at, mask=mask, other=jnp.float32(0)) * part[:, None]
            total += part
        attended = (attended / total[:, None]).astype(self.dtype)
        plt.store(x.at[row[:, None], head * size + lane[None, :]], attended, mask=mask)


Source = jax.Array | SplitAttention
"""Activations [rows, width], or what they are to be combined from."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: ``columns`` of the weight for each program, and ``splits`` of its rows."""

    columns: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4


def row_tile(rows: int) -> int:
    """Rows of a program: the largest power of two up to 64 that divides ``rows``."""
    return min(64, rows & -rows)


def split_k_matmul(
    source: Source, weight: jax.Array, tokens: int, tile: Tile, *, out_dtype: jnp.dtype, name: str
) -> jax.Array:
    """The product of each split of the weight's rows: ``out_dtype`` [tile.splits, tokens, columns].

    Only the first ``tokens`` rows of the activations, the real ones, are stored.
    """
    width, columns = weight_shape(weight)
    chunks, interpret = width // CHUNK, current_target().interpret
    per_split = -(-chunks // tile.splits)
    split = source if isinstance(source, SplitAttention) else None
    rows = source.rows if isinstance(source, SplitAttention) else source.shape[0]
    operands = source.arrays if isinstance(source, SplitAttention) else (source,)
    tile_m = row_tile(rows)

    def kernel(*refs: Any) -> None:
        sources, (weight_ref, out, *scratch) = refs[: len(operands)], refs[len(operands) :]
        first_row, first_chunk = pl.program_id(0) * tile_m, pl.program_id(2) * per_split
        trips = per_split if chunks % tile.splits == 0 else jnp.minimum(per_split, chunks - first_chunk)
        x = scratch[0] if scratch else sources[0]
        if split is not None:
            _combine(split, sources, x, first_row, tile_m, first_chunk, trips, interpret=interpret)

        def visit(trip: jax.Array, acc: jax.Array) -> jax.Array:
            chunk = first_chunk + trip
            return _add_chunk(acc, x, first_row, weight_ref, chunk, interpret=interpret)

        acc = lax.fori_loop(0, trips, visit, jnp.zeros((tile_m, tile.columns), jnp.float32)).astype(out_dtype)
        if tokens == rows:
            out[...] = acc
        else:
            real = first_row + jnp.arange(tile_m, dtype=jnp.int32) < tokens
            plt.store(out.at[:, :], acc, mask=jnp.broadcast_to(real[:, None], acc.shape))

    scratch = [] if split is None else [split.combined]
    out, *_ = pl.pallas_call(
        kernel,
        grid=(rows // tile_m, columns // tile.columns, tile.splits),
        in_specs=[*(whole(array) for array in operands), _column_tile(weight, tile.columns)],
        out_specs=[
            pl.BlockSpec((None, tile_m, tile.columns), lambda m, n, k: (k, m, n)),
            *(whole(shape) for shape in scratch),
        ],
        out_shape=[jax.ShapeDtypeStruct((tile.splits, tokens, columns), out_dtype), *scratch],
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name=name,
    )(*operands, weight)
    partials: jax.Array = out
    return partials


def _combine(
    split: SplitAttention,
    refs: tuple[Any, ...],
    x: Any,
    first_row: jax.Array,
    tile_m: int,
    first_chunk: jax.Array,
    chunks: jax.Array | int,
    *,
    interpret: bool,
) -> None:
    """Combine the heads that meet ``chunks`` of the weight into ``x``, an array in global memory.

    Every program combines what itself will read, so that none waits for another; those that meet the same rows of the
    weight write the same values to the same places.
    """
    size = split.out.shape[3]
    rows = min(tile_m, int(pl.next_power_of_2(split.out.shape[1])))
    first_head = lax.div(first_chunk * CHUNK, size)
    last_head = lax.div((first_chunk + chunks) * CHUNK + (size - 1), size)

    def visit(head: jax.Array, carry: None) -> None:
        split.combine_tile(refs, x, first_row, rows, head)
        return carry

    lax.fori_loop(first_head, last_head, visit, None)
    if not interpret:
        plt.debug_barrier()


def gated(x: jax.Array, weight: jax.Array, bias: jax.Array | None, tile: Tile, *, name: str) -> jax.Array:
    """``silu(x · gate) · (x · up)`` [rows, F], ``weight`` [D, 2 · F] being both (SwiGLU, arXiv:2002.05202)."""
    rows, tile_m = x.shape[0], row_tile(x.shape[0])
    chunks = weight_shape(weight)[0] // CHUNK
    tiles = weight_shape(weight)[1] // 2 // tile.columns
    interpret = current_target().interpret
    biases = () if bias is None else (bias, bias)

    def kernel(x_ref: Any, gate_ref: Any, up_ref: Any, *refs: Any) -> None:
        *bias_refs, out = refs
        first_row = pl.program_id(0) * tile_m

        def visit(chunk: jax.Array, accs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gate, up = (
                _add_chunk(acc, x_ref, first_row, ref, chunk, interpret=interpret)
                for acc, ref in zip(accs, (gate_ref, up_ref), strict=True)
            )
            return gate, up

        empty = jnp.zeros((tile_m, tile.columns), jnp.float32)
        gate, up = lax.fori_loop(0, chunks, visit, (empty, empty))
        if bias_refs:
            gate, up = (
                acc + ref[...].astype(jnp.float32)[None, :] for acc, ref in zip((gate, up), bias_refs, strict=True)
            )
        out[...] = (gate * jax.nn.sigmoid(gate) * up).astype(x.dtype)

    halves = [_column_tile(weight, tile.columns, half * tiles) for half in (0, 1)]
    bias_halves = [pl.BlockSpec((tile.columns,), lambda m, n, half=half: (n + half * tiles,)) for half in (0, 1)]
    inner: jax.Array = pl.pallas_call(
        kernel,
        grid=(rows // tile_m, tiles),
        in_specs=[whole(x), *halves, *bias_halves[: len(biases)]],
        out_specs=pl.BlockSpec((tile_m, tile.columns), lambda m, n: (m, n)),
        out_shape=jax.ShapeDtypeStruct((rows, tiles * tile.columns), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name=name,
    )(x, weight, weight, *biases)
    return inner


def whole(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Every program sees all of ``array``: it is a pointer, nothing is copied."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _column_tile(weight: jax.Array, columns: int, first: int = 0) -> pl.BlockSpec:
    """All rows of ``weight``; tile ``first + n`` of its columns for program (m, n)."""
    rows = weight.shape[:-1]
    return pl.BlockSpec((*rows, columns), lambda m, n, *_: (*(0 for _ in rows), n + first))


def _add_chunk(
    acc: jax.Array, x: Any, first_row: jax.Array, weight: Any, chunk: jax.Array, *, interpret: bool
) -> jax.Array:
    """``acc`` plus the product of a chunk of ``weight`` with the activations ``x`` from ``first_row`` on."""

    def load(offset: int, width: int) -> jax.Array:
        return plt.load(x.at[pl.ds(first_row, acc.shape[0]), pl.ds(chunk * CHUNK + offset, width)])

    if is_packed(weight):
        words, groups = load_chunk(weight, chunk)
        return add_chunk(acc, lambda j: load(j * STEP, STEP), words, groups, interpret=interpret)
    for offset in range(0, CHUNK, _PLAIN_STEP):
        rows = plt.load(weight.at[pl.ds(chunk * CHUNK + offset, _PLAIN_STEP), :], eviction_policy="evict_first")
        acc += plt.dot(load(offset, _PLAIN_STEP), rows)
    return acc
