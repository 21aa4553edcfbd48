"""The head of EAGLE-3 (arXiv:2503.01840): one layer that drafts from features of the model.

A pair of a token and the feature of the token before it gives the feature of that token, and so the next token.
Features of the model are made of its residual stream before three of its layers. For tokens that the model has not
computed, the head uses the features that it made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.fields import StoredFields, is_whole
from jaxdeploy.models.attention import PagedContext, Rows
from jaxdeploy.models.cache_layout import CacheLayout, FeaturesLayout
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.families.llama import NAMES as LLAMA
from jaxdeploy.models.hf_config import read_decoder
from jaxdeploy.models.layer import LayerConfig
from jaxdeploy.models.layers import Embedding, Head, RMSNorm, parameter
from jaxdeploy.models.linears import LinearSpec, NormInput, whole, within
from jaxdeploy.models.model import Encoder, Hidden, Positions
from jaxdeploy.models.weights import ParamPath, Source, block_weights, linear, plain

NAMES = replace(
    LLAMA,
    norms={
        "attention_norm": "input_layernorm",
        "hidden_norm": "hidden_norm",
        "mlp_norm": "post_attention_layernorm",
    },
)
"""Tensors of a head are called as Llama calls them, with one norm more."""


@dataclass(frozen=True)
class Eagle3Config:
    """``layer`` has the sizes of the head's one layer and the vocabulary of the model.

    ``taps`` are the layers before which the model's residual stream, of ``model_size`` numbers, is taken. The head
    chooses among ``draft_vocab_size`` tokens.
    """

    layer: ModelConfig
    model_size: int
    taps: tuple[int, ...]
    draft_vocab_size: int
    norm_before_residual: bool = False

    @property
    def block(self) -> LayerConfig:
        """The options of the head's one layer."""
        (block,) = self.layer.layers
        assert isinstance(block, LayerConfig), "read_decoder describes pre-norm layers"
        return block


def eagle3_config(hf: Mapping[str, Any], model: ModelConfig) -> Eagle3Config:
    """The ``config.json`` of a head for ``model``. Raises ``CheckpointError`` where it is for another one."""
    layer = replace(read_decoder({**hf, "num_hidden_layers": 1}), tie_embeddings=False)
    if layer.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"vocab_size={layer.vocab_size} of the head is not the model's, {model.vocab_size}; take one made for it"
        )
    stored = StoredFields(hf)
    taps = _taps(stored, model.num_layers)
    size = stored.whole("target_hidden_size", model.hidden_size)
    if size != model.hidden_size:
        raise CheckpointError(f"target_hidden_size={size} is not {model.hidden_size}, the model's; take one for it")
    vocabulary = stored.whole("draft_vocab_size", layer.vocab_size, most=layer.vocab_size)
    return Eagle3Config(layer, size, taps, vocabulary, stored.flag("norm_before_residual", False))


