"""Mistral 7B, Nemo and Small: Llama's tensors with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.models.config import ModelConfig, read_decoder
from jaxdeploy.models.families.llama import weights

__all__ = ["ARCHITECTURES", "model_config", "weights"]

ARCHITECTURES = ("MistralForCausalLM",)


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``sliding_window`` null means full attention; files that leave it or the KV heads out mean 4096 and 8."""
    window = hf.get("sliding_window", 4096)
    layers = int(hf.get("num_hidden_layers", 0))
    return read_decoder({"num_key_value_heads": 8, **hf}, windows=(None if window is None else int(window),) * layers)
