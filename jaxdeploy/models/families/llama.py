"""Llama 1, 2, 3.x and everything stored like it: CodeLlama, Vicuna, WizardLM, Yi, SOLAR, UltraLM, DeepSeek LLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.files.fields import StoredFields
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.hf_config import read_decoder
from jaxdeploy.models.weights import DecoderNames, WeightTable, decoder_weights

NAMES = DecoderNames(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layer="model.layers.{}",
    norms={"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    linears={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``attention_bias`` covers query, key, value and output; ``mlp_bias`` all three maps of the feed-forward."""
    stored = StoredFields(hf)
    bias = stored.flag("attention_bias", False)
    return read_decoder(hf, qkv_bias=bias, o_bias=bias, mlp_bias=stored.flag("mlp_bias", False))


def weights(config: ModelConfig) -> WeightTable:
    """Separate query, key, value, gate and up."""
    return decoder_weights(config, NAMES)
