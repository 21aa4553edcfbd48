"""Attention over paged keys and values spelled out in float64, with the largest error that is believable."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.numerics import ACCUMULATOR, Array, sum_bound, unit_roundoff
from pallas_kernels.paged_attention import PagedAttentionCall
from pallas_kernels.paged_attention.shapes import Shape, make_call

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""For what is compiled for long and run for short, as interpreted kernels are."""

BASE = 1024
"""What a kernel may raise a quantised element by while it multiplies it."""


@cache
def made(shape: Shape, seed: int = 0) -> PagedAttentionCall:
    """``make_call`` compiled as one."""
    call: PagedAttentionCall = jax.jit(lambda: make_call(shape, seed), compiler_options=FAST_COMPILE)()
    return call


def rescored(call: PagedAttentionCall, **options: Any) -> PagedAttentionCall:
    """The call with other options of its scores."""
    return replace(call, scores=replace(call.scores, **options))


def worst(call: PagedAttentionCall, got: Any) -> float:
    """Largest error over the real tokens, in units of what is believable; padding must be finite."""
    lengths = np.asarray(call.lengths)
    assert got.dtype == call.queries.dtype
    found = np.asarray(got, np.float64)
    assert np.isfinite(found).all(), "padding is finite too"
    errors = [0.0]
    for row in np.flatnonzero(lengths).tolist():
        exact, bound = _row(call, row)
        errors.append(float((np.abs(found[row, : lengths[row]] - exact) / bound).max()))
    return max(errors)


def elements(pool: Pool, head_dim: int) -> tuple[Array, Array]:
    """What a pool holds, float64 [P, 2, K, S, H], and the largest size that a kernel may see of each."""
    if not isinstance(pool, QuantizedPool):
        plain = np.asarray(pool, np.float64)
        return plain, np.abs(plain)
    packed = np.asarray(pool.values)
    halves = [packed] if packed.shape[-1] == head_dim else [packed & 15, packed >> 4]
    q = np.concatenate(halves, axis=-1).astype(np.float64)
    scale, zero = (np.asarray(pool.scales, np.float64)[..., i, :, None] for i in (0, 1))
    return scale * q + zero, scale * (BASE + q) + np.abs(zero)


def _row(call: PagedAttentionCall, row: int) -> tuple[Array, Array]:
    """Exact result and bound, [length, N, H]."""
    q, pool, tables, options = call.queries, call.pool, call.block_tables, call.scores
    first, length, (_, _, heads, size) = int(call.first_positions[row]), int(call.lengths[row]), q.shape
    true, seen = elements(pool, size)
    end, (_, _, kv_heads, block_size, _) = first + length, true.shape
    used = np.asarray(tables)[row, : -(-end // block_size)]

    def context(array: Array, half: int) -> Array:
        """[N, tokens, H]"""
        of_row = np.moveaxis(array[used, half], 1, 0).reshape(kv_heads, -1, size)[:, :end]
        return np.repeat(of_row, heads // kv_heads, axis=0)

    queries = np.asarray(q, np.float64)[row, :length]
    scores = np.einsum("qnh,nth->qnt", queries, context(true, 0)) * options.scale
    reach = np.einsum("qnh,nth->qnt", np.abs(queries), context(seen, 0)) * options.scale
    slack = 2 * ACCUMULATOR * (size**0.5 + 4) * reach
    if cap := options.softcap:
        scores, slack = cap * np.tanh(scores / cap), slack + 8 * ACCUMULATOR * cap
    positions = first + np.arange(length)
    age = positions[:, None] - np.arange(end)
    if options.slopes is not None:
        bias = -np.asarray(options.slopes, np.float64)[:, None] * age[:, None]
        scores, slack = scores + bias, slack + 4 * ACCUMULATOR * np.abs(bias)
    visible = (age >= 0) & (age < (options.window or end))
    scores = np.where(visible[:, None], scores, -np.inf)
    sinks = np.full((heads, 1), -np.inf) if options.sinks is None else np.asarray(options.sinks, np.float64)[:, None]
    highest = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
    weights = np.exp(scores - highest)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + np.exp(sinks - highest))
    exact = np.einsum("qnt,nth->qnh", weights, context(true, 1))
    size_of = np.einsum("qnt,nth->qnh", weights, np.abs(context(true, 1)))
    raised = np.einsum("qnt,nth->qnh", weights, context(seen, 1))
    # A logit that is off by d puts its weight off by the factor e^d, and the sum of weights by no more. Arguments of
    # exponentials are rounded too, and the weights for their product with the values.
    spread = np.abs(np.where(visible[:, None], scores - highest, 0))
    loose = np.where(visible[:, None], slack + 4 * ACCUMULATOR * (spread + 4), 0).max(axis=-1)[..., None]
    narrow = unit_roundoff(jnp.float16 if isinstance(pool, QuantizedPool) else pool.dtype)
    bound = sum_bound(exact, size_of, end, q.dtype) + 2 * (loose + narrow) * size_of
    return exact, bound + 2 * ACCUMULATOR * end**0.5 * raised
