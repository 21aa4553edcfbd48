"""Qwen 1.5, 2 and 2.5: Llama's tensors with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.models.config import ModelConfig, read_decoder
from jaxdeploy.models.families.llama import weights

__all__ = ["ARCHITECTURES", "model_config", "weights"]

ARCHITECTURES = ("Qwen2ForCausalLM",)


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The window counts only with ``use_sliding_window``, and only from layer ``max_window_layers`` on."""
    layers = int(hf.get("num_hidden_layers", 0))
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    first = int(hf.get("max_window_layers", 28))
    windows = tuple(None if window is None or index < first else int(window) for index in range(layers))
    return read_decoder(hf, qkv_bias=True, windows=windows)
