"""The decoder: embeddings, layers, norm and head, configured by ``ModelConfig``."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models import fused_decode
from jaxdeploy.models.attention import AttentionContext, DenseContext
from jaxdeploy.models.block import Block
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Embedding, Head, RMSNorm
from jaxdeploy.models.quantized import weight_like
from jaxdeploy.models.rope import Rotary
from jaxdeploy.models.weights import ParamPath
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.kv_pool import Pool

logger = logging.getLogger("jaxdeploy")

Params = Mapping[ParamPath, jax.Array]
Pools = Sequence[Pool | None]


class Decoder(nnx.Module):
    """A decoder-only transformer. Fresh weights are random; ``jaxdeploy.checkpoint`` fills in real ones."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype | type = jnp.float32) -> None:
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        blocks = [layer.build(config.hidden_size, rngs=rngs, dtype=dtype) for layer in config.layers]
        self.layers: nnx.List[Any] = nnx.List(blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Head(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Whole sequences without a cache: ``tokens`` int32 [B, T] → logits float32 [B, T, V]."""
        sequences, length = tokens.shape
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), sequences)
        lengths = jnp.full_like(positions, length)
        pools = [None] * len(self.layers)
        x, _ = self.hidden(tokens.reshape(-1), positions, lengths, DenseContext(sequences), pools)
        return self.logits(x).reshape(sequences, length, -1)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        context: AttentionContext,
        pools: Pools,
        wanted: jax.Array | None = None,
        noted: dict[int, jax.Array] | None = None,
    ) -> tuple[jax.Array, list[Pool | None]]:
        """The normed hidden state of every token, or of those at ``wanted``, int32 [B].

        ``tokens``, ``positions`` and ``lengths`` (prompt length of the token's sequence) are int32 [T], ``pools`` one
        KV pool a layer. Returns [T, D] or [B, D], and the updated pools. Beyond its keys and values the last layer is
        computed only for what is wanted: of a prompt that is one token. ``noted`` gets the residual stream [T, D]
        before each layer whose index is one of its keys.
        """
        x = self.embed(tokens)
        schemes = [layer.positions for layer in self.config.layers]
        angles = {scheme: scheme.tables(positions, lengths) for scheme in dict.fromkeys(schemes)}
        if wanted is None and fused_decode.serves(context, self.layers, self.norm):
            try:
                (tables,) = angles.values()
                return fused_decode.decode_hidden(self.layers, self.norm, x, tables, context, pools, noted)
            except NoBackendError as refusal:
                logger.info("decode steps run op by op: %s", refusal)
        updated = []
        for index, (layer, pool) in enumerate(zip(self.layers, pools, strict=True), 1):
            graph, weights = nnx.split(layer)
            rows = wanted if index == len(self.layers) else None
            if noted is not None and index - 1 in noted:
                noted[index - 1] = x
            x, pool = _run_layer(graph, weights, x, angles[schemes[index - 1]], context, pool, rows)
            updated.append(pool)
        return self.norm(x), updated

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V]."""
        return self.embed.logits(x) if self.config.tie_embeddings else self.head.logits(x)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef[Any],
    weights: nnx.State[Any, Any],
    x: jax.Array,
    rotary: Rotary,
    context: AttentionContext,
    pool: Pool | None,
    wanted: jax.Array | None,
) -> tuple[jax.Array, Pool | None]:
    """One layer under its own ``jit``: equal layers are traced and lowered once, however many there are."""
    layer: Block = nnx.merge(graph, weights)
    return layer(x, rotary, context, pool, wanted)


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> dict[ParamPath, nnx.Param[Any]]:
    """Every parameter of a decoder by path: ``get_value()`` is a ``ShapeDtypeStruct``, ``axes`` its logical axes."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    flat: Any = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    return dict(flat)


def decoder_from(config: ModelConfig, params: Params, mesh: Mesh | None = None) -> Decoder:
    """A decoder that holds the arrays of ``params``.

    Paths are those of ``abstract_params``, or for a weight that is no plain array those of its leaves, below the path
    that the plain one would have; they lie on ``mesh`` (default: the first device).
    """
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    _hold_leaves(decoder, params, mesh or make_mesh(1))
    shapes: Any = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    flat: Any = {path: shape.replace(params[path]) for path, shape in shapes}
    nnx.update(decoder, nnx.from_flat_state(flat))
    return decoder


def _hold_leaves(decoder: Decoder, params: Params, mesh: Mesh) -> None:
    """Put weights of other kinds, still without arrays, where ``params`` has leaves of such."""
    flat: Any = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    floats, leaves = dict(flat), defaultdict[ParamPath, dict[str, jax.Array]](dict)
    for path, value in params.items():
        if path not in floats:
            leaves[path[:-1]][str(path[-1])] = value
    for path, arrays in leaves.items():
        module: Any = decoder
        for name in path[:-1]:
            module = module[name] if isinstance(name, int) else getattr(module, name)
        setattr(module, str(path[-1]), weight_like(floats[path], arrays, mesh))
