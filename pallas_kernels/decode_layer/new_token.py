"""The new token of a sequence, inside a kernel: its queries, key and value, out of the QKV projection into the pool.

Letters besides the glossary's: A rows of the kernel's matrices, which are the query heads of a KV head; W words of a
vector (``pallas_kernels.paged_attention.words``), which hold it in parts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.kv_pool import integers, range_of
from pallas_kernels.paged_attention.context import there
from pallas_kernels.paged_attention.words import Words


@dataclass(frozen=True)
class Projection:
    """What the QKV projection left for one row and KV head: parts of sums, to be added up, biased and rotated.

    Attributes:
        partials: ref, float32 [splits, B, K · (N/K + 2) · H].
        bias: ref [K · (N/K + 2) · H] or ``None``.
        cos: ref, float32 [B, H/2]; sin likewise.
        row: of B.
        kv_head: of K.
        group: N / K.
        words: how vectors are taken apart.
        dtype: that the projection is rounded to.
    """

    partials: Any
    bias: Any
    cos: Any
    sin: Any
    row: jax.Array
    kv_head: jax.Array
    group: int
    words: Words
    dtype: jnp.dtype

    def query(self, part: int, heads: jax.Array) -> jax.Array:
        """A part of the rotated queries ``heads`` (int32 [A]) of the group, float32 [A, W]; zero beyond the group."""
        return self._rotated(heads[:, None], self._elements(part)[None, :])

    def key(self, part: int) -> jax.Array:
        """A part of the rotated key, float32 [W]."""
        return self._rotated(jnp.int32(self.group), self._elements(part)).astype(self.dtype).astype(jnp.float32)

    def value(self, part: int) -> jax.Array:
        """A part of the value, float32 [W]."""
        return self._load(jnp.int32(self.group + 1), self._elements(part))

    def _elements(self, part: int) -> jax.Array:
        """The elements of a part, int32 [W]; H for the words that a vector does not have."""
        return jnp.where(there(self.words), self.words.elements(part), self.words.head_dim)

    def _rotated(self, vector: jax.Array, elements: jax.Array) -> jax.Array:
        """Rotary embedding (arXiv:2104.09864), element i paired with i + H/2."""
        half = self.words.head_dim // 2
        first = elements < half
        inside = elements < self.words.head_dim
        angle = jnp.where(first, elements, elements - half)
        cos, sin = (
            plt.load(ref.at[self.row, angle], mask=inside, other=jnp.float32(0)) for ref in (self.cos, self.sin)
        )
        partner = jnp.where(first, elements + half, elements - half)
        turned = self._load(vector, partner) * sin
        return self._load(vector, elements) * cos + jnp.where(first, -turned, turned)

    def _load(self, vector: jax.Array, elements: jax.Array) -> jax.Array:
        """``elements`` of the vectors that are counted from the first query head, rounded to ``dtype``."""
        size = self.words.head_dim
        columns = (self.kv_head * (self.group + 2) + vector) * size + elements
        # Beyond a vector lies the next one, and beyond the last query head the key.
        owned = (elements < size) & ((vector < self.group) | (vector.ndim == 0))
        nothing = jnp.float32(0)
        x = jnp.zeros(columns.shape, jnp.float32)
        for split in range(self.partials.shape[0]):
            x += plt.load(self.partials.at[jnp.int32(split), self.row, columns], mask=owned, other=nothing)
        if self.bias is not None:
            x += plt.load(self.bias.at[columns], mask=owned, other=nothing.astype(self.dtype)).astype(jnp.float32)
        return x.astype(self.dtype).astype(jnp.float32)


class NewVector(NamedTuple):
    """A key or value: float32 [W] parts as they read back from the pool, and what is stored: words [W], and a range.

    ``range`` is scale and zero, ``None`` in a pool of floats.
    """

    parts: tuple[jax.Array, ...]
    stored: jax.Array
    range: tuple[jax.Array, jax.Array] | None = None


def encode(parts: Sequence[jax.Array], words: Words, dtype: jnp.dtype) -> NewVector:
    """What a pool of ``words`` will hold of a vector whose ``parts``, float32 [W], are exact in ``dtype``."""
    if words.bits is None:
        return NewVector(tuple(parts), parts[0].astype(dtype))
    real = there(words)
    low = functools.reduce(jnp.minimum, [jnp.min(jnp.where(real, part, jnp.inf)) for part in parts])
    high = functools.reduce(jnp.maximum, [jnp.max(jnp.where(real, part, -jnp.inf)) for part in parts])
    scale, zero = range_of(low, high, words.bits)
    counts = [integers(part, scale, zero, words.bits) for part in parts]
    fields = (count << (words.bits * index) for index, count in enumerate(counts))
    stored = functools.reduce(jnp.bitwise_or, fields).astype(jnp.uint16)
    wide = scale.astype(jnp.float32), zero.astype(jnp.float32)
    read = tuple(count.astype(jnp.float32) * wide[0] + wide[1] for count in counts)
    return NewVector(read, stored, (scale, zero))


def store(
    pool: Sequence[Any],
    half: int,
    kv_head: jax.Array,
    table: Any,
    row: jax.Array,
    position: jax.Array,
    new: NewVector,
    words: Words,
    wanted: jax.Array,
) -> None:
    """Put a key (``half`` 0) or value (1) into the slot of ``position`` where ``wanted``, a scalar, holds.

    ``pool`` are refs of the pool's arrays in words, ``table`` of the block tables.
    """
    size = jnp.int32(pool[0].shape[3])
    place = jnp.maximum(position, 0)
    block, offset = plt.load(table.at[row, lax.div(place, size)]), lax.rem(place, size)
    word = jnp.arange(words.padded, dtype=jnp.int32)
    at = pool[0].at[block, jnp.int32(half), kv_head, offset, word]
    plt.store(at, new.stored, mask=there(words) & wanted)
    for index, value in enumerate(new.range or ()):
        plt.store(pool[1].at[block, jnp.int32(half), kv_head, jnp.int32(index), offset], value, mask=wanted)