def _taps(stored: StoredFields, count: int) -> tuple[int, ...]:
    """The layers of a model of ``count`` that a head reads. Raises ``CheckpointError``: not three of them."""
    name = "eagle_aux_hidden_state_layer_ids"
    fields = StoredFields({**stored.nested("eagle_config").values, **stored.values})
    taps = fields.items(name) or [2, count // 2, count - 3]
    if not all(map(is_whole, taps)):
        raise fields.fault(name, "must be whole numbers")
    if any(not 0 <= index < count for index in taps):
        raise CheckpointError(f"the head reads layers {taps} of a model that has {count}; take one made for it")
    return tuple(map(int, taps))


class Eagle3(nnx.Module):
    """The head. ``fuse`` [taps · D, D] makes features of what the model gives; ``tokens`` int32 [V'] names its choices.

    In a step it stands where a decoder does. Its pools are those of its keys and values, and features [P, S, D].
    """

    def __init__(self, config: Eagle3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        layer = config.layer
        size, eps = layer.hidden_size, config.block.norm_eps
        self.config = layer
        self.norm_before_residual = config.norm_before_residual
        self.embedding = Embedding(layer.vocab_size, size, rngs=rngs, dtype=dtype)
        self.fuse = parameter(rngs, (len(config.taps) * config.model_size, size), ("embed", None), dtype)
        self.attention_norm = RMSNorm(size, eps, dtype=dtype)
        self.hidden_norm = RMSNorm(size, eps, dtype=dtype)
        self.attention = config.block.attention.build(size, inputs=2 * size, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(size, eps, dtype=dtype)
        self.mlp = config.block.mlp.build(size, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(size, eps, dtype=dtype)
        self.head = Head(config.draft_vocab_size, size, rngs=rngs, dtype=dtype)
        self.tokens = nnx.Param(jnp.arange(config.draft_vocab_size, dtype=jnp.int32), axes=(None,))

    @property
    def cache_layouts(self) -> tuple[CacheLayout, ...]:
        """Return the layout of the keys and values, and that of the features."""
        return (self.attention.cache_layout, FeaturesLayout(self.config.hidden_size))

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """None: it reads text only."""
        return {}

    def embed(self, tokens: jax.Array, media_rows: jax.Array | None = None) -> jax.Array:
        """Return the embeddings [T, D] of ``tokens`` int32 [T]."""
        assert media_rows is None, "a model without encoders has no media buffer"
        return self.embedding(tokens)

    def linears(self) -> tuple[LinearSpec, ...]:
        """Return the linear maps of its one layer. Two norms feed the attention, so nothing is folded into one."""
        return (
            *within("attention", self.attention.linears()),
            *within("mlp", self.mlp.linears(), NormInput(("mlp_norm", "scale"))),
        )

    def hidden(
        self,
        x: jax.Array,
        positions: Positions,
        context: PagedContext,
        pools: Sequence[Any],
        selected: jax.Array | None = None,
        taps: tuple[int, ...] = (),
    ) -> Hidden:
        """See ``Model.hidden``. ``pools`` are the keys and values, and the features [P, S, D].

        No token is the first of its sequence. The keys and values of a pair are in the slot of its feature, one token
        before. Without ``selected`` it writes the feature of each row's last token, which the model has not made yet.
        """
        assert not taps, "the head has no layers to tap"
        kv, features = pools
        before = _one_back(context, self.attention.cache_layout.block_size(kv))
        given = features.reshape(-1, features.shape[-1]).at[before.slots].get(mode="clip")
        normed = self.hidden_norm(given)
        both = jnp.concatenate([self.attention_norm(x), normed], axis=-1)
        places = jnp.maximum(positions.values - 1, 0)
        angles = self.attention.config.positions.tables(places, positions.prompt_lengths)
        attended, kv = self.attention(both, angles, before, kv)
        normed, x = self.mlp_norm.added(attended, normed if self.norm_before_residual else given)
        x = x + self.mlp(normed)
        if selected is None:
            features = put_features(features, x, _last_of_rows(context, features))
        return Hidden(self.norm(x if selected is None else x[selected]), [kv, features])

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V]; tokens that it does not know have none."""
        known = self.head.logits(x)
        nothing = jnp.full((x.shape[0], self.config.vocab_size), -jnp.inf, known.dtype)
        return nothing.at[:, self.tokens[...]].set(known)


def put_features(features: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """``features`` [P, S, D] with ``values`` [T, D] in the ``slots`` int32 [T]; those beyond the pool go nowhere."""
    flat = features.reshape(-1, features.shape[-1])
    return flat.at[slots].set(values.astype(flat.dtype), mode="drop").reshape(features.shape)


def _one_back(context: PagedContext, size: int) -> PagedContext:
    """The same for the token before each."""
    regions, slots = [], []
    for rows in context.regions:
        first = rows.first_positions - 1
        positions = first[:, None] + jnp.arange(rows.query_length, dtype=jnp.int32)
        blocks = jnp.take_along_axis(rows.block_tables, jnp.maximum(positions, 0) // size, axis=1)
        regions.append(Rows(rows.block_tables, jnp.maximum(first, 0), rows.lengths, rows.query_length))
        slots.append((blocks * size + jnp.maximum(positions, 0) % size).reshape(-1))
    nowhere = jnp.iinfo(jnp.int32).max
    real = jnp.concatenate([_real(rows).reshape(-1) for rows in context.regions])
    return PagedContext(tuple(regions), jnp.where(real, jnp.concatenate(slots), nowhere), context.mesh)


def _last_of_rows(context: PagedContext, features: jax.Array) -> jax.Array:
    """``slots`` of the last real token of each row; the others go nowhere."""
    ends = [
        (jnp.arange(rows.query_length, dtype=jnp.int32) == rows.lengths[:, None] - 1).reshape(-1)
        for rows in context.regions
    ]
    nowhere = features.shape[0] * features.shape[1]
    return jnp.where(jnp.concatenate(ends), context.slots, nowhere)


def _real(rows: Rows) -> jax.Array:
    return jnp.arange(rows.query_length, dtype=jnp.int32) < rows.lengths[:, None]


def eagle3_weights(config: Eagle3Config, layer: str, *, own_embedding: bool) -> dict[ParamPath, Source]:
    """The weight table of a head whose layer is called ``layer`` in its files."""
    size, vocab = config.layer.hidden_size, config.layer.vocab_size
    head = nnx.eval_shape(lambda: Eagle3(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float32)))
    table: dict[ParamPath, Source] = {
        ("fuse",): linear(["fc"], (len(config.taps) * config.model_size,), whole(size)),
        ("norm", "scale"): plain("norm.weight", size),
        ("head", "weight"): linear(["lm_head"], (size,), whole(config.draft_vocab_size)),
    }
    table |= dict(block_weights(head.linears(), NAMES, layer, size).items())
    if own_embedding:
        table["embedding", "table"] = plain("embed_tokens.weight", vocab, size)
    return table
