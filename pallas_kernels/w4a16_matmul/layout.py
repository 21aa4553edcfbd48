"""The layout of packed 4-bit weights: int32 [K / 128, 16 + 128 / g, N].

A chunk is 128 rows of the weight [K, N], in groups of g = 32, 64 or 128 rows. Its first 16 rows are words: nibble j of
word [r, n] is the unsigned integer q of the chunk's row 16·j + r. Then comes one row for each group: the float16 bits
of the scale in the low half, the zero point 0…16 in the high half. The weight is ``(q - zero) · scale``.

K is padded to whole chunks. N may stand for several axes of outputs. Other modules ask this one for shapes and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 128
"""Rows of the weight in a chunk."""

WORD_ROWS = 16
"""Rows of words in a chunk; the group rows follow."""

PER_WORD = CHUNK // WORD_ROWS
"""Weights in a word."""

GROUP_SIZES = (128, 64, 32)
"""The g that the layout can express, largest first. Larger groups are stored as several of 128."""


def is_packed(weight: jax.Array) -> bool:
    """Return whether ``weight`` has this layout, rather than being a matrix of floats."""
    return bool(weight.dtype == jnp.int32)


def group_size(shape: Sequence[int]) -> int:
    """Return g of a packed weight of ``shape``."""
    return CHUNK // (shape[1] - WORD_ROWS)


def input_size(shape: Sequence[int]) -> int:
    """Return K of a packed weight of ``shape``, padding included."""
    return CHUNK * shape[0]


def packed_shape(inputs: int, outputs: Sequence[int], group: int) -> tuple[int, ...]:
    """Return the shape of a packed weight [``inputs``, *``outputs``] in groups of ``group`` rows."""
    return -(-inputs // CHUNK), WORD_ROWS + CHUNK // group, *outputs


def part_shapes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the words and of the group rows of a packed weight of ``shape``."""
    chunks, rows, *outputs = shape
    return (chunks, WORD_ROWS, *outputs), (chunks, rows - WORD_ROWS, *outputs)


def assemble(words: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """Return the packed weight of its parts: 32-bit ``words``, float16 ``scales`` and integer ``zeros``."""
    groups = lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.int32) | (zeros.astype(jnp.int32) << 16)
    return jnp.concatenate([lax.bitcast_convert_type(words, jnp.int32), groups], axis=1)
