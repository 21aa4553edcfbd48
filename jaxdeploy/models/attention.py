"""Self-attention, and the two places that keys and values can be: dense in the call, or in pages of a KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Weight, constant, linear, parameter, value_of
from jaxdeploy.models.rope import Rotary, apply_rotary
from jaxdeploy.parallel.sharding import per_device, spec
from pallas_kernels.kv_cache_write import kv_cache_write
from pallas_kernels.kv_pool import Pool
from pallas_kernels.paged_attention import PagedAttentionCall, ScoreOptions, paged_attention


class AttentionContext(Protocol):
    """Where a step's tokens find the keys and values they attend to."""

    def attend(
        self, qkv: jax.Array, rotary: Rotary, pool: Pool | None, window: int | None
    ) -> tuple[jax.Array, Pool | None]:
        """``qkv`` [T, K, N / K + 2, H] (a KV head's queries, key, value) → ([T, N, H], updated ``pool``)."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseContext:
    """Whole sequences of equal length in the call itself, causal, without a cache: training and parity tests.

    ``sequences`` is B; the T tokens are B sequences, one after the other.
    """

    sequences: int = field(metadata={"static": True})

    def attend(
        self, qkv: jax.Array, rotary: Rotary, pool: Pool | None, window: int | None
    ) -> tuple[jax.Array, Pool | None]:
        """See ``AttentionContext``."""
        tokens, _, _, size = qkv.shape
        q = apply_rotary(qkv[:, :, :-2].reshape(tokens, -1, size), rotary)
        k, v = apply_rotary(qkv[:, :, -2], rotary), qkv[:, :, -1]
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
    """Keys and values in the blocks of a pool.

    ``regions`` are laid out one after the other along T (decode rows of one token, then rows of prefill chunks).
    ``slots`` int32 [T] is block · S + offset of each token; a slot beyond the pool writes nothing (padding). On each
    device of ``mesh`` the kernels see its own KV heads.
    """

    regions: tuple[Rows, ...]
    slots: jax.Array
    mesh: Mesh = field(metadata={"static": True})

    def attend(
        self, qkv: jax.Array, rotary: Rotary, pool: Pool | None, window: int | None
    ) -> tuple[jax.Array, Pool | None]:
        """See ``AttentionContext``."""
        assert pool is not None, "a paged step needs its KV pool"
        heads, whole, blocks = spec(None, "kv_heads"), spec(), spec(*HeadsLayout.AXES)
        attend = per_device(
            self.mesh, partial(_attend_paged, window=window), (heads, whole, blocks, whole, whole), (heads, blocks)
        )
        attended: tuple[jax.Array, Pool] = attend(qkv, rotary, pool, self.slots, self.regions)
        return attended


def _attend_paged(
    qkv: jax.Array, rotary: Rotary, pool: Pool, slots: jax.Array, regions: tuple[Rows, ...], *, window: int | None
) -> tuple[jax.Array, Pool]:
    """Write the new keys and values, then let every region attend; heads are those of one device."""
    q, pool = kv_cache_write(qkv, *rotary, pool, slots)
    outputs, start = [], 0
    for rows in regions:
        queries = q[start : start + rows.tokens].reshape(-1, rows.query_length, *q.shape[1:])
        where = (rows.block_tables, rows.first_positions, rows.lengths)
        call = PagedAttentionCall(queries, pool, *where, ScoreOptions(_scale(q), window))
        outputs.append(paged_attention(call).reshape(-1, *q.shape[1:]))
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
        self.num_heads, self.head_dim, self.window = config.num_heads, config.head_dim, window
        self.cache_layout = HeadsLayout(config.num_kv_heads, config.head_dim, config.head_dim)
        self.wqkv: Weight = parameter(rngs, (config.hidden_size, *groups), ("embed", "kv_heads", None, None), dtype)
        self.bqkv = constant(0.0, groups, ("kv_heads", None, None), dtype) if config.qkv_bias else None
        self.wo: Weight = parameter(rngs, out, ("heads", None, "embed"), dtype)
        self.bo = constant(0.0, (config.hidden_size,), ("embed",), dtype) if config.o_bias else None

    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary,
        context: AttentionContext,
        pool: Pool | None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """``x`` [T, D] → ([T, D], or the ``wanted`` rows of it; updated ``pool``)."""
        qkv = linear(x, self.wqkv, value_of(self.bqkv))
        out, pool = context.attend(qkv, rotary, pool, self.window)
        out = out if wanted is None else out[wanted]
        return linear(out, self.wo, value_of(self.bo)), pool
