"""Decoders whose layers are alike but for their windows, described by flat fields as ``config.json`` has them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdeploy.models.attention import AttentionConfig
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layer import LayerConfig
from jaxdeploy.models.mlp import MLPConfig
from jaxdeploy.models.rope import RopeConfig


@dataclass(frozen=True)
class DenseDecoder:
    """Grouped-query attention with rotary positions, gated feed-forward, RMS norms before both.

    ``windows`` holds the sliding window of each layer, ``None`` for full attention. The other fields are those of
    ``ModelConfig``, ``AttentionConfig`` and ``MLPConfig``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_position: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dtype: str = "float32"

    def model_config(self) -> ModelConfig:
        """Return the same as a list of layers."""
        mlp = MLPConfig(self.intermediate_size, self.mlp_bias)
        layers = tuple(LayerConfig(self._attention(window), mlp, self.norm_eps) for window in self.windows)
        assert len(layers) == self.num_layers, "a window, or None, for each layer"
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=layers,
            norm_eps=self.norm_eps,
            max_position=self.max_position,
            tie_embeddings=self.tie_embeddings,
            dtype=self.dtype,
        )

    def _attention(self, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=self.rope,
            window=window,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
        )
