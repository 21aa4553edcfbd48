"""Qwen 1.5, 2 and 2.5: Llama's tensors with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.families.llama import weights
from jaxdeploy.models.hf_config import read_decoder, read_layer_count

__all__ = ["model_config", "weights"]


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The window counts only with ``use_sliding_window``, and only in the layers that ``_slides`` names."""
    stored = StoredFields(hf)
    window = stored.whole("sliding_window", None) if stored.flag("use_sliding_window", False) else None
    windows = tuple(window if slides else None for slides in _slides(stored, read_layer_count(hf)))
    return read_decoder(hf, qkv_bias=True, windows=windows)


def _slides(stored: StoredFields, layers: int) -> list[bool]:
    """``layer_types`` (transformers 5) decides; files without it mean every layer from ``max_window_layers`` on."""
    kinds = stored.items("layer_types")
    if not kinds:
        first = stored.whole("max_window_layers", 28, least=0)
        return [layer >= first for layer in range(layers)]
    if len(kinds) != layers:
        raise CheckpointError(f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}; mend config.json")
    return [kind == "sliding_attention" for kind in kinds]
