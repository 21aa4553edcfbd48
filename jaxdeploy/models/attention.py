"""Self-attention, and the two places that keys and values can be: dense in the call, or in pages of a KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.layers import Weight, linear, value_of
from jaxdeploy.models.linears import LinearInput, LinearSpec, Outputs, whole
from jaxdeploy.models.rope import PositionScheme, RopeConfig, RotaryPositions, rotated, whole_head
from jaxdeploy.parallel.sharding import per_device, spec
from pallas_kernels.kv_cache_write import kv_cache_write
from pallas_kernels.kv_pool import Pool
from pallas_kernels.paged_attention import PagedAttentionCall, ScoreOptions, paged_attention

Array = np.ndarray[Any, Any]


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
        return dense_attention(*batched, scores=scores).reshape(q.shape), pool


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
        heads, whole, blocks = spec(None, "kv_heads"), spec(), spec(*HeadsLayout.AXES)
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
        call = PagedAttentionCall(queries, pool, *where, scores=scores)
        outputs.append(paged_attention(call).reshape(-1, *q.shape[1:]))
        start += rows.tokens
    return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0], pool


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scores: ScoreOptions) -> jax.Array:
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


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (arXiv:2305.13245) with rotary positions; shape letters as in ``docs/glossary.md``.

    ``num_heads``: query heads, N.
    ``num_kv_heads``: key and value heads, K.
    ``head_dim``: size of a head, H.
    ``rope``: rotary position embedding.
    ``window``: a query sees itself and the ``window - 1`` tokens before it; ``None`` is full attention.
    ``qkv_bias``: query, key and value have biases.
    ``o_bias``: the output has a bias.
    ``kv_copies``: consecutive KV heads with the same key and value; a checkpoint stores one of them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    kv_copies: int = 1

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head, N / K."""
        return self.num_heads // self.num_kv_heads

    @property
    def positions(self) -> RotaryPositions:
        """The encoding of positions."""
        return RotaryPositions(self.rope, self.head_dim)

    def shared_by(self, tp: int) -> AttentionConfig:
        """Return the options with KV heads repeated until ``tp`` divides them. ``tp`` divides ``num_heads``.

        The group of a KV head is then divided among its copies, so each device gets whole groups.
        """
        copies = tp // math.gcd(self.num_kv_heads, tp)
        return replace(self, num_kv_heads=self.num_kv_heads * copies, kv_copies=self.kv_copies * copies)

    def build(self, width: int, *, inputs: int | None = None, rngs: nnx.Rngs, dtype: jnp.dtype) -> Attention:
        """Return a module with outputs of size ``width`` and inputs of size ``inputs`` (default: ``width``)."""
        return Attention(self, width, inputs or width, rngs=rngs, dtype=dtype)


class Attention(nnx.Module):
    """Grouped-query attention, see ``AttentionConfig``.

    Query, key and value weights are one array [D, K, N/K + 2, H]: per KV head its query heads, then its key, then its
    value. Cutting it along K gives every tensor-parallel device whole groups.
    """

    def __init__(self, config: AttentionConfig, width: int, inputs: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.config, self.width, self.inputs = config, width, inputs
        qkv, out = self.linears()
        self.wqkv: Weight
        self.wo: Weight
        self.wqkv, self.bqkv = qkv.parameters(rngs, dtype)
        self.wo, self.bo = out.parameters(rngs, dtype)

    @property
    def cache_layout(self) -> HeadsLayout:
        """The layout of keys and values."""
        config = self.config
        return HeadsLayout(config.num_kv_heads, config.head_dim, config.head_dim, config.kv_copies)

    def linears(self) -> tuple[LinearSpec, ...]:
        """Return the linear maps of query, key and value together, and of the output."""
        config = self.config
        group, size = config.queries_per_kv, config.head_dim
        qkv = LinearSpec(
            path=("wqkv",),
            inputs=(self.inputs,),
            outputs=(config.num_kv_heads, group + 2, size),
            axes=("embed", "kv_heads", None, None),
            parts=("query", "key", "value"),
            fused=_separate(config),
            joined=_grouped(config),
            bias="bqkv" if config.qkv_bias else None,
            feeds_cache=True,
        )
        out = LinearSpec(
            path=("wo",),
            inputs=(config.num_heads, size),
            outputs=(self.width,),
            axes=("heads", None, "embed"),
            parts=("out",),
            fused=whole(self.width),
            bias="bo" if config.o_bias else None,
            # The value of a KV head is the last of its group; it feeds all its query heads.
            source=LinearInput(("wqkv",), axis=1, index=group + 1, shared=group),
        )
        return qkv, out

    @property
    def scores(self) -> ScoreOptions:
        """Scale and window of the scores."""
        return ScoreOptions(1.0 / math.sqrt(self.config.head_dim), self.config.window)

    def __call__(
        self,
        x: jax.Array,
        scheme: PositionScheme,
        context: AttentionContext,
        pool: Pool | None,
        selected: jax.Array | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """Return outputs [T, D] for ``x`` [T, D], or those of the ``selected`` tokens, and the updated ``pool``."""
        qkv = linear(x, self.wqkv, value_of(self.bqkv))
        out, pool = context.attend(qkv, scheme, pool, self.scores)
        out = out if selected is None else out[selected]
        return linear(out, self.wo, value_of(self.bo)), pool


def _separate(config: AttentionConfig) -> Outputs:
    """Query, key and value as separate tensors → [K, N/K + 2, H]. Stored keys and values are repeated."""
    kv, group, size = config.num_kv_heads, config.queries_per_kv, config.head_dim
    heads, copies = (group, 1, 1), (1, config.kv_copies, config.kv_copies)
    rows = tuple(kv // times * n * size for n, times in zip(heads, copies, strict=True))

    def join(arrays: Sequence[Array]) -> Array:
        parts = []
        for array, n, times in zip(arrays, heads, copies, strict=True):
            stored = array.reshape(kv // times, n, size, *array.shape[1:])
            parts.append(np.repeat(stored, times, axis=0) if times > 1 else stored)
        return np.concatenate(parts, axis=1)

    def cut(value: Array) -> list[Array]:
        parts = zip(np.split(value, (group, group + 1), axis=1), copies, rows, strict=True)
        return [part[::times].reshape(n, *value.shape[3:]) for part, times, n in parts]

    return Outputs(rows, join, cut, axis=1, shares=heads)


def _grouped(config: AttentionConfig) -> Outputs:
    """One tensor with, per stored KV head, its queries, its key and its value → [K, N/K + 2, H]."""
    if config.kv_copies == 1:
        return whole(config.num_kv_heads, config.queries_per_kv + 2, config.head_dim)
    separate, size = _separate(config), config.head_dim
    kv = config.num_kv_heads // config.kv_copies
    group = config.num_heads // kv

    def join(arrays: Sequence[Array]) -> Array:
        stored = arrays[0].reshape(kv, group + 2, size, *arrays[0].shape[1:])
        parts = np.split(stored, (group, group + 1), axis=1)
        return separate.join([part.reshape(-1, *part.shape[3:]) for part in parts])

    def cut(value: Array) -> list[Array]:
        parts = [part.reshape(kv, -1, size, *part.shape[1:]) for part in separate.cut(value)]
        return [np.concatenate(parts, axis=1).reshape(-1, *value.shape[3:])]

    return Outputs((sum(separate.rows),), join, cut, axis=0, shares=(config.num_kv_heads,))
