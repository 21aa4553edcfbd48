"""A model family from outside of the product with another cache: a latent vector and a rotary key for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.models.attention import Attention, AttentionConfig, DenseContext, PagedContext, Rows
from jaxdeploy.models.cache_layout import CacheDtype, CacheLayout, PoolArray
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.families import llama
from jaxdeploy.models.hf_config import read_decoder
from jaxdeploy.models.layer import LayerConfig
from jaxdeploy.models.layers import Weight, linear
from jaxdeploy.models.linears import LinearSpec, whole
from jaxdeploy.models.rope import PositionScheme, rotated
from jaxdeploy.models.weights import WeightTable, decoder_weights

LINEARS = {"latent_query": "self_attn.q_proj", "latent_down": "self_attn.down_proj", "latent_out": "self_attn.o_proj"}
NAMES = replace(llama.NAMES, linears={**llama.NAMES.linears, **LINEARS})


@dataclass(frozen=True)
class LatentLayout(CacheLayout):
    """A latent vector and a rotary key of each token, whole on every device."""

    rank: int
    rotary: int

    def pool(self, num_blocks: int, block_size: int, dtype: CacheDtype, ranges: Any = None) -> Any:
        sizes = {"latent": self.rank, "rotary": self.rotary}
        return {
            name: PoolArray((num_blocks, block_size, size), dtype.dtype, (None,) * 3) for name, size in sizes.items()
        }

    def block_size(self, pool: Any) -> int:
        return int(pool["latent"].shape[1])


@dataclass(frozen=True)
class LatentConfig(AttentionConfig):
    """Options of ``LatentAttention``."""

    rank: int = 16

    def build(self, width: int, *, inputs: int | None = None, rngs: nnx.Rngs, dtype: jnp.dtype) -> Attention:
        return LatentAttention(self, width, inputs or width, rngs=rngs, dtype=dtype)


class LatentAttention(Attention):
    """Attention over latent vectors, with the up-projections absorbed into ``query`` and ``out``."""

    config: LatentConfig

    def __init__(self, config: LatentConfig, width: int, inputs: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        nnx.Module.__init__(self)
        self.config, self.width, self.inputs = config, width, inputs
        query, down, out = self.linears()
        self.query: Weight = query.parameters(rngs, dtype)[0]
        self.kv: Weight = down.parameters(rngs, dtype)[0]
        self.out: Weight = out.parameters(rngs, dtype)[0]

    @property
    def cache_layout(self) -> Any:
        return LatentLayout(self.config.rank, self.config.head_dim)

    def linears(self) -> tuple[LinearSpec, ...]:
        config, size = self.config, self.config.rank + self.config.head_dim
        heads = config.num_heads
        return (
            LinearSpec(
                path=("query",),
                inputs=(self.inputs,),
                outputs=(heads, size),
                axes=("embed", "heads", None),
                parts=("latent_query",),
                fused=whole(heads, size),
                feeds_cache=True,
            ),
            LinearSpec(
                path=("kv",),
                inputs=(self.inputs,),
                outputs=(size,),
                axes=("embed", None),
                parts=("latent_down",),
                fused=whole(size),
                feeds_cache=True,
            ),
            LinearSpec(
                path=("out",),
                inputs=(heads, config.rank),
                outputs=(self.width,),
                axes=("heads", None, "embed"),
                parts=("latent_out",),
                fused=whole(self.width),
            ),
        )

    def __call__(
        self, x: jax.Array, scheme: PositionScheme, context: Any, pool: Any, selected: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        rank = self.config.rank
        q, new = linear(x, self.query), linear(x, self.kv)
        q = jnp.concatenate([q[..., :rank], rotated(q[..., rank:], scheme)], axis=-1)
        new = jnp.concatenate([new[:, :rank], rotated(new[:, None, rank:], scheme)[:, 0]], axis=-1)
        if pool is None:
            attended = dense(q, new, context, rank)
        else:
            attended, pool = paged(q, new, context, pool, rank)
        return linear(attended if selected is None else attended[selected], self.out), pool


def dense(q: jax.Array, keys: jax.Array, context: DenseContext, rank: int) -> jax.Array:
    """Whole sequences: ``q`` [T, N, R + H] and ``keys`` [T, R + H] → [T, N, R]."""
    sequences = context.sequences
    positions = jnp.broadcast_to(jnp.arange(len(q) // sequences), (sequences, len(q) // sequences))
    queries, apart = (array.reshape(sequences, -1, *array.shape[1:]) for array in (q, keys))
    return attend(queries, apart, positions, rank).reshape(*q.shape[:2], rank)


def paged(
    q: jax.Array, keys: jax.Array, context: PagedContext, pool: Any, rank: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Write the keys into ``pool``, then attend to the blocks of each row."""
    pool = {
        "latent": put(pool["latent"], keys[:, :rank], context),
        "rotary": put(pool["rotary"], keys[:, rank:], context),
    }
    outputs, start = [], 0
    for rows in context.regions:
        outputs.append(attend_rows(q[start : start + rows.tokens], pool, rows, rank))
        start += rows.tokens
    return jnp.concatenate(outputs), pool


def put(array: jax.Array, values: jax.Array, context: PagedContext) -> jax.Array:
    flat = array.reshape(-1, array.shape[-1])
    return flat.at[context.slots].set(values.astype(array.dtype), mode="drop").reshape(array.shape)


def attend_rows(q: jax.Array, pool: Any, rows: Rows, rank: int) -> jax.Array:
    """[T, N, R + H] → [T, N, R]."""
    count = rows.block_tables.shape[0]
    parts = [pool[name][rows.block_tables].reshape(count, -1, pool[name].shape[-1]) for name in ("latent", "rotary")]
    positions = rows.first_positions[:, None] + jnp.arange(rows.query_length, dtype=jnp.int32)
    queries = q.reshape(count, rows.query_length, *q.shape[1:])
    return attend(queries, jnp.concatenate(parts, axis=-1), positions, rank).reshape(*q.shape[:2], rank)


def attend(q: jax.Array, keys: jax.Array, positions: jax.Array, rank: int) -> jax.Array:
    """``q`` [R, Q, N, W] at ``positions`` [R, Q], ``keys`` [R, S, W] → [R, Q, N, rank]."""
    scores = jnp.einsum("rqnw,rkw->rnqk", q, keys) / np.sqrt(keys.shape[-1])
    visible = jnp.arange(keys.shape[1], dtype=jnp.int32) <= positions[..., None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("rnqk,rkc->rqnc", weights, keys[..., :rank])


def latent(layer: LayerConfig, rank: int) -> LayerConfig:
    """``layer`` with latent attention of the same heads."""
    own = layer.attention
    return replace(layer, attention=LatentConfig(own.num_heads, own.num_kv_heads, own.head_dim, own.rope, rank=rank))


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    config = read_decoder(hf)
    layers = [latent(layer, hf["latent_rank"]) for layer in config.layers if isinstance(layer, LayerConfig)]
    return replace(config, layers=tuple(layers))


def weights(config: ModelConfig) -> WeightTable:
    return decoder_weights(config, NAMES)
