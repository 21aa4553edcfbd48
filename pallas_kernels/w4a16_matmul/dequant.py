"""The inside of a W4A16 kernel: one chunk of packed weights becomes operands of dots. For Pallas-Triton kernels.

Chunks and words are described in ``layout``. Nibble j of all words is 16 neighbouring rows of the weight, so eight dots
over 16 rows each make the product of a chunk.

``2^m | q`` in the right place is the float ``2^m + q`` (m is 7 in bfloat16, 10 in float16), from which ``2^m + zero``
is subtracted: exact, and two weights at a time. The scale is applied to the product, once per group.

    def visit(chunk, acc):
        words, groups = load_chunk(packed_ref, chunk)
        return add_chunk(acc, lambda j: plt.load(x_ref.at[:, pl.ds(chunk * CHUNK + j * STEP, STEP)]), words, groups)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.w4a16_matmul.layout import CHUNK, WORD_ROWS

STEP = WORD_ROWS
"""Rows of the weight in one dot."""

STEPS = CHUNK // STEP
"""Dots of a chunk: one for each nibble of a word."""


class _Float(NamedTuple):
    """Bits of ``2^m``, ``-2^m`` and 1 in a 16-bit float, and what PTX calls a pair of them."""

    base: int
    negative: int
    one: int
    pair: str


_FLOATS = {
    "bfloat16": _Float(0x4300, 0xC300, 0x3F80, "bf16x2"),
    "float16": _Float(0x6400, 0xE400, 0x3C00, "f16x2"),
}


def load_chunk(packed: Any, chunk: jax.Array | int, columns: Any = slice(None)) -> tuple[jax.Array, list[jax.Array]]:
    """Load from the ref ``packed`` int32 [C, 16 + 128/g, N] → words [16, n] and the 128/g group rows [n]."""
    chunk = jnp.int32(chunk)
    words = plt.load(packed.at[chunk, pl.ds(0, STEP), columns], eviction_policy="evict_first")
    groups = range(STEP, packed.shape[1])
    return words, [plt.load(packed.at[chunk, jnp.int32(row), columns]) for row in groups]


def add_chunk(
    acc: jax.Array,
    load_x: Callable[[int], jax.Array],
    words: jax.Array,
    groups: Sequence[jax.Array],
    *,
    weights_first: bool = False,
    interpret: bool,
) -> jax.Array:
    """``acc`` float32 [m, n] plus the product of a chunk with its activations.

    Args:
        acc: what to add to.
        load_x: j → the activations [m, 16] that meet rows 16·j … 16·j + 15 of the chunk, bfloat16 or float16.
        words: int32 [16, n].
        groups: int32 [n] for each group, like ``words`` from ``load_chunk``.
        weights_first: ``acc`` is [n, m], and the weights are the left operand of the dots. From 64 rows on this is the
            better way round: Hopper's tensor cores take the left operand from registers, the right one only from
            shared memory, and weights come out of dequantisation in registers.
        interpret: whether Pallas interprets the kernel.
    """
    xs = [load_x(j) for j in range(STEPS)]
    tiles = dequantize_chunk(words, groups, xs[0].dtype, weights_first=weights_first, interpret=interpret)
    per_group = STEPS // len(groups)
    for group, row in enumerate(groups):
        product = jnp.zeros_like(acc)
        for j in range(group * per_group, (group + 1) * per_group):
            product += plt.dot(tiles[j], xs[j].T) if weights_first else plt.dot(xs[j], tiles[j])
        scale = _spread(scales(row), acc.shape, weights_first)
        acc = multiply_add(product, scale, acc, interpret=interpret)
    return acc


def dequantize_chunk(
    words: jax.Array, groups: Sequence[jax.Array], dtype: DTypeLike, *, weights_first: bool = False, interpret: bool
) -> list[jax.Array]:
    """The eight tiles ``q - zero`` of a chunk in ``dtype``; the other arguments are those of ``add_chunk``.

    Tile j, [16, n] or with ``weights_first`` [n, 16], is rows 16·j … 16·j + 15: exact in bfloat16 and in float16.
    """
    words = words.T if weights_first else words
    zeros = [_spread(row, words.shape, weights_first) for row in groups]
    step = _step_in_jax if interpret else _step_in_ptx
    return [step(words, zeros[j * len(groups) // STEPS], j, dtype) for j in range(STEPS)]


def scales(row: jax.Array) -> jax.Array:
    """The scales float32 [n] of a group row."""
    return lax.bitcast_convert_type(row.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """``a · b + c`` of float32 arrays of one shape in one instruction; the compiler fuses none by itself."""
    if interpret:
        return a * b + c
    result = jax.ShapeDtypeStruct(c.shape, jnp.float32)
    (total,) = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[a, b, c], constraints="=f,f,f,f", pack=1, result_shape_dtypes=[result]
    )
    return total


def _spread(row: jax.Array, shape: tuple[int, ...], weights_first: bool) -> jax.Array:
    """A value for each column of the weight, along all of a tile."""
    return jnp.broadcast_to(row[:, None] if weights_first else row[None, :], shape)


def _step_in_ptx(words: jax.Array, groups: jax.Array, j: int, dtype: DTypeLike) -> jax.Array:
    """Tile j, two elements at a time: where a dot takes the result, these are neighbours along K."""
    result = jax.ShapeDtypeStruct(words.shape, dtype)
    (tile,) = plt.elementwise_inline_asm(
        ptx(j, dtype), args=[words, groups], constraints="=r,r,r,r,r", pack=2, result_shape_dtypes=[result]
    )
    return tile


def ptx(j: int, dtype: DTypeLike) -> str:
    """Assembly for two elements ``$0`` of tile j, from words ``$1`` and ``$2`` and group rows ``$3`` and ``$4``.

    The halves of both words that hold nibble j are put together first, so that one shift, one mask and one subtraction
    serve both. LLVM would take such pairs apart again, hence the assembly; what the eight tiles have in common, ptxas
    computes once. The subtraction is a multiplication by one with an addition, as sm_80 has no other for bfloat16.
    """
    bits = _FLOATS[jnp.dtype(dtype).name]
    half, shift = (0x5410, 4 * j) if j < 4 else (0x7632, 4 * (j - 4))
    base, negative, one = (f"{value << 16 | value:#010x}" for value in (bits.base, bits.negative, bits.one))
    return f"""{{
        .reg .b32 weight, zero, one;
        prmt.b32 weight, $1, $2, {half:#06x};
        shr.u32 weight, weight, {shift};
        lop3.b32 weight, weight, 0x000f000f, {base}, 0xea;
        prmt.b32 zero, $3, $4, 0x7632;
        or.b32 zero, zero, {negative};
        mov.b32 one, {one};
        fma.rn.{bits.pair} $0, weight, one, zero;
    }}"""


def _step_in_jax(words: jax.Array, groups: jax.Array, j: int, dtype: DTypeLike) -> jax.Array:
    """The same bits, one element at a time."""
    bits = _FLOATS[jnp.dtype(dtype).name]

    def as_float(low: jax.Array, high: int) -> jax.Array:
        return lax.bitcast_convert_type((low | jnp.int32(high)).astype(jnp.uint16), dtype)

    q = lax.shift_right_logical(words, jnp.int32(4 * j)) & jnp.int32(0xF)
    zero = lax.shift_right_logical(groups, jnp.int32(16))
    return as_float(q, bits.base) + as_float(zero, bits.negative)
