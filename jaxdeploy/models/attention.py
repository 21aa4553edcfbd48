"""Self-attention, and the two places that keys and values can be: dense in the call, or in pages of a KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Weight, constant, linear, parameter, value_of
from jaxdeploy.models.rope import PositionScheme, rotated, whole_head
from jaxdeploy.parallel.sharding import POOL_AXES, per_device, spec
from pallas_kernels.kv_cache_write import kv_cache_write
from pallas_kernels.kv_pool import Pool
from pallas_kernels.paged_attention import PagedAttentionCall, ScoreOptions, paged_attention


class AttentionContext(Protocol):
    """Where a step's tokens find the keys and values they attend to."""

    def attend(
        self, qkv: jax.Array, scheme: PositionScheme, pool: Pool | None, scores: ScoreOptions
    ) -> tuple[jax.Array, Pool | None]:
        """Return attention [T, N, H], and the updated ``pool``.

        Args:
            qkv: [T, K, N / K + 2, H]; a KV head has its query heads, then its key, then its value.
            scheme: how positions enter queries and keys.
            pool: keys and values of the layer; ``None`` without a cache.
            scores: scale, window and other options of the scores.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseContext:
    """Whole sequences of equal length in the call itself, causal, without a cache: training and parity tests.

    ``sequences`` is B; the T tokens are B sequences, one after the other.
    """

    sequences: int = field(metadata={"static": True})

    def attend(
        self, qkv: jax.Array, scheme: PositionScheme, pool: Pool | None, scores: ScoreOptions
    ) -> tuple[jax.Array, Pool | None]:
        """See ``AttentionContext``."""
        tokens, _, _, size = qkv.shape
        q = rotated(qkv[:, :, :-2].reshape(tokens, -1, size), scheme)
        k, v = rotated(qkv[:, :, -2], scheme), qkv[:, :, -1]
        batched = (x.reshape(self.sequences, -1, *x.shape[1:]) for x in (q, k, v))
        return dense_attention(*batched, scores).reshape(q.shape), pool


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
        self, qkv: jax.Array, scheme: PositionScheme, pool: Pool | None, scores: ScoreOptions
    ) -> tuple[jax.Array, Pool | None]:
        """See ``AttentionContext``."""
        assert pool is not None, "a paged step needs its KV pool"
        heads, whole, blocks = spec(None, "kv_heads"), spec(), spec(*POOL_AXES)
        ins = (heads, whole, blocks, whole, whole, spec("heads"))
        attend = per_device(self.mesh, _attend_paged, ins, (heads, blocks))
        attended: tuple[jax.Array, Pool] = attend(qkv, scheme, pool, self.slots, self.regions, scores)
        return attended


def _attend_paged(
    qkv: jax.Array,
    scheme: PositionScheme,
    pool: Pool,
    slots: jax.Array,
    regions: tuple[Rows, ...],
    scores: ScoreOptions,
) -> tuple[jax.Array, Pool]:
    """Write the new keys and values, then let every region attend; heads are those of one device."""
    qkv, angles = whole_head(qkv, scheme)
    q, pool = kv_cache_write(qkv, *angles, pool, slots)
    outputs, start = [], 0
    for rows in regions:
        queries = q[start : start + rows.tokens].reshape(-1, rows.query_length, *q.shape[1:])
        where = (rows.block_tables, rows.first_positions, rows.lengths)
        call = PagedAttentionCall(queries, pool, *where, scores)
        outputs.append(paged_attention(call).reshape(-1, *q.shape[1:]))
        start += rows.tokens
    return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0], pool


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, scores: ScoreOptions) -> jax.Array:
    """Causal attention over whole sequences: ``q`` [B, T, N, H], ``k`` and ``v`` [B, T, K, H] → [B, T, N, H]."""
    sequences, tokens, heads, size = q.shape
    groups = (k.shape[2], heads // k.shape[2])
    grouped = q.reshape(sequences, tokens, *groups, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * jnp.tanh(logits / scores.softcap)
    age = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
    if scores.slopes is not None:
        logits = logits - scores.slopes.reshape(*groups, 1, 1) * age.astype(jnp.float32)
    visible = (age >= 0) if scores.window is None else (age >= 0) & (age < scores.window)
    logits = jnp.where(visible, logits, -jnp.inf)
    if scores.sinks is not None:  # one more logit, whose weight is dropped
        sinks = jnp.broadcast_to(scores.sinks.reshape(*groups, 1, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sinks], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :tokens].astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245).

    Query, key and value weights are one array [D, K, N/K + 2, H]: per KV head its query heads, then its key, then its
    value. Cutting it along K gives every tensor-parallel device whole groups.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        groups = (config.num_kv_heads, config.queries_per_kv + 2, config.head_dim)
        out = (config.num_heads, config.head_dim, config.hidden_size)
        self.num_heads, self.head_dim, self.window = config.num_heads, config.head_dim, window
        self.wqkv: Weight = parameter(rngs, (config.hidden_size, *groups), ("embed", "kv_heads", None, None), dtype)
        self.bqkv = constant(0.0, groups, ("kv_heads", None, None), dtype) if config.qkv_bias else None
        self.wo: Weight = parameter(rngs, out, ("heads", None, "embed"), dtype)
        self.bo = constant(0.0, (config.hidden_size,), ("embed",), dtype) if config.o_bias else None

    @property
    def scores(self) -> ScoreOptions:
        """Scale and window of the scores."""
        return ScoreOptions(1.0 / math.sqrt(self.head_dim), self.window)

    def __call__(
        self,
        x: jax.Array,
        scheme: PositionScheme,
        context: AttentionContext,
        pool: Pool | None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """``x`` [T, D] → ([T, D], or the ``wanted`` rows of it; updated ``pool``)."""
        qkv = linear(x, self.wqkv, value_of(self.bqkv))
        out, pool = context.attend(qkv, scheme, pool, self.scores)
        out = out if wanted is None else out[wanted]
        return linear(out, self.wo, value_of(self.bo)), pool
