"""The decoder: embeddings, layers, norm and head, configured by ``ModelConfig``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.attention import Attention, AttentionContext, DenseContext
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Embedding, Head, RMSNorm
from jaxdeploy.models.mlp import MLP
from jaxdeploy.models.model import Encoder, Hidden, Pools, Positions
from jaxdeploy.models.quantized import weight_like
from jaxdeploy.models.rope import PositionScheme, rotary
from jaxdeploy.models.weights import ParamPath
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.kv_pool import Pool

Params = Mapping[ParamPath, jax.Array]


class Layer(nnx.Module):
    """One pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attention = Attention(config, window, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        scheme: PositionScheme,
        context: AttentionContext,
        pool: Pool | None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """``x`` [T, D] → ([T, D], or the ``wanted`` rows of it; updated ``pool``)."""
        attended, pool = self.attention(self.attention_norm(x), scheme, context, pool, wanted)
        normed, x = self.mlp_norm.added(attended, x if wanted is None else x[wanted])
        return x + self.mlp(normed), pool


class Decoder(nnx.Module):
    """A decoder-only transformer. Fresh weights are random; ``jaxdeploy.checkpoint`` fills in real ones."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype | type = jnp.float32) -> None:
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, window, rngs=rngs, dtype=dtype) for window in config.windows])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Head(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)

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
        angles = rotary(self.config.rope, self.config.head_dim, *positions)
        updated, residuals = [], []
        for index, (layer, pool) in enumerate(zip(self.layers, pools, strict=True), 1):
            graph, weights = nnx.split(layer)
            rows = selected if index == len(self.layers) else None
            residuals.append(x)
            x, pool = _run_layer(graph, weights, x, angles, context, pool, rows)
            updated.append(pool)
        return Hidden(self.norm(x), updated, tuple(residuals[index] for index in taps))

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V]."""
        return self.embedding.logits(x) if self.config.tie_embeddings else self.head.logits(x)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef[Layer],
    weights: nnx.State[Any, Any],
    x: jax.Array,
    scheme: PositionScheme,
    context: AttentionContext,
    pool: Pool | None,
    wanted: jax.Array | None,
) -> tuple[jax.Array, Pool | None]:
    """One layer under its own ``jit``: equal layers are traced and lowered once, however many there are."""
    return nnx.merge(graph, weights)(x, scheme, context, pool, wanted)


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
