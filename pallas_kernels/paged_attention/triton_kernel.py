"""The kernel: a running softmax over tiles of a context's keys and values (arXiv:1805.02867).

A program has a tile of a row's query tokens, with all query heads of one KV head as the rows of one matrix, and one
split of the context. Where few programs would each read a long context, more of them share it, and what they found is
combined by its log-sum-exp (arXiv:2311.01282). Exponents are to base 2.

Letters besides the glossary's: A rows of a program's matrices, C tokens of the context that it visits at a time, W
words of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.paged_attention.instructions import LOG2_E, exp2, fma, log2, reciprocal, tanh
from pallas_kernels.paged_attention.words import Words

_KEYS, _VALUES = 0, 1
_SCALE, _ZERO = 0, 1

_LOWEST = -1e30
"""Peak of a row that has seen nothing: finite, so that differences of peaks are numbers."""

_TINY = 1e-30
"""Least sum of weights that is divided by; only that of a row that has seen nothing is less."""


class _Queries(NamedTuple):
    """A tile of queries.

    Attributes:
        parts: [A, W] each, taken apart like the words of keys.
        total: float32 [A], sum of a query's elements.
        raised: float32 [A], sum of its elements times the bases of their parts.
        positions: int32 [A, 1], or [1, 1] where all are of one token.
        tokens: int32 [A], where they stand in the row of the call.
        heads: int32 [A], their query head within the group.
        real: bool [A], false for rows that only fill the matrix.
    """

    parts: tuple[jax.Array, ...]
    total: jax.Array
    raised: jax.Array
    positions: jax.Array
    tokens: jax.Array
    heads: jax.Array
    real: jax.Array


class _Running(NamedTuple):
    """The softmax so far: highest logit [A], sums [A, C] still to be added up or [A, 1], output [A, W] of each part."""

    peak: jax.Array
    sums: tuple[jax.Array, ...]
    out: tuple[jax.Array, ...]


@dataclass(frozen=True)
class _Source:
    """The context of a program: references to the pool and to the block table of its row, its KV head, its end."""

    pool: Sequence[Any]
    table: Any
    row: jax.Array
    kv_head: jax.Array
    end: jax.Array


@dataclass(frozen=True)
class TritonKernel:
    """What is known of a call when it is compiled.

    Scales and zeros apply to logits and weights, never to elements. With keys ``s·k + z`` the product with a query is
    ``s·(q·k) + z·Σq``. The weight of a value ``s·v + z`` is multiplied by s in its exponent: so the running softmax
    holds the products, rather than the weights, below a power of two, and none is lost when they become float16.
    Divided by s again they give the sum of weights.

    Attributes:
        words: how an element of the pool is stored.
        block_size: S.
        group: query heads of a KV head.
        tokens: query tokens of a program.
        tile_n: C, a power of two.
        splits: programs that share a context.
        scale: of the scores.
        window: or ``None``.
        softcap: or ``None``.
    """

    words: Words
    block_size: int
    group: int
    tokens: int
    tile_n: int
    splits: int
    scale: float
    window: int | None
    softcap: float | None

    def run(self, q_ref: Any, *refs: Any) -> None:
        """The body. References: q, the pool's arrays, block tables, first positions, lengths, then the outputs."""
        arrays = 2 if self._quantized else 1
        pool, (tables, firsts, lengths, *outputs) = refs[:arrays], refs[arrays:]
        row, kv_head = pl.program_id(0), pl.program_id(1)
        tile, split = lax.div(pl.program_id(2), self.splits), lax.rem(pl.program_id(2), self.splits)
        start = tile * self.tokens
        first = plt.load(firsts.at[row]) + start
        real = jnp.minimum(plt.load(lengths.at[row]) - start, self.tokens)
        source = _Source(pool, tables, row, kv_head, jnp.where(real > 0, first + real, 0))

        begin, whole, stop = self._range(split, first, source.end)
        queries = self._queries(q_ref, row, kv_head, start, first)
        visit = partial(self._visit, source=source, queries=queries)
        running = lax.fori_loop(begin, whole, partial(visit, masked=False), self._empty(queries))
        running = lax.fori_loop(whole, stop, partial(visit, masked=True), running)
        out, weight = self._finish(running)
        self._store(outputs, out, weight, queries, split, row, kv_head)

    @property
    def _quantized(self) -> bool:
        return self.words.bits is not None

    @property
    def _headroom(self) -> int:
        """Exponent of the largest weight. 2^15 is the largest power of two in float16."""
        return 15 if self._quantized else 0

    def _range(self, split: jax.Array, first: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tiles of the context for this split: first, first that some query does not see all of, and last + 1."""
        oldest = jnp.int32(0) if self.window is None else lax.div(jnp.maximum(first - self.window + 1, 0), self.tile_n)
        tiles = jnp.maximum(lax.div(end + self.tile_n - 1, self.tile_n) - oldest, 0)
        share = lax.div(tiles + self.splits - 1, self.splits)
        begin, stop = (oldest + jnp.minimum(n * share, tiles) for n in (split, split + 1))
        whole = begin if self.window else jnp.clip(lax.div(first + 1, self.tile_n), begin, stop)
        return begin, whole, stop

    def _queries(self, q_ref: Any, row: jax.Array, kv_head: jax.Array, start: jax.Array, first: jax.Array) -> _Queries:
        padded = pl.next_power_of_2(self.group)
        index = jnp.arange(max(16, self.tokens * padded), dtype=jnp.int32)
        tokens, heads = lax.div(index, padded), lax.rem(index, padded)
        real = (tokens < self.tokens) & (start + tokens < q_ref.shape[1]) & (heads < self.group)
        dtype = jnp.float16 if self._quantized else q_ref.dtype
        parts: list[jax.Array] = []
        total = raised = jnp.zeros(index.shape, jnp.float32)
        for part, base in enumerate(self.words.bases):
            elements = self.words.elements(part)
            at = q_ref.at[row, (start + tokens)[:, None], kv_head, heads[:, None], elements[None, :]]
            q = plt.load(at, mask=real[:, None] & self._there[None, :], other=jnp.zeros((), q_ref.dtype)).astype(dtype)
            added = q.astype(jnp.float32).sum(axis=1)
            parts, total, raised = [*parts, q], total + added, raised + base * added
        positions = (first + tokens)[:, None] if self.tokens > 1 else jnp.full((1, 1), first)
        return _Queries(tuple(parts), total, raised, positions, start + tokens, heads, real)

    @property
    def _there(self) -> jax.Array:
        """Bool [W], words that a vector has."""
        return jnp.arange(self.words.padded, dtype=jnp.int32) < self.words.count

    def _empty(self, queries: _Queries) -> _Running:
        rows = queries.total.shape[0]
        width = self.tile_n if self._defers(rows) else 1
        sums = (jnp.zeros((rows, width), jnp.float32),) * (3 if self._quantized else 1)
        out = (jnp.zeros((rows, self.words.padded), jnp.float32),) * self.words.parts
        return _Running(jnp.full((rows,), _LOWEST, jnp.float32), sums, out)

    @staticmethod
    def _defers(rows: int) -> bool:
        """Whether sums along the context are left for the end.

        Few rows are spread over the warps by tokens of the context: adding those up takes shared memory, and waiting.
        More rows need the registers that unfinished sums would take, and each lies in one warp.
        """
        return rows < 32

    def _visit(
        self, index: jax.Array, running: _Running, *, source: _Source, queries: _Queries, masked: bool
    ) -> _Running:
        """Add tile ``index`` of the context."""
        positions = index * self.tile_n + jnp.arange(self.tile_n, dtype=jnp.int32)
        place = self._place(source, index, positions)
        keys, values = (self.words.unpack(self._load(source, half, place)) for half in (_KEYS, _VALUES))
        logits = self._logits(source, queries, keys, place)
        if masked:
            age = queries.positions - positions[None, :]
            visible = (age >= 0) if self.window is None else (age >= 0) & (age < self.window)
            logits = jnp.where(visible, logits, -jnp.inf)

        peak = jnp.maximum(running.peak, logits.max(axis=1))
        shrink = exp2(running.peak - peak)[:, None]
        weights = exp2(logits - (peak - self._headroom)[:, None])
        narrow = weights.astype(values[0].dtype)
        sums = self._sums(source, place, weights, narrow)
        if not self._defers(peak.shape[0]):
            sums = tuple(each.sum(axis=1, keepdims=True) for each in sums)
        return _Running(
            peak,
            tuple(fma(before, shrink, new) for before, new in zip(running.sums, sums, strict=True)),
            tuple(out * shrink + plt.dot(narrow, part) for out, part in zip(running.out, values, strict=True)),
        )

    def _place(self, source: _Source, index: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Block and offset of the tokens of a tile, [C] each; one block where they all lie in one."""
        offsets = positions & (self.block_size - 1)
        if self.block_size >= self.tile_n:
            return plt.load(source.table.at[source.row, lax.div(index, self.block_size // self.tile_n)]), offsets
        entries = lax.div(positions, self.block_size)
        # Entries beyond the context may hold anything; block 0 exists.
        blocks = plt.load(source.table.at[source.row, entries], mask=positions < source.end, other=jnp.int32(0))
        return blocks, offsets

    def _load(self, source: _Source, half: int, place: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Words [C, W] of the keys or values at ``place``."""
        block, offsets = place
        block = block[:, None] if block.ndim else block
        word = jnp.arange(self.words.padded, dtype=jnp.int32)
        at = source.pool[0].at[block, jnp.int32(half), source.kv_head, offsets[:, None], word[None, :]]
        if self.words.padded == self.words.count:
            return plt.load(at)
        mask = jnp.broadcast_to(self._there[None, :], (self.tile_n, self.words.padded))
        return plt.load(at, mask=mask, other=jnp.zeros((), source.pool[0].dtype))

    def _range_of(self, source: _Source, half: int, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Scales and zeros, float32 [C], of the keys or values at ``place``."""
        block, offsets = place
        scale, zero = (
            plt.load(source.pool[1].at[block, jnp.int32(half), source.kv_head, jnp.int32(which), offsets])
            for which in (_SCALE, _ZERO)
        )
        return scale.astype(jnp.float32), zero.astype(jnp.float32)

    def _logits(
        self, source: _Source, queries: _Queries, keys: tuple[jax.Array, ...], place: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """float32 [A, C], times log2 of e; the scale of each value is in the exponent too."""
        raised = jnp.broadcast_to(-queries.raised[:, None], (queries.total.shape[0], self.tile_n))
        scores = raised if self._quantized else None
        for query, key in zip(queries.parts, keys, strict=True):
            product = plt.dot(query, key, trans_b=True)
            scores = product if scores is None else scores + product
        assert scores is not None
        factor = LOG2_E * (self.scale if self.softcap is None else self.softcap)
        if not self._quantized:
            return self._capped(scores) * factor
        scale, zero = self._range_of(source, _KEYS, place)
        of_values = log2(self._range_of(source, _VALUES, place)[0])
        if self.softcap is not None:
            return fma(self._capped(fma(scores, scale, queries.total[:, None] * zero)), jnp.float32(factor), of_values)
        shift = fma(queries.total[:, None], (zero * factor)[None, :], of_values[None, :])
        return fma(scores, (scale * factor)[None, :], shift)

    def _capped(self, scores: jax.Array) -> jax.Array:
        return scores if self.softcap is None else tanh(scores * (self.scale / self.softcap))

    def _sums(
        self, source: _Source, place: tuple[jax.Array, jax.Array], weights: jax.Array, narrow: jax.Array
    ) -> tuple[jax.Array, ...]:
        """What a tile adds to the sum of weights; of quantised values, also to those of weights · zero, and · scale."""
        if not self._quantized:
            return (weights,)
        scale, zero = self._range_of(source, _VALUES, place)
        rounded, per_scale = narrow.astype(jnp.float32), reciprocal(scale)
        return rounded * per_scale[None, :], rounded * (zero * per_scale)[None, :], rounded

    def _finish(self, running: _Running) -> tuple[list[jax.Array], jax.Array]:
        """The output [A, W] of each part, and the log-sum-exp [A] of all logits."""
        total, *rest = (each.sum(axis=1) for each in running.sums)
        total = jnp.maximum(total, _TINY)
        out = [part / total[:, None] for part in running.out]
        if self._quantized:
            zeros, ones = rest
            out = [
                part + ((zeros - base * ones) / total)[:, None]
                for part, base in zip(out, self.words.bases, strict=True)
            ]
        return out, running.peak - self._headroom + log2(total)

    def _store(
        self,
        outputs: Sequence[Any],
        out: list[jax.Array],
        weight: jax.Array,
        queries: _Queries,
        split: jax.Array,
        row: jax.Array,
        kv_head: jax.Array,
    ) -> None:
        lead = () if self.splits == 1 else (split,)
        for part, values in enumerate(out):
            tokens, heads, elements = queries.tokens[:, None], queries.heads[:, None], self.words.elements(part)
            at = outputs[0].at[(*lead, row, tokens, kv_head, heads, elements[None, :])]
            plt.store(at, values.astype(outputs[0].dtype), mask=queries.real[:, None] & self._there[None, :])
        if self.splits > 1:
            plt.store(outputs[1].at[split, row, queries.tokens, kv_head, queries.heads], weight, mask=queries.real)
