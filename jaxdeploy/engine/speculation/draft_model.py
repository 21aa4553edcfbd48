"""The model that drafts: which one ``EngineConfig`` names, and loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.checkpoint.eagle3 import load_eagle3
from jaxdeploy.checkpoint.model import LoadOptions, load_model
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.config import EngineConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.eagle3 import Eagle3Config, eagle3_config
from jaxdeploy.models.model import Model
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import tensor_parallel
from jaxdeploy.tokenizer import Tokenizer

DEFAULT_DRAFTS = {"ngram": 7, "draft": 3, "eagle3": 3}
"""Drafts per step of each method, unless the configuration gives a count."""


@dataclass(frozen=True)
class DraftModel:
    """A model that drafts, before its weights are loaded."""

    folder: Path
    """Folder of its checkpoint."""
    hf: Mapping[str, Any]
    """Its ``config.json``."""
    config: ModelConfig
    eagle3: Eagle3Config | None = None
    """Configuration of an EAGLE-3 head, ``None`` for a separate model."""


def method_of(config: EngineConfig) -> str | None:
    """Return how drafts are made, ``None`` for no drafts.

    Raises ``ConfigError`` if a draft model is missing, or given without use.
    """
    method, model = config.speculative_method, config.speculative_model
    if method is None:
        return "draft" if model else None
    if method == "ngram" and model:
        raise ConfigError(f"speculative_model={model!r} has no use with speculative_method=ngram; leave one out")
    if method != "ngram" and not model:
        raise ConfigError(f"speculative_method={method!r} needs a speculative_model; name its folder or hub id")
    return method


def find_draft_model(folder: Path, model: ModelConfig, config: EngineConfig) -> DraftModel | None:
    """Return the draft model that ``config`` names for ``model``, which is in ``folder``, or ``None``.

    Raises:
        ConfigError: it has other tokens than the model.
        CheckpointError: it is a head for another model.
        and the errors of ``resolve_model`` and ``family_of``.
    """
    method, named = method_of(config), config.speculative_model
    if method is None or named is None:
        return None
    found = resolve_model(named, download_dir=config.download_dir)
    hf = read_hf_config(found)
    if method == "eagle3":
        head = eagle3_config(hf, model)
        head = replace(head, layer=tensor_parallel(head.layer, config.tp))
        return DraftModel(found, hf, head.layer, head)
    if _tokens(found) != _tokens(folder):
        raise ConfigError(f"speculative_model={named!r} has other tokens than the model; take one of its family")
    return DraftModel(found, hf, tensor_parallel(family_of(hf).model_config(hf), config.tp))


def load_draft_model(
    draft: DraftModel | None,
    model: Model,
    config: EngineConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    *,
    outputs_first: bool,
    progress: bool,
) -> Model | None:
    """Return the loaded draft model for ``model``, or ``None``. Raises ``CheckpointError``."""
    if draft is None:
        return None
    if draft.eagle3 is not None:
        embedding = model.embedding.table[...]
        return load_eagle3(draft.folder, draft.eagle3, embedding, mesh, dtype, progress=progress)
    options = LoadOptions(dtype, load_format=config.load_format, outputs_first=outputs_first, progress=progress)
    return load_model(draft.folder, draft.hf, mesh, options, draft.config)


def _tokens(folder: Path) -> list[str]:
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]
