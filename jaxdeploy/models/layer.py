"""The pre-norm layer of Llama-like decoders."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.attention import AttentionConfig, AttentionContext
from jaxdeploy.models.block import Block
from jaxdeploy.models.cache_layout import CacheLayout
from jaxdeploy.models.layers import RMSNorm
from jaxdeploy.models.linears import LinearSpec, NormInput, within
from jaxdeploy.models.mlp import MLPConfig
from jaxdeploy.models.rope import PositionScheme, RotaryPositions
from pallas_kernels.kv_pool import Pool


@dataclass(frozen=True)
class LayerConfig:
    """A pre-norm block: attention, then feed-forward, each added to the residual stream.

    ``attention``: options of the attention.
    ``mlp``: options of the feed-forward module.
    ``norm_eps``: of both norms.
    """

    attention: AttentionConfig
    mlp: MLPConfig
    norm_eps: float

    @property
    def positions(self) -> RotaryPositions:
        """See ``BlockConfig``."""
        return self.attention.positions

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> Block:
        """See ``BlockConfig``."""
        return Layer(self, width, rngs=rngs, dtype=dtype)

    def with_dynamic_rope(self, factor: float, original_length: int) -> LayerConfig:
        """See ``BlockConfig``."""
        rope = replace(self.attention.rope, kind="dynamic", factor=factor, original_length=original_length)
        return replace(self, attention=replace(self.attention, rope=rope))

    def shared_by(self, tp: int) -> LayerConfig:
        """See ``BlockConfig``."""
        return replace(self, attention=self.attention.shared_by(tp))


class Layer(nnx.Module):
    """The block that ``LayerConfig`` describes."""

    def __init__(self, config: LayerConfig, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.attention_norm = RMSNorm(width, config.norm_eps, dtype=dtype)
        self.attention = config.attention.build(width, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(width, config.norm_eps, dtype=dtype)
        self.mlp = config.mlp.build(width, rngs=rngs, dtype=dtype)

    @property
    def cache_layout(self) -> CacheLayout:
        """See ``Block``."""
        return self.attention.cache_layout

    def linears(self) -> tuple[LinearSpec, ...]:
        """See ``Block``."""
        return (
            *within("attention", self.attention.linears(), NormInput(("attention_norm", "scale"))),
            *within("mlp", self.mlp.linears(), NormInput(("mlp_norm", "scale"))),
        )

    def __call__(
        self,
        x: jax.Array,
        scheme: PositionScheme,
        context: AttentionContext,
        pool: Pool | None,
        selected: jax.Array | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """See ``Block``."""
        attended, pool = self.attention(self.attention_norm(x), scheme, context, pool, selected)
        normed, x = self.mlp_norm.added(attended, x if selected is None else x[selected])
        return x + self.mlp(normed), pool
