"""The model families: architecture name in ``config.json`` → family module, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.files.stored import shown

if TYPE_CHECKING:  # they import jax, and ``jaxdeploy list`` needs the names alone
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

    def model_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """``config.json`` → sizes and options."""
        ...

    def weights(self, config: ModelConfig) -> WeightTable:
        """Parameter path → the checkpoint tensors it is made of."""
        ...


def architecture_of(hf: Mapping[str, Any]) -> str:
    """The architecture that ``config.json`` names, in the spelling of ``FAMILIES``.

    Files from before transformers 4.28 differ in case ("LLaMAForCausalLM"). Where there is no name, ``model_type``
    decides. Raises ``UnsupportedModelError`` if it names none that is known.
    """
    stored = StoredFields(hf)
    named = hf.get("architectures")
    names = [named] if isinstance(named, str) else stored.items("architectures")
    spelled = {name.casefold(): name for name in FAMILIES}
    if not names and (kind := stored.text("model_type", None)):
        names = [f"{kind}ForCausalLM"]
    known = next((spelled[name.casefold()] for name in names if str(name).casefold() in spelled), None)
    if known is None:
        raise UnsupportedModelError(
            f"architectures={shown(names)} is not supported; config.json must name one of {', '.join(FAMILIES)}"
        )
    return known


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family module for a ``config.json``. Raises ``UnsupportedModelError``."""
    return cast(Family, importlib.import_module(FAMILIES[architecture_of(hf)]))


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``config.json`` → ``ModelConfig``. Raises ``UnsupportedModelError`` and ``CheckpointError``."""
    return family_of(hf).model_config(hf)
