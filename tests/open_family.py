"""A model family from outside of the product: its feed-forward has one linear map more, called ``mix``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.families import llama
from jaxdeploy.models.hf_config import read_decoder
from jaxdeploy.models.layer import LayerConfig
from jaxdeploy.models.layers import Weight, linear
from jaxdeploy.models.linears import LinearSpec, whole
from jaxdeploy.models.mlp import MLP, MLPConfig
from jaxdeploy.models.weights import WeightTable, decoder_weights

NAMES = replace(llama.NAMES, linears={**llama.NAMES.linears, "mix": "mlp.mix_proj"})

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MixedConfig(MLPConfig):
    """Options of ``MixedMLP``."""

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> MLP:
        return MixedMLP(self, width, rngs=rngs, dtype=dtype)


class MixedMLP(MLP):
    """``down(silu(gate(x)) · up(x) · tanh(mix(x)))``."""

    def __init__(self, config: MLPConfig, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        super().__init__(config, width, rngs=rngs, dtype=dtype)
        _, mix, _ = self.linears()
        self.mix: Weight = mix.parameters(rngs, dtype)[0]

    def linears(self) -> tuple[LinearSpec, ...]:
        gate_up, down = super().linears()
        size = self.config.intermediate_size
        mix = LinearSpec(("mix",), (self.width,), (size,), ("embed", "mlp"), ("mix",), whole(size))
        return gate_up, mix, down

    def __call__(self, x: jax.Array) -> jax.Array:
        both = linear(x, self.gate_up)
        return linear(jax.nn.silu(both[:, 0]) * both[:, 1] * jnp.tanh(linear(x, self.mix)), self.down)


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    config = read_decoder(hf)
    layers = []
    for layer in config.layers:
        assert isinstance(layer, LayerConfig)
        layers.append(replace(layer, mlp=MixedConfig(layer.mlp.intermediate_size)))
    return replace(config, layers=tuple(layers))


def weights(config: ModelConfig) -> WeightTable:
    return decoder_weights(config, NAMES)


def logits(tensors: Mapping[str, Array], hf: Mapping[str, Any], tokens: Array) -> Array:
    """The logits [T, V] after ``tokens`` [T], from the stored ``tensors``, in numpy."""
    heads, kv, eps = hf["num_attention_heads"], hf["num_key_value_heads"], hf["rms_norm_eps"]
    x, length = tensors["model.embed_tokens.weight"][tokens], len(tokens)
    size = x.shape[1] // heads
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: Array, name: str) -> Array:
        normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[f"{name}.weight"]
        return normed

    def rotated(x: Array) -> Array:
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    for index in range(hf["num_hidden_layers"]):
        prefix = f"model.layers.{index}"

        def project(x: Array, name: str, prefix: str = prefix) -> Array:
            product: Array = x @ tensors[f"{prefix}.{name}_proj.weight"].T
            return product

        normed = norm(x, f"{prefix}.input_layernorm")
        q = rotated(project(normed, "self_attn.q").reshape(length, heads, size))
        k = rotated(project(normed, "self_attn.k").reshape(length, kv, size)).repeat(heads // kv, axis=1)
        v = project(normed, "self_attn.v").reshape(length, kv, size).repeat(heads // kv, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("nts,snh->tnh", shares / shares.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + project(attended, "self_attn.o")
        normed = norm(x, f"{prefix}.post_attention_layernorm")
        gate, up, mix = (project(normed, f"mlp.{name}") for name in ("gate", "up", "mix"))
        x = x + project(gate / (1 + np.exp(-gate)) * up * np.tanh(mix), "mlp.down")
    return norm(x, "model.norm") @ tensors["lm_head.weight"].T
