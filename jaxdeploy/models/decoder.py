"""The decoder: embeddings, layers, norm and head, configured by ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.attention import AttentionContext, DenseContext
from jaxdeploy.models.block import Block, abstract_block
from jaxdeploy.models.cache_layout import CacheLayout
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Embedding, Head, RMSNorm
from jaxdeploy.models.model import Encoder, Hidden, Pools, Positions
from jaxdeploy.models.rope import PositionScheme
from jaxdeploy.models.weights import ParamPath
from pallas_kernels.kv_pool import Pool

Params = Mapping[ParamPath, jax.Array]


class Decoder(nnx.Module):
    """A decoder-only transformer. Fresh weights are random; ``jaxdeploy.checkpoint`` fills in real ones."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype | type = jnp.float32) -> None:
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        blocks = [layer.build(config.hidden_size, rngs=rngs, dtype=dtype) for layer in config.layers]
        self.layers: nnx.List[Any] = nnx.List(blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Head(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)

    @property
    def cache_layouts(self) -> tuple[CacheLayout, ...]:
        """What each layer keeps in the cache."""
        return tuple(layer.cache_layout for layer in self.layers)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Whole sequences without a cache: ``tokens`` int32 [B, T] → logits float32 [B, T, V]."""
        sequences, length = tokens.shape
        x, positions = self.embed(tokens.reshape(-1)), Positions.of_prompts(sequences, length)
        hidden = self.hidden(x, positions, DenseContext(sequences), [None] * len(self.layers))
        return self.logits(hidden.states).reshape(sequences, length, -1)

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """None: it reads text only."""
        return {}

    def embed(self, tokens: jax.Array, media_rows: jax.Array | None = None) -> jax.Array:
        """Return the embeddings [T, D] of ``tokens`` int32 [T]."""
        assert media_rows is None, "a model without encoders has no media buffer"
        return self.embedding(tokens)

    def hidden(
        self,
        x: jax.Array,
        positions: Positions,
        context: AttentionContext,
        pools: Pools,
        selected: jax.Array | None = None,
        taps: tuple[int, ...] = (),
    ) -> Hidden:
        """See ``Model.hidden``. Pools may be ``None`` where ``context`` needs no cache."""
        schemes = [layer.positions for layer in self.config.layers]
        tables = {scheme: scheme.tables(*positions) for scheme in dict.fromkeys(schemes)}
        updated, residuals = [], []
        for index, (layer, pool) in enumerate(zip(self.layers, pools, strict=True)):
            graph, weights = nnx.split(layer)
            rows = selected if index == len(self.layers) - 1 else None
            residuals.append(x)
            x, pool = _run_layer(graph, weights, x, tables[schemes[index]], context, pool, rows)
            updated.append(pool)
        return Hidden(self.norm(x), updated, tuple(residuals[index] for index in taps))

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V]."""
        return self.embedding.logits(x) if self.config.tie_embeddings else self.head.logits(x)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef[Any],
    weights: nnx.State[Any, Any],
    x: jax.Array,
    scheme: PositionScheme,
    context: AttentionContext,
    pool: Pool | None,
    selected: jax.Array | None,
) -> tuple[jax.Array, Pool | None]:
    """One layer under its own ``jit``: equal layers are traced and lowered once, however many there are."""
    layer: Block = nnx.merge(graph, weights)
    return layer(x, scheme, context, pool, selected)


def cache_layouts(config: ModelConfig) -> tuple[CacheLayout, ...]:
    """Return what each layer of a decoder keeps in the cache, before the decoder exists."""
    return tuple(abstract_block(layer, config.hidden_size).cache_layout for layer in config.layers)


def abstract_decoder(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    """Return a decoder whose parameters are shapes. Weights of other types may be put into it before it is filled."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def parameters_of(model: nnx.Module) -> dict[ParamPath, nnx.Param[Any]]:
    """Return every parameter by its path: ``axes`` are the logical axes, ``get_value()`` is an array or a shape."""
    flat: Any = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return dict(flat)


def fill(model: nnx.Module, arrays: Params) -> None:
    """Put an array into every parameter of ``model``; ``arrays`` has the paths of ``parameters_of``."""
    params = parameters_of(model)
    if unknown := arrays.keys() - params.keys():
        raise KeyError(f"the model has no parameters {sorted(map(str, unknown))}")
    flat: Any = {path: param.replace(arrays[path]) for path, param in params.items()}
    nnx.update(model, nnx.from_flat_state(flat))


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> dict[ParamPath, nnx.Param[Any]]:
    """Return the parameters of a decoder with float weights, as shapes."""
    return parameters_of(abstract_decoder(config, dtype))


def decoder_from(config: ModelConfig, params: Params) -> Decoder:
    """Return a decoder with float weights that holds the arrays of ``params``, by the paths of ``abstract_params``."""
    decoder = abstract_decoder(config, jnp.dtype(jnp.float32))
    fill(decoder, params)
    return decoder
