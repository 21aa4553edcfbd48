"""A context in a paged pool, as kernels attend to it: a running softmax over tiles of it (arXiv:1805.02867).

Exponents are to base 2. Scales and zeros apply to exponents and weights, never to elements. With keys ``s·k + z`` the
product with a query is ``s·(q·k) + z·Σq``. The weight of a value ``s·v + z`` is multiplied by s in its exponent: so the
running softmax holds the products, rather than the weights, below a power of two, and none is lost when they become
float16. Divided by s again they give the sum of weights.

Letters besides the glossary's: A rows of a program's matrices, which are queries, C tokens of the context that it
visits at a time, W words of a vector (``words``), which hold it in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.paged_attention.instructions import exp2, fma, log2, reciprocal
from pallas_kernels.paged_attention.words import Words

KEYS, VALUES = 0, 1
_SCALE, _ZERO = 0, 1

_LOWEST = -1e30
"""Peak of a query that has seen nothing: finite, so that differences of peaks are numbers."""

_TINY = 1e-30
"""Least sum of weights that is divided by; only that of a query that has seen nothing is less."""


class Queries(NamedTuple):
    """The rows of a program's matrices.

    Attributes:
        parts: [A, W] each, taken apart like the words of keys.
        total: float32 [A], sum of a query's elements.
        raised: float32 [A], sum of its elements times the bases of their parts.
    """

    parts: tuple[jax.Array, ...]
    total: jax.Array
    raised: jax.Array

    @classmethod
    def of(cls, parts: Sequence[jax.Array], words: Words) -> Queries:
        """Queries whose elements lie in ``parts`` as those of keys lie in ``words``."""
        sums = [part.astype(jnp.float32).sum(axis=1) for part in parts]
        raised = [base * part for base, part in zip(words.bases, sums, strict=True)]
        return cls(tuple(parts), reduce(jnp.add, sums), reduce(jnp.add, raised))


class Range(NamedTuple):
    """Scale and zero of quantised vectors, float32 [C]."""

    scale: jax.Array
    zero: jax.Array


class Tile(NamedTuple):
    """Some tokens of a context.

    Attributes:
        positions: int32 [C], from a multiple of C on.
        keys: [C, W] of each part, as ``Words.unpack`` gives them.
        values: likewise.
        range_of: reads the range of ``KEYS`` or ``VALUES``, where it is used: held from the start it takes registers.
            ``None`` in a pool of floats.
    """

    positions: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    range_of: Callable[[int], Range] | None

    def exponents(
        self, queries: Queries, factor: float = 1.0, cap: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """Products of queries and keys, ``cap`` of them if any, times ``factor``; with the scale of each value in them.

        Returns:
            float32 [A, C].
        """
        products = (plt.dot(query, key, trans_b=True) for query, key in zip(queries.parts, self.keys, strict=True))
        if self.range_of is None:
            (scores,) = products
            return (cap(scores) if cap else scores) * factor
        # Each dot is added before the next is asked for: so tensor cores do the additions, this first one included.
        scores = reduce(jnp.add, products, -queries.raised[:, None])
        (scale, zero), total = self.range_of(KEYS), queries.total[:, None]
        of_values = log2(self.range_of(VALUES).scale)[None, :]
        if cap:
            return fma(cap(fma(scores, scale[None, :], total * zero[None, :])), jnp.float32(factor), of_values)
        return fma(scores, (scale * factor)[None, :], fma(total, (zero * factor)[None, :], of_values))

    def sums(self, weights: jax.Array, narrow: jax.Array) -> tuple[jax.Array, ...]:
        """What the tile adds to the sums of ``Running``, [A, C] each; ``narrow`` are the weights that values get."""
        if self.range_of is None:
            return (weights,)
        scale, zero = self.range_of(VALUES)
        rounded, per_scale = narrow.astype(jnp.float32), reciprocal(scale)
        return rounded * per_scale[None, :], rounded * (zero * per_scale)[None, :], rounded


class Running(NamedTuple):
    """The softmax so far.

    Attributes:
        peak: float32 [A], highest exponent.
        sums: float32 [A, C], still to be added up, or [A, 1]: of weights; of quantised values, whose weights are
            multiplied by their scales, also of weights times zeros, and of the products.
        out: float32 [A, W] of each part.
    """

    peak: jax.Array
    sums: tuple[jax.Array, ...]
    out: tuple[jax.Array, ...]

    @property
    def _headroom(self) -> int:
        """Exponent of the largest weight. 2^15 is the largest power of two in float16."""
        return 15 if len(self.sums) > 1 else 0

    def add(self, tile: Tile, exponents: jax.Array) -> Running:
        """The softmax with a tile, of float32 [A, C] ``exponents``; those of tokens that are not seen are -inf."""
        peak = jnp.maximum(self.peak, exponents.max(axis=1))
        shrink = exp2(self.peak - peak)[:, None]
        weights = exp2(exponents - (peak - self._headroom)[:, None])
        narrow = weights.astype(tile.values[0].dtype)
        sums = tile.sums(weights, narrow)
        if self.sums[0].shape[1] == 1:
            sums = tuple(each.sum(axis=1, keepdims=True) for each in sums)
        return Running(
            peak,
            tuple(fma(before, shrink, new) for before, new in zip(self.sums, sums, strict=True)),
            tuple(out * shrink + plt.dot(narrow, part) for out, part in zip(self.out, tile.values, strict=True)),
        )

    def finish(self, words: Words) -> tuple[list[jax.Array], jax.Array]:
        """The attention, float32 [A, W] of each part, and the log-sum-exp [A] of all exponents."""
        total, *others = (each.sum(axis=1) for each in self.sums)
        total = jnp.maximum(total, _TINY)
        out = [part / total[:, None] for part in self.out]
        if others:
            zeros, ones = others
            bases = zip(out, words.bases, strict=True)
            out = [part + ((zeros - base * ones) / total)[:, None] for part, base in bases]
        return out, self.peak - self._headroom + log2(total)


@dataclass(frozen=True)
class Context:
    """The tokens that a program attends to.

    Attributes:
        words: how an element of the pool is stored.
        tile_n: C, a power of two.
        pool: refs of the pool's arrays, in words.
        table: ref of the block tables, int32 [R, M].
        row: of R.
        kv_head: of K.
        end: position behind the last token.
    """

    words: Words
    tile_n: int
    pool: Sequence[Any]
    table: Any
    row: jax.Array
    kv_head: jax.Array
    end: jax.Array

    def share(
        self, split: jax.Array, splits: int, position: jax.Array, window: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """The tiles of one of ``splits``, first and last + 1, of those that queries from ``position`` on see."""
        size = self.tile_n
        oldest = jnp.int32(0) if window is None else lax.div(jnp.maximum(position - window + 1, 0), size)
        tiles = jnp.maximum(lax.div(self.end + (size - 1), size) - oldest, 0)
        share = lax.div(tiles + (splits - 1), splits)
        return oldest + jnp.minimum(split * share, tiles), oldest + jnp.minimum((split + 1) * share, tiles)

    def nothing(self, queries: Queries) -> Running:
        """The softmax before the first tile.

        Few rows are spread over the warps by tokens of the context: adding those up takes shared memory, and waiting,
        so that sums are left for the end. More rows need the registers of unfinished sums, and each lies in one warp.
        """
        rows = queries.total.shape[0]
        sums = jnp.zeros((rows, self.tile_n if rows < 32 else 1), jnp.float32)
        out = jnp.zeros((rows, self.words.padded), jnp.float32)
        peak = jnp.full((rows,), _LOWEST, jnp.float32)
        return Running(peak, (sums,) * (1 if self.words.bits is None else 3), (out,) * self.words.parts)

    def tile(self, index: jax.Array) -> Tile:
        """Read a tile; what lies in it behind the context is anything."""
        positions = index * self.tile_n + jnp.arange(self.tile_n, dtype=jnp.int32)
        block, offsets = self._blocks(index, positions), positions & (self._block_size - 1)
        keys, values = (self.words.unpack(self._load(block, offsets, half)) for half in (KEYS, VALUES))
        return Tile(positions, keys, values, partial(self._range, block, offsets) if len(self.pool) > 1 else None)

    @property
    def _block_size(self) -> int:
        size: int = self.pool[0].shape[3]
        return size

    def _blocks(self, index: jax.Array, positions: jax.Array) -> jax.Array:
        """Blocks of the tokens of a tile, [C]; one block, a scalar, where they all lie in one."""
        if self._block_size >= self.tile_n:
            return plt.load(self.table.at[self.row, lax.div(index, self._block_size // self.tile_n)])
        entries = lax.div(positions, self._block_size)
        # Entries beyond the context may hold anything; block 0 exists.
        return plt.load(self.table.at[self.row, entries], mask=positions < self.end, other=jnp.int32(0))

    def _load(self, block: jax.Array, offsets: jax.Array, half: int) -> jax.Array:
        """Words [C, W] of keys or values."""
        block = block[:, None] if block.ndim else block
        word = jnp.arange(self.words.padded, dtype=jnp.int32)
        at = self.pool[0].at[block, jnp.int32(half), self.kv_head, offsets[:, None], word[None, :]]
        if self.words.padded == self.words.count:
            return plt.load(at)
        mask = jnp.broadcast_to(there(self.words)[None, :], (self.tile_n, self.words.padded))
        return plt.load(at, mask=mask, other=jnp.zeros((), self.pool[0].dtype))

    def _range(self, block: jax.Array, offsets: jax.Array, half: int) -> Range:
        """Scales and zeros of keys or values."""
        at = (self.pool[1].at[block, jnp.int32(half), self.kv_head, jnp.int32(i), offsets] for i in (_SCALE, _ZERO))
        return Range(*(plt.load(each).astype(jnp.float32) for each in at))


def there(words: Words) -> jax.Array:
    """Bool [W], which words a vector has."""
    return jnp.arange(words.padded, dtype=jnp.int32) < words.count
