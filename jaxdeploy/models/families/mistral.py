"""Mistral 7B, Nemo and Small: Llama's tensors with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.files.fields import StoredFields
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.families.llama import weights
from jaxdeploy.models.hf_config import read_decoder, read_layer_count

__all__ = ["model_config", "weights"]


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``sliding_window`` null means full attention; files that leave it or the KV heads out mean 4096 and 8."""
    stored = StoredFields({"sliding_window": 4096, "num_key_value_heads": 8, **hf})
    window = stored.whole("sliding_window", None)
    return read_decoder(stored.values, windows=(window,) * read_layer_count(hf))
