"""Qwen 1.5, 2 and 2.5: Llama's tensors with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.config import ModelConfig, read_decoder
from jaxdeploy.models.families.llama import weights

__all__ = ["ARCHITECTURES", "model_config", "weights"]

ARCHITECTURES = ("Qwen2ForCausalLM",)


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The window counts only with ``use_sliding_window``, and only in the layers that ``_slides`` names."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    windows = tuple(int(window) if window is not None and slides else None for slides in _slides(hf))
    return read_decoder(hf, qkv_bias=True, windows=windows)


def _slides(hf: Mapping[str, Any]) -> list[bool]:
    """``layer_types`` (transformers 5) decides; files without it mean every layer from ``max_window_layers`` on."""
    layers, kinds = int(hf.get("num_hidden_layers", 0)), hf.get("layer_types")
    if not kinds:
        return [layer >= int(hf.get("max_window_layers", 28)) for layer in range(layers)]
    if len(kinds) != layers:
        raise CheckpointError(f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}; mend config.json")
    return [kind == "sliding_attention" for kind in kinds]
