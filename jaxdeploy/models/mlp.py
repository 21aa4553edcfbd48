"""The gated feed-forward block (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Weight, constant, linear, parameter, value_of


class MLP(nnx.Module):
    """``down(silu(gate(x)) · up(x))``; gate and up are one array [D, 2, F], cut along F under tensor parallelism."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        size, width = config.hidden_size, config.intermediate_size
        self.gate_up: Weight = parameter(rngs, (size, 2, width), ("embed", None, "mlp"), dtype)
        self.down: Weight = parameter(rngs, (width, size), ("mlp", "embed"), dtype)
        self.gate_up_bias = constant(0.0, (2, width), (None, "mlp"), dtype) if config.mlp_bias else None
        self.down_bias = constant(0.0, (size,), ("embed",), dtype) if config.mlp_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → [T, D]."""
        both = linear(x, self.gate_up, value_of(self.gate_up_bias))
        gated = jax.nn.silu(both[:, 0]) * both[:, 1]
        return linear(gated, self.down, value_of(self.down_bias))
