"""Attention to the tokens that are in the pool already: a running softmax over tiles of a context (arXiv:1805.02867).

Letters as in ``new_token``, and C tokens of the context that are visited at a time. Exponents are to base 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_layer.linear import LOWEST
from pallas_kernels.decode_layer.new_token import added, there
from pallas_kernels.paged_attention.instructions import exp2, fma, log2, reciprocal
from pallas_kernels.paged_attention.words import Words

KEYS, VALUES = 0, 1
_SCALE, _ZERO = 0, 1
_TINY = 1e-30
"""Least sum of weights that is divided by; only that of a split that has seen nothing is less."""


class Queries(NamedTuple):
    """Query heads, times what turns scores into exponents of two.

    Attributes:
        parts: [A, W] each, as dots take them.
        total: float32 [A], sum of a query's elements.
        raised: float32 [A], sum of its elements times the bases of their parts.
    """

    parts: tuple[jax.Array, ...]
    total: jax.Array
    raised: jax.Array


@dataclass(frozen=True)
class Context:
    """The older tokens of a program: refs of pool and block tables, its row and KV head, and how many there are."""

    pool: Sequence[Any]
    table: Any
    row: jax.Array
    kv_head: jax.Array
    position: jax.Array


class _Running(NamedTuple):
    """The softmax so far: highest exponent [A], sums [A, C] still to be added up, output [A, W] of each part."""

    peak: jax.Array
    sums: tuple[jax.Array, ...]
    out: tuple[jax.Array, ...]


@dataclass(frozen=True)
class OlderTokens:
    """How a program attends to its split of the older tokens, with all that is known when it is compiled.

    Of a quantised pool scales and zeros apply to exponents and weights, never to elements: with keys ``s·k + z`` the
    product with a query is ``s·(q·k) + z·Σq``. The scale of a value is added to its exponent, so that the running
    softmax bounds the products of weight and scale, and they can be float16.

    Attributes:
        words: how an element of the pool is stored.
        block_size: S.
        tile_n: C, a power of two.
        splits: programs that share a context.
        window: or ``None``.
    """

    words: Words
    block_size: int
    tile_n: int
    splits: int
    window: int | None

    def attend(self, context: Context, queries: Queries, split: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Attention to a split, [A, W] of each part, and the log-sum-exp [A] of its exponents."""
        start, stop = self._range(split, context.position)
        empty = self._empty(queries.total.shape[0])
        return self._finish(lax.fori_loop(start, stop, lambda n, now: self._visit(n, now, context, queries), empty))

    @property
    def _quantized(self) -> bool:
        return self.words.bits is not None

    @property
    def _headroom(self) -> int:
        """Exponent of the largest weight. 2^15 is the largest power of two in float16."""
        return 15 if self._quantized else 0

    def _range(self, split: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tiles of this split, first and last + 1, out of those with older tokens that the query sees."""
        size, splits = self.tile_n, self.splits
        oldest = jnp.int32(0) if self.window is None else lax.div(jnp.maximum(position - self.window + 1, 0), size)
        end = lax.div(jnp.maximum(position, 0) + (size - 1), size)
        share = lax.div(end - oldest + (splits - 1), splits)
        start = oldest + split * share
        return start, jnp.minimum(start + share, end)

    def _empty(self, rows: int) -> _Running:
        sums = (jnp.zeros((rows, self.tile_n), jnp.float32),) * (3 if self._quantized else 1)
        out = (jnp.zeros((rows, self.words.padded), jnp.float32),) * self.words.parts
        return _Running(jnp.full((rows,), LOWEST, jnp.float32), sums, out)

    def _visit(self, index: jax.Array, running: _Running, context: Context, queries: Queries) -> _Running:
        """Add tile ``index`` of the context."""
        positions = index * self.tile_n + jnp.arange(self.tile_n, dtype=jnp.int32)
        place = self._place(context, index, positions)
        keys, values = (self.words.unpack(self._load(context, half, place)) for half in (KEYS, VALUES))
        visible = positions < context.position
        if self.window is not None:
            visible &= positions > context.position - self.window
        exponents = jnp.where(visible[None, :], self._exponents(context, queries, keys, place), -jnp.inf)

        peak = jnp.maximum(running.peak, exponents.max(axis=1))
        shrink = exp2(running.peak - peak)[:, None]
        weights = exp2(exponents - (peak - self._headroom)[:, None])
        narrow = weights.astype(values[0].dtype)
        sums = self._sums(context, place, weights, narrow)
        return _Running(
            peak,
            tuple(fma(before, shrink, new) for before, new in zip(running.sums, sums, strict=True)),
            tuple(out * shrink + plt.dot(narrow, part) for out, part in zip(running.out, values, strict=True)),
        )

    def _place(self, context: Context, index: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Block and offset of the tokens of a tile, [C] each; one block where they all lie in one."""
        offsets = positions & (self.block_size - 1)
        if self.block_size >= self.tile_n:
            per_block = self.block_size // self.tile_n
            return plt.load(context.table.at[context.row, lax.div(index, per_block)]), offsets
        # Entries beyond the context may hold anything; block 0 exists.
        entries = lax.div(positions, self.block_size)
        known = positions < context.position
        return plt.load(context.table.at[context.row, entries], mask=known, other=jnp.int32(0)), offsets

    def _load(self, context: Context, half: int, place: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Words [C, W] of the keys or values at ``place``."""
        block, offsets = place
        block = block[:, None] if block.ndim else block
        word = jnp.arange(self.words.padded, dtype=jnp.int32)
        at = context.pool[0].at[block, jnp.int32(half), context.kv_head, offsets[:, None], word[None, :]]
        if self.words.padded == self.words.count:
            return plt.load(at)
        mask = jnp.broadcast_to(there(self.words)[None, :], (self.tile_n, self.words.padded))
        return plt.load(at, mask=mask, other=jnp.zeros((), context.pool[0].dtype))

    def _ranges(self, context: Context, half: int, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Scales and zeros, float32 [C], of the keys or values at ``place``."""
        block, offsets = place
        scale, zero = (
            plt.load(context.pool[1].at[block, jnp.int32(half), context.kv_head, jnp.int32(which), offsets])
            for which in (_SCALE, _ZERO)
        )
        return scale.astype(jnp.float32), zero.astype(jnp.float32)

    def _exponents(
        self,
        context: Context,
        queries: Queries,
        keys: tuple[jax.Array, ...],
        place: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """float32 [A, C]; the scale of each value is in them."""
        products: list[jax.Array] = [
            plt.dot(query, key, trans_b=True) for query, key in zip(queries.parts, keys, strict=True)
        ]
        if not self._quantized:
            return products[0]
        scale, zero = self._ranges(context, KEYS, place)
        of_values = log2(self._ranges(context, VALUES, place)[0])
        shift = fma(queries.total[:, None], zero[None, :], of_values[None, :])
        return fma(added([*products, -queries.raised[:, None]]), scale[None, :], shift)

    def _sums(
        self, context: Context, place: tuple[jax.Array, jax.Array], weights: jax.Array, narrow: jax.Array
    ) -> tuple[jax.Array, ...]:
        """What a tile adds to the sum of weights; of quantised values, also to those of weights · zero, and · scale."""
        if not self._quantized:
            return (weights,)
        scale, zero = self._ranges(context, VALUES, place)
        rounded, per_scale = narrow.astype(jnp.float32), reciprocal(scale)
        return rounded * per_scale[None, :], rounded * (zero * per_scale)[None, :], rounded

    def _finish(self, running: _Running) -> tuple[list[jax.Array], jax.Array]:
        """The attention to older tokens, [A, W] of each part, and the log-sum-exp [A] of its exponents."""
        total, *others = (each.sum(axis=1) for each in running.sums)
        total = jnp.maximum(total, _TINY)
        out = [part / total[:, None] for part in running.out]
        if others:
            zeros, ones = others
            bases = zip(out, self.words.bases, strict=True)
            out = [part + ((zeros - base * ones) / total)[:, None] for part, base in bases]
        return out, running.peak - self._headroom + log2(total)
