"""Attention of one new token for each sequence: its query, key and value are finished here, and its KV written.

Kernel 2 of the set, and the combining kernel that more than ``COMBINED_ON_THE_WAY`` splits need. A program serves one
KV head of one sequence and one split of its context. It adds up the parts of the QKV projection, rotates, and attends
to the older tokens; the last split also takes the new token, from registers, and stores it. Splits are combined by
their log-sum-exp (arXiv:2311.01282). Exponents are to base 2, letters as in
``pallas_kernels.paged_attention.context``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_layer.call import DecodeLayerCall
from pallas_kernels.decode_layer.linear import Source, SplitAttention, whole
from pallas_kernels.decode_layer.new_token import NewVector, Projection, encode, store
from pallas_kernels.kv_pool import Pool, pool_bits
from pallas_kernels.paged_attention.context import KEYS, VALUES, Context, Queries, Running, there
from pallas_kernels.paged_attention.instructions import LOG2_E, exp2, log2
from pallas_kernels.paged_attention.words import Words, as_words, from_words
from pallas_kernels.target import current_target

COMBINED_ON_THE_WAY = 8
"""Most splits that the output projection combines by itself. Each of its programs reads them all once more."""


@dataclass(frozen=True)
class AttentionTile:
    """``splits`` of every context, visited ``tokens`` at a time."""

    splits: int
    tokens: int
    num_warps: int
    num_stages: int


def attend(call: DecodeLayerCall, partials: jax.Array, tile: AttentionTile) -> tuple[Source, Pool]:
    """Attention as the activations of the output projection, and the pool with the new token's keys and values.

    Args:
        call: of the layer; its pool is updated in place.
        partials: float32 [splits, B, K · (N/K + 2) · H], parts of the QKV projection, without the bias.
        tile: how contexts are divided.
    """
    heads, tokens, dtype = call.heads, call.tokens, call.x.dtype
    bias, arrays, rows = call.weights.bqkv, as_words(call.pool), call.x.shape[0]
    words = Words(pool_bits(call.pool, heads.size), heads.size)
    scores = call.scores
    body = _Attention(words, tile, heads.group, scores.scale, scores.window, dtype, has_bias=bias is not None)
    if tile.splits == 1:
        results = [jax.ShapeDtypeStruct((rows, heads.queries * heads.size), dtype)]
    else:
        parts = (tile.splits, tokens, heads.queries)
        results = [jax.ShapeDtypeStruct((*parts, heads.size), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    per_token = (call.block_tables, call.positions, call.cos, call.sin)
    operands = [*arrays, partials, *([] if bias is None else [bias]), *per_token]
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
        name="decode_layer_attend",
    )(*operands)
    written, found = from_words(tuple(outputs[: len(arrays)])), outputs[len(arrays) :]
    if tile.splits == 1:
        return found[0], written
    split = SplitAttention(found[0], found[1], rows, dtype)
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
        name="decode_layer_combine",
    )(*split.arrays)
    return x


@dataclass(frozen=True)
class _Attention:
    """The kernel, with all that is known when it is compiled."""

    words: Words
    tile: AttentionTile
    group: int
    scale: float
    window: int | None
    dtype: jnp.dtype
    has_bias: bool

    def run(self, *refs: Any) -> None:
        """The body. Refs: pool, partials, bias if any, block tables, positions, cos, sin; then pool and results."""
        arrays = 1 if self.words.bits is None else 2
        pool, rest = refs[:arrays], list(refs[arrays:])
        partials, bias = rest.pop(0), rest.pop(0) if self.has_bias else None
        table, positions, cos, sin, *outputs = rest
        row, kv_head, split = (pl.program_id(axis) for axis in range(3))
        position = plt.load(positions.at[row])
        projection = Projection(partials, bias, cos, sin, row, kv_head, self.group, self.words, self.dtype)
        context = Context(self.words, self.tile.tokens, pool, table, row, kv_head, position)

        queries = self._queries(projection)
        out, weight = self._older(context, queries, split).finish(self.words)

        has_new = (split == self.tile.splits - 1) & (position >= 0)
        parts = range(self.words.parts)
        key = encode([projection.key(part) for part in parts], self.words, self.dtype)
        value = encode([projection.value(part) for part in parts], self.words, self.dtype)
        out, weight = self._add_new(out, weight, queries, key, value, has_new)
        self._store_result(outputs[arrays:], out, weight, context, split)
        for half, new in ((KEYS, key), (VALUES, value)):
            store(outputs[:arrays], half, kv_head, table, row, position, new, self.words, has_new)

    @property
    def _heads(self) -> jax.Array:
        """Int32 [A]; tensor cores take 16 rows at least, those beyond the group are nobody's."""
        return jnp.arange(max(16, int(pl.next_power_of_2(self.group))), dtype=jnp.int32)

    def _queries(self, projection: Projection) -> Queries:
        """Query heads, times what turns their products with keys into exponents."""
        factor = jnp.float32(self.scale * LOG2_E)
        dtype = self.dtype if self.words.bits is None else jnp.float16
        parts = [(projection.query(part, self._heads) * factor).astype(dtype) for part in range(self.words.parts)]
        return Queries.of(parts, self.words)

    def _older(self, context: Context, queries: Queries, split: jax.Array) -> Running:
        """Attend to this split of the tokens that are in the pool already."""
        position = context.end

        def visit(index: jax.Array, running: Running) -> Running:
            tile = context.tile(index)
            visible = tile.positions < position
            if self.window is not None:
                visible &= tile.positions > position - self.window
            return running.add(tile, jnp.where(visible[None, :], tile.exponents(queries), -jnp.inf))

        start, stop = context.share(split, self.tile.splits, position, self.window)
        running: Running = lax.fori_loop(start, stop, visit, context.nothing(queries))
        return running

    def _add_new(
        self,
        out: list[jax.Array],
        weight: jax.Array,
        queries: Queries,
        key: NewVector,
        value: NewVector,
        has_new: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        """Take the new token in, if this split has it."""
        pairs = zip(queries.parts, key.parts, strict=True)
        products = [(query.astype(jnp.float32) * part[None, :]).sum(axis=1) for query, part in pairs]
        exponent = jnp.where(has_new, reduce(jnp.add, products), -jnp.inf)
        peak = jnp.maximum(weight, exponent)
        older, newest = exp2(weight - peak), exp2(exponent - peak)
        total = older + newest
        older, newest = (older / total)[:, None], (newest / total)[:, None]
        parts = zip(out, value.parts, strict=True)
        return [before * older + new[None, :] * newest for before, new in parts], peak + log2(total)

    def _store_result(
        self, refs: Sequence[Any], out: list[jax.Array], weight: jax.Array, context: Context, split: jax.Array
    ) -> None:
        heads, real = context.kv_head * self.group + self._heads, self._heads < self.group
        mask = real[:, None] & there(self.words)[None, :]
        for part, values in enumerate(out):
            elements = self.words.elements(part)[None, :]
            if self.tile.splits == 1:
                at = refs[0].at[context.row, heads[:, None] * self.words.head_dim + elements]
            else:
                at = refs[0].at[split, context.row, heads[:, None], elements]
            plt.store(at, values.astype(refs[0].dtype), mask=mask)
        if self.tile.splits > 1:
            plt.store(refs[1].at[split, context.row, heads], weight, mask=real)
