"""The kernel for GPUs from Ampere on: tiles of query tokens attend to a context (``context``).

A program has a tile of a row's query tokens, with all query heads of one KV head as the rows of one matrix, and one
split of the context. Where few programs would each read a long context, more of them share it, and what they found is
combined by its log-sum-exp (arXiv:2311.01282). Letters as in ``context``.
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

from pallas_kernels.paged_attention.context import Context, Queries, Running, there
from pallas_kernels.paged_attention.instructions import LOG2_E, exp2, fma, log2, tanh
from pallas_kernels.paged_attention.words import Words


class _Rows(NamedTuple):
    """What the rows of a program's matrices are.

    Attributes:
        positions: int32 [A, 1], or [1, 1] where all are of one token.
        tokens: int32 [A], where they stand in the row of the call.
        heads: int32 [A], their query head within the group.
        real: bool [A], false for rows that only fill the matrix.
    """

    positions: jax.Array
    tokens: jax.Array
    heads: jax.Array
    real: jax.Array


@dataclass(frozen=True)
class TritonKernel:
    """What is known of a call when it is compiled.

    Attributes:
        words: how an element of the pool is stored.
        group: query heads of a KV head.
        tokens: query tokens of a program.
        tile_n: C, a power of two.
        splits: programs that share a context.
        scale: of the scores.
        window: or ``None``.
        softcap: or ``None``.
        has_slopes: whether ALiBi slopes are an operand.
        has_sinks: whether sinks are an operand.
    """

    words: Words
    group: int
    tokens: int
    tile_n: int
    splits: int
    scale: float
    window: int | None
    softcap: float | None
    has_slopes: bool = False
    has_sinks: bool = False

    def run(self, q_ref: Any, *refs: Any) -> None:
        """The body.

        References: q, the pool's arrays, block tables, first positions, lengths, slopes and sinks if any, then the
        outputs.
        """
        arrays = 1 if self.words.bits is None else 2
        pool, (tables, firsts, lengths, *rest) = refs[:arrays], refs[arrays:]
        per_head = self.has_slopes + self.has_sinks
        options, outputs = rest[:per_head], rest[per_head:]
        row, kv_head = pl.program_id(0), pl.program_id(1)
        tile, split = lax.div(pl.program_id(2), self.splits), lax.rem(pl.program_id(2), self.splits)
        start = tile * self.tokens
        first = plt.load(firsts.at[row]) + start
        real = jnp.minimum(plt.load(lengths.at[row]) - start, self.tokens)
        context = Context(self.words, self.tile_n, pool, tables, row, kv_head, jnp.where(real > 0, first + real, 0))

        rows = self._rows(start, first, q_ref.shape[1])
        queries = self._queries(q_ref, context, rows)
        slopes = self._per_head(options[0], rows, kv_head) if self.has_slopes else None
        visit = partial(self._visit, context=context, queries=queries, positions=rows.positions, slopes=slopes)
        begin, stop = context.share(split, self.splits, first, self.window)
        # Up to here every query sees all of a tile.
        whole = begin if self.window else jnp.clip(lax.div(first + 1, self.tile_n), begin, stop)
        running = lax.fori_loop(begin, whole, partial(visit, masked=False), context.nothing(queries))
        running = lax.fori_loop(whole, stop, partial(visit, masked=True), running)
        out, weight = running.finish(self.words)
        if self.has_sinks:
            # One split alone counts the sinks: the splits' sums of exponentials are added up.
            sinks = jnp.where(split == 0, self._per_head(options[-1], rows, kv_head), -jnp.inf)
            out, weight = _add_sinks(out, weight, sinks)
        self._store(outputs, out, weight, rows, split, context)

    def _rows(self, start: jax.Array, first: jax.Array, queries: int) -> _Rows:
        padded = pl.next_power_of_2(self.group)
        index = jnp.arange(max(16, self.tokens * padded), dtype=jnp.int32)
        tokens, heads = lax.div(index, padded), lax.rem(index, padded)
        real = (tokens < self.tokens) & (start + tokens < queries) & (heads < self.group)
        positions = (first + tokens)[:, None] if self.tokens > 1 else jnp.full((1, 1), first)
        return _Rows(positions, start + tokens, heads, real)

    def _per_head(self, ref: Any, rows: _Rows, kv_head: jax.Array) -> jax.Array:
        """Return an operand [N] for each row's head, float32 [A], in exponents to base 2."""
        values = plt.load(ref.at[kv_head * self.group + rows.heads], mask=rows.real, other=jnp.float32(0))
        return values * LOG2_E

    def _queries(self, q_ref: Any, context: Context, rows: _Rows) -> Queries:
        mask, nothing = rows.real[:, None] & there(self.words)[None, :], jnp.zeros((), q_ref.dtype)
        parts: list[jax.Array] = []
        for part in range(self.words.parts):
            elements = self.words.elements(part)[None, :]
            at = q_ref.at[context.row, rows.tokens[:, None], context.kv_head, rows.heads[:, None], elements]
            parts.append(plt.load(at, mask=mask, other=nothing))
        dtype = q_ref.dtype if self.words.bits is None else jnp.float16
        return Queries.of([part.astype(dtype) for part in parts], self.words)

    def _visit(
        self,
        index: jax.Array,
        running: Running,
        *,
        context: Context,
        queries: Queries,
        positions: jax.Array,
        slopes: jax.Array | None,
        masked: bool,
    ) -> Running:
        """Add tile ``index`` of the context."""
        tile = context.tile(index)
        if self.softcap is None:
            exponents = tile.exponents(queries, LOG2_E * self.scale)
        else:
            steepness = self.scale / self.softcap
            exponents = tile.exponents(queries, LOG2_E * self.softcap, lambda scores: tanh(scores * steepness))
        if slopes is not None:
            distance = (tile.positions[None, :] - positions).astype(jnp.float32)
            exponents = fma(slopes[:, None], distance, exponents)
        if masked:
            age = positions - tile.positions[None, :]
            visible = (age >= 0) if self.window is None else (age >= 0) & (age < self.window)
            exponents = jnp.where(visible, exponents, -jnp.inf)
        return running.add(tile, exponents)

    def _store(
        self,
        outputs: Sequence[Any],
        out: list[jax.Array],
        weight: jax.Array,
        rows: _Rows,
        split: jax.Array,
        context: Context,
    ) -> None:
        lead = () if self.splits == 1 else (split,)
        mask = rows.real[:, None] & there(self.words)[None, :]
        for part, values in enumerate(out):
            tokens, heads, elements = rows.tokens[:, None], rows.heads[:, None], self.words.elements(part)[None, :]
            at = outputs[0].at[(*lead, context.row, tokens, context.kv_head, heads, elements)]
            plt.store(at, values.astype(outputs[0].dtype), mask=mask)
        if self.splits > 1:
            at = outputs[1].at[split, context.row, rows.tokens, context.kv_head, rows.heads]
            plt.store(at, weight, mask=rows.real)


def _add_sinks(out: list[jax.Array], weight: jax.Array, sinks: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Take sinks [A] into the denominator of ``out``, whose exponentials sum to 2^``weight``."""
    peak = jnp.maximum(weight, sinks)
    tokens = exp2(weight - peak)
    total = tokens + exp2(sinks - peak)
    share = (tokens / total)[:, None]
    return [part * share for part in out], peak + log2(total)
