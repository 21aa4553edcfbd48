"""InternLM2 and 2.5: query, key and value in one tensor, grouped per KV head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.files.fields import StoredFields
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.hf_config import read_decoder
from jaxdeploy.models.weights import DecoderNames, WeightTable, decoder_weights

NAMES = DecoderNames(
    embedding="model.tok_embeddings",
    norm="model.norm",
    head="output",
    layer="model.layers.{}",
    norms={"attention_norm": "attention_norm", "mlp_norm": "ffn_norm"},
    linears={
        "wqkv": "attention.wqkv",
        "out": "attention.wo",
        "gate": "feed_forward.w1",
        "up": "feed_forward.w3",
        "down": "feed_forward.w2",
    },
)


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``bias`` covers ``wqkv`` and ``wo``."""
    bias = StoredFields(hf).flag("bias", False)
    return read_decoder(hf, qkv_bias=bias, o_bias=bias)


def weights(config: ModelConfig) -> WeightTable:
    """``wqkv`` is stored in the very order of our parameter; ``w1``, ``w3``, ``w2`` are gate, up, down."""
    return decoder_weights(config, NAMES)
