"""Self-attention, and the two places that keys and values can be: dense in the call, or in pages of a KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import constant, linear, parameter
from jaxdeploy.models.rope import Rotary, apply_rotary
from pallas_kernels.paged_attention import paged_attention, write_kv


class AttentionContext(Protocol):
    """Where a step's tokens find the keys and values they attend to."""

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array | None, window: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """``q`` [T, N, H], ``k`` and ``v`` [T, K, H] of the step's tokens → ([T, N, H], updated ``pool``)."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseContext:
    """Whole sequences of equal length in the call itself, causal, without a cache: training and parity tests.

    ``sequences`` is B; the T tokens are B sequences, one after the other.
    """

    sequences: int = field(metadata={"static": True})

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array | None, window: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """See ``AttentionContext``."""
        batched = (x.reshape(self.sequences, -1, *x.shape[1:]) for x in (q, k, v))
        return dense_attention(*batched, window=window).reshape(q.shape), pool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Rows of ``query_length`` consecutive tokens, each row from one sequence.

    ``block_tables`` int32 [R, M] physical blocks of the row's sequence, ``first_positions`` int32 [R] position of the
    row's first token, ``lengths`` int32 [R] how many of its tokens are real (0: the row is padding).
    """

    block_tables: jax.Array
    first_positions: jax.Array
    lengths: jax.Array
    query_length: int = field(metadata={"static": True})

    @property
    def tokens(self) -> int:
        """Tokens that the rows take up, padding included."""
        return int(self.first_positions.shape[0]) * self.query_length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedContext:
    """Keys and values in the blocks of a pool [P, 2, K, S, H].

    ``regions`` are laid out one after the other along T (decode rows of one token, then rows of prefill chunks).
    ``slots`` int32 [T] is block · S + offset of each token; a slot beyond the pool writes nothing (padding).
    """

    regions: tuple[Rows, ...]
    slots: jax.Array

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array | None, window: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """See ``AttentionContext``."""
        assert pool is not None, "a paged step needs its KV pool"
        pool = write_kv(pool, k, v, self.slots)
        outputs, start = [], 0
        for rows in self.regions:
            queries = q[start : start + rows.tokens].reshape(-1, rows.query_length, *q.shape[1:])
            out = paged_attention(
                queries, pool, rows.block_tables, rows.first_positions, rows.lengths, scale=_scale(q), window=window
            )
            outputs.append(out.reshape(-1, *q.shape[1:]))
            start += rows.tokens
        return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0], pool


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None = None) -> jax.Array:
    """Causal attention over whole sequences: ``q`` [B, T, N, H], ``k`` and ``v`` [B, T, K, H] → [B, T, N, H]."""
    sequences, tokens, heads, size = q.shape
    grouped = q.reshape(sequences, tokens, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * _scale(q)
    age = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
    visible = (age >= 0) if window is None else (age >= 0) & (age < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _scale(q: jax.Array) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions.

    Query, key and value weights are one array [D, K, N/K + 2, H]: per KV head its query heads, then its key, then its
    value. Cutting it along K gives every tensor-parallel device whole groups.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        groups = (config.num_kv_heads, config.queries_per_kv + 2, config.head_dim)
        out = (config.num_heads, config.head_dim, config.hidden_size)
        self.window = window
        self.wqkv = parameter(rngs, (config.hidden_size, *groups), ("embed", "kv_heads", None, None), dtype)
        self.bqkv = constant(0.0, groups, ("kv_heads", None, None), dtype) if config.qkv_bias else None
        self.wo = parameter(rngs, out, ("heads", None, "embed"), dtype)
        self.bo = constant(0.0, (config.hidden_size,), ("embed",), dtype) if config.o_bias else None

    def __call__(
        self, x: jax.Array, rotary: Rotary, context: AttentionContext, pool: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """``x`` [T, D] → ([T, D], updated ``pool``)."""
        qkv = linear(x, self.wqkv[...], _value(self.bqkv))
        tokens, _, _, size = qkv.shape
        q = apply_rotary(qkv[:, :, :-2].reshape(tokens, -1, size), rotary)
        k = apply_rotary(qkv[:, :, -2], rotary)
        out, pool = context.attend(q, k, qkv[:, :, -1], pool, self.window)
        return linear(out, self.wo[...], _value(self.bo), contract=2), pool


def _value(bias: nnx.Param[jax.Array] | None) -> jax.Array | None:
    return None if bias is None else bias[...]
