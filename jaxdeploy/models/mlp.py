"""The gated feed-forward module (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.models.layers import Weight, linear, value_of
from jaxdeploy.models.linears import LinearInput, LinearSpec, Outputs, whole


@dataclass(frozen=True)
class MLPConfig:
    """A gated feed-forward module.

    ``intermediate_size``: outputs of gate and of up, F.
    ``bias``: all three linear maps have biases.
    """

    intermediate_size: int
    bias: bool = False

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> MLP:
        """Return a module with inputs and outputs of size ``width``."""
        return MLP(self, width, rngs=rngs, dtype=dtype)


class MLP(nnx.Module):
    """``down(silu(gate(x)) · up(x))``; gate and up are one array [D, 2, F], cut along F under tensor parallelism."""

    def __init__(self, config: MLPConfig, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.config, self.width = config, width
        gate_up, down = MLP.linears(self)  # a subclass declares more
        self.gate_up: Weight
        self.down: Weight
        self.gate_up, self.gate_up_bias = gate_up.parameters(rngs, dtype)
        self.down, self.down_bias = down.parameters(rngs, dtype)

    def linears(self) -> tuple[LinearSpec, ...]:
        """Return the linear maps of gate and up together, and of down."""
        size = self.config.intermediate_size
        gate_up = LinearSpec(
            path=("gate_up",),
            inputs=(self.width,),
            outputs=(2, size),
            axes=("embed", None, "mlp"),
            parts=("gate", "up"),
            fused=Outputs((size, size), np.stack, list, axis=0, shares=(1, 1)),
            bias="gate_up_bias" if self.config.bias else None,
        )
        down = LinearSpec(
            path=("down",),
            inputs=(size,),
            outputs=(self.width,),
            axes=("mlp", "embed"),
            parts=("down",),
            fused=whole(self.width),
            bias="down_bias" if self.config.bias else None,
            # The gate multiplies the outputs of up, so the inputs of down are proportional to them.
            source=LinearInput(("gate_up",), axis=0, index=1),
        )
        return gate_up, down

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → [T, D]."""
        both = linear(x, self.gate_up, value_of(self.gate_up_bias))
        gated = jax.nn.silu(both[:, 0]) * both[:, 1]
        return linear(gated, self.down, value_of(self.down_bias))
