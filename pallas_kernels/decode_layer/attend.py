"""Attention of one new token for each sequence: its query, key and value are finished here, and its KV written.

Kernel 2 of the set, and the combining kernel that more than ``COMBINED_ON_THE_WAY`` splits need. A program serves one KV
head of one sequence and one split of its context. It adds up the parts of the QKV projection, rotates, and walks through
its tiles of older tokens with a running softmax (arXiv:1805.02867); splits are combined by their log-sum-exp
(arXiv:2311.01282). The last split also takes the new token, from registers, and stores it. Exponents are to base 2.

Letters as in ``new_token``, and C tokens of the context that are visited at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_layer.linear import LOWEST, Source, SplitAttention, whole
from pallas_kernels.decode_layer.new_token import NewVector, Projection, encode, store
from pallas_kernels.kv_pool import Pool, block_size, pool_bits, stored
from pallas_kernels.paged_attention.instructions import LOG2_E, exp2, fma, log2, reciprocal
from pallas_kernels.paged_attention.words import Words, as_words, from_words
from pallas_kernels.target import current_target

COMBINED_ON_THE_WAY = 8
"""Most splits that the output projection combines by itself. Each of its programs reads them all once more."""

_KEYS, _VALUES = 0, 1
_SCALE, _ZERO = 0, 1
_TINY = 1e-30
"""Least sum of weights that is divided by; only that of a split that has seen nothing is less."""


@dataclass(frozen=True)
class AttentionTile:
    """``splits`` of every context, visited ``tokens`` at a time."""

    splits: int
    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Heads:
    """N query heads over K KV heads of H elements each."""

    queries: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.queries // self.kv


def attend(
    partials: jax.Array,
    bias: jax.Array | None,
    pool: Pool,
    block_tables: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    heads: Heads,
    rows: int,
    scale: float,
    window: int | None,
    dtype: jnp.dtype,
    tile: AttentionTile,
) -> tuple[Source, Pool]:
    """Attention as the activations of the output projection, and the pool with the new token's keys and values.

    Args:
        partials: float32 [splits, B, K · (N/K + 2) · H], parts of the QKV projection.
        bias: [K · (N/K + 2) · H] or ``None``.
        pool: updated in place; ``block_tables``, ``positions``, ``cos`` and ``sin`` as in ``decode_layer``.
        heads: their numbers and size.
        rows: what B is padded to.
        scale: of the scores.
        window: or ``None``.
        dtype: of the activations.
        tile: how contexts are cut up.
    """
    tokens, arrays = positions.shape[0], as_words(pool)
    words = Words(pool_bits(pool, heads.size), heads.size)
    body = _Attention(words, block_size(pool), heads.group, tile, scale, window, dtype, has_bias=bias is not None)
    if tile.splits == 1:
        results = [jax.ShapeDtypeStruct((rows, heads.queries * heads.size), dtype)]
    else:
        parts = (tile.splits, tokens, heads.queries)
        results = [jax.ShapeDtypeStruct((*parts, heads.size), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    operands = [*arrays, partials, *([] if bias is None else [bias]), block_tables, positions, cos, sin]
    shapes = [*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays), *results]
    outputs = pl.pallas_call(
        body.run,
        grid=(tokens, heads.kv, tile.splits),
        in_specs=[whole(array) for array in operands],
        out_specs=[whole(shape) for shape in shapes],
        out_shape=shapes,
        input_output_aliases={index: index for index in range(len(arrays))},
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=current_target().interpret,
        name="attend",
    )(*operands)
    written, found = from_words(tuple(outputs[: len(arrays)])), outputs[len(arrays) :]
    if tile.splits == 1:
        return found[0], written
    split = SplitAttention(*found, rows=rows, dtype=dtype)
    return (split if tile.splits <= COMBINED_ON_THE_WAY else combine(split)), written


def combine(split: SplitAttention) -> jax.Array:
    """Combine the splits in a kernel of its own, one program for each head of each sequence → [rows, N · H]."""
    x: jax.Array = pl.pallas_call(
        lambda *refs: split.combine_tile(refs[:-1], refs[-1], pl.program_id(0), 1, pl.program_id(1)),
        grid=split.out.shape[1:3],
        in_specs=[whole(array) for array in split.arrays],
        out_specs=whole(split.combined),
        out_shape=split.combined,
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=current_target().interpret,
        name="combine",
    )(*split.arrays)
    return x


class _Queries(NamedTuple):
    """Query heads, times what turns scores into exponents of two.

    Attributes:
        parts: [A, W] each, as dots take them.
        total: float32 [A], sum of a query's elements.
        raised: float32 [A], sum of its elements times the bases of their parts.
    """

    parts: tuple[jax.Array, ...]
    total: jax.Array
    raised: jax.Array


class _Running(NamedTuple):
    """The softmax so far: highest exponent [A], sums [A, C] still to be added up, output [A, W] of each part."""

    peak: jax.Array
    sums: tuple[jax.Array, ...]
    out: tuple[jax.Array, ...]


@dataclass(frozen=True)
class _Context:
    """The older tokens of a program: refs of the pool and the block tables, its row, its KV head, and how many there are."""

    pool: Sequence[Any]
    table: Any
    row: jax.Array
    kv_head: jax.Array
    position: jax.Array


@dataclass(frozen=True)
class _Attention:
    """The kernel, with all that is known when it is compiled.

    Of a quantised pool scales and zeros apply to exponents and weights, never to elements: with keys ``s·k + z`` the
    product with a query is ``s·(q·k) + z·Σq``. The scale of a value is added to its exponent, so that the running softmax
    bounds the products of weight and scale, and they can be float16.
    """

    words: Words
    block_size: int
    group: int
    tile: AttentionTile
    scale: float
    window: int | None
    dtype: jnp.dtype
    has_bias: bool

    def run(self, *refs: Any) -> None:
        """The body. Refs: pool, partials, bias if any, block tables, positions, cos, sin; then pool and results."""
        arrays = 2 if self._quantized else 1
        pool, rest = refs[:arrays], list(refs[arrays:])
        partials, bias = rest.pop(0), rest.pop(0) if self.has_bias else None
        table, positions, cos, sin, *outputs = rest
        row, kv_head, split = (pl.program_id(axis) for axis in range(3))
        position = plt.load(positions.at[row])
        projection = Projection(partials, bias, cos, sin, row, kv_head, self.group, self.words, self.dtype)
        context = _Context(pool, table, row, kv_head, position)

        queries = self._queries(projection)
        start, stop = self._range(split, position)
        running = lax.fori_loop(start, stop, lambda n, carry: self._visit(n, carry, context, queries), self._empty())
        out, weight = self._finish(running)

        has_new = (split == self.tile.splits - 1) & (position >= 0)
        parts = range(self.words.parts)
        key = encode([projection.key(part) for part in parts], self.words, self.dtype)
        value = encode([projection.value(part) for part in parts], self.words, self.dtype)
        out, weight = self._add_new(out, weight, queries, key, value, has_new)
        self._store_result(outputs[arrays:], out, weight, context, split)
        for half, new in ((_KEYS, key), (_VALUES, value)):
            store(outputs[:arrays], half, kv_head, table, row, position, new, self.words, has_new)

    @property
    def _quantized(self) -> bool:
        return self.words.bits is not None

    @property
    def _headroom(self) -> int:
        """Exponent of the largest weight. 2^15 is the largest power of two in float16."""
        return 15 if self._quantized else 0

    @property
    def _heads(self) -> jax.Array:
        """Int32 [A]; tensor cores take 16 rows at least, those beyond the group are nobody's."""
        return jnp.arange(max(16, int(pl.next_power_of_2(self.group))), dtype=jnp.int32)

    @property
    def _there(self) -> jax.Array:
        """Bool [W], words that a vector has."""
        return jnp.arange(self.words.padded, dtype=jnp.int32) < self.words.count

    def _queries(self, projection: Projection) -> _Queries:
        factor = jnp.float32(self.scale * LOG2_E)
        dtype = jnp.float16 if self._quantized else self.dtype
        parts = tuple(
            (projection.query(part, self._heads) * factor).astype(dtype) for part in range(self.words.parts)
        )
        sums = [part.astype(jnp.float32).sum(axis=1) for part in parts]
        raised = [base * part for base, part in zip(self.words.bases, sums, strict=True)]
        return _Queries(parts, _added(sums), _added(raised))

    def _range(self, split: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tiles of this split, first and last + 1, out of those with older tokens that the query sees."""
        size, splits = self.tile.tokens, self.tile.splits
        oldest = jnp.int32(0) if self.window is None else lax.div(jnp.maximum(position - self.window + 1, 0), size)
        end = lax.div(jnp.maximum(position, 0) + (size - 1), size)
        share = lax.div(end - oldest + (splits - 1), splits)
        start = oldest + split * share
        return start, jnp.minimum(start + share, end)

    def _empty(self) -> _Running:
        rows = self._heads.shape[0]
        sums = (jnp.zeros((rows, self.tile.tokens), jnp.float32),) * (3 if self._quantized else 1)
        out = (jnp.zeros((rows, self.words.padded), jnp.float32),) * self.words.parts
        return _Running(jnp.full((rows,), LOWEST, jnp.float32), sums, out)

    def _visit(self, index: jax.Array, running: _Running, context: _Context, queries: _Queries) -> _Running:
        """Add tile ``index`` of the context."""
        positions = index * self.tile.tokens + jnp.arange(self.tile.tokens, dtype=jnp.int32)
        place = self._place(context, index, positions)
        keys, values = (self.words.unpack(self._load(context, half, place)) for half in (_KEYS, _VALUES))
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

    def _place(self, context: _Context, index: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Block and offset of the tokens of a tile, [C] each; one block where they all lie in one."""
        offsets = positions & (self.block_size - 1)
        if self.block_size >= self.tile.tokens:
            per_block = self.block_size // self.tile.tokens
            return plt.load(context.table.at[context.row, lax.div(index, per_block)]), offsets
        # Entries beyond the context may hold anything; block 0 exists.
        entries = lax.div(positions, self.block_size)
        known = positions < context.position
        return plt.load(context.table.at[context.row, entries], mask=known, other=jnp.int32(0)), offsets

    def _load(self, context: _Context, half: int, place: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Words [C, W] of the keys or values at ``place``."""
        block, offsets = place
        block = block[:, None] if block.ndim else block
        word = jnp.arange(self.words.padded, dtype=jnp.int32)
        at = context.pool[0].at[block, jnp.int32(half), context.kv_head, offsets[:, None], word[None, :]]
        if self.words.padded == self.words.count:
            return plt.load(at)
        mask = jnp.broadcast_to(self._there[None, :], (self.tile.tokens, self.words.padded))
        return plt.load(at, mask=mask, other=jnp.zeros((), context.pool[0].dtype))

    def _ranges(self, context: _Context, half: int, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Scales and zeros, float32 [C], of the keys or values at ``place``."""
        block, offsets = place
        scale, zero = (
            plt.load(context.pool[1].at[block, jnp.int32(half), context.kv_head, jnp.int32(which), offsets])
            for which in (_SCALE, _ZERO)
        )
        return scale.astype(jnp.float32), zero.astype(jnp.float32)

    def _exponents(
        self,
        context: _Context,
        queries: _Queries,
        keys: tuple[jax.Array, ...],
        place: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """float32 [A, C]; the scale of each value is in them."""
        products = [plt.dot(query, key, trans_b=True) for query, key in zip(queries.parts, keys, strict=True)]
        if not self._quantized:
            return products[0]
        scale, zero = self._ranges(context, _KEYS, place)
        of_values = log2(self._ranges(context, _VALUES, place)[0])
        shift = fma(queries.total[:, None], zero[None, :], of_values[None, :])
        return fma(_added([*products, -queries.raised[:, None]]), scale[None, :], shift)

    def _sums(
        self, context: _Context, place: tuple[jax.Array, jax.Array], weights: jax.Array, narrow: jax.Array
    ) -> tuple[jax.Array, ...]:
        """What a tile adds to the sum of weights; of quantised values, also to those of weights · zero, and · scale."""
        if not self._quantized:
            return (weights,)
        scale, zero = self._ranges(context, _VALUES, place)
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

    def _add_new(
        self,
        out: list[jax.Array],
        weight: jax.Array,
        queries: _Queries,
        key: NewVector,
        value: NewVector,
        has_new: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        """Take the new token in, if this split has it."""
        products = zip(queries.parts, key.parts, strict=True)
        exponent = _added([(query.astype(jnp.float32) * part[None, :]).sum(axis=1) for query, part in products])
        exponent = jnp.where(has_new, exponent, -jnp.inf)
        peak = jnp.maximum(weight, exponent)
        older, newest = exp2(weight - peak), exp2(exponent - peak)
        total = older + newest
        older, newest = (older / total)[:, None], (newest / total)[:, None]
        parts = zip(out, value.parts, strict=True)
        return [before * older + new[None, :] * newest for before, new in parts], peak + log2(total)

    def _store_result(
        self, refs: Sequence[Any], out: list[jax.Array], weight: jax.Array, context: _Context, split: jax.Array
    ) -> None:
        heads, real = context.kv_head * self.group + self._heads, self._heads < self.group
        mask = real[:, None] & self._there[None, :]
        for part, values in enumerate(out):
            elements = self.words.elements(part)[None, :]
            if self.tile.splits == 1:
                at = refs[0].at[context.row, heads[:, None] * self.words.head_dim + elements]
            else:
                at = refs[0].at[split, context.row, heads[:, None], elements]
            plt.store(at, values.astype(refs[0].dtype), mask=mask)
        if self.tile.splits > 1:
            plt.store(refs[1].at[split, context.row, heads], weight, mask=real)


def _added(terms: Sequence[jax.Array]) -> jax.Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
