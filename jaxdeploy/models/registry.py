"""The model families: architecture name in ``config.json`` → family module, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.weights import WeightTable

FAMILIES = {
    "LlamaForCausalLM": "jaxdeploy.models.families.llama",
    "InternLM2ForCausalLM": "jaxdeploy.models.families.internlm2",
    "Qwen2ForCausalLM": "jaxdeploy.models.families.qwen2",
    "MistralForCausalLM": "jaxdeploy.models.families.mistral",
}


class Family(Protocol):
    """What a family module defines."""

    ARCHITECTURES: tuple[str, ...]

    def model_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """``config.json`` → sizes and options."""
        ...

    def weights(self, config: ModelConfig) -> WeightTable:
        """Parameter path → the checkpoint tensors it is made of."""
        ...


def architecture_of(hf: Mapping[str, Any]) -> str:
    """The architecture that ``config.json`` names. Raises ``UnsupportedModelError`` if it names none that is known."""
    names = [str(name) for name in hf.get("architectures") or ()]
    known = next((name for name in names if name in FAMILIES), None)
    if known is None:
        raise UnsupportedModelError(
            f"architectures={names} is not supported; config.json must name one of {', '.join(FAMILIES)}"
        )
    return known


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family module for a ``config.json``. Raises ``UnsupportedModelError``."""
    return cast(Family, importlib.import_module(FAMILIES[architecture_of(hf)]))


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``config.json`` → ``ModelConfig``. Raises ``UnsupportedModelError`` and ``CheckpointError``."""
    return family_of(hf).model_config(hf)
