"""From an ``EngineConfig`` to a proposer of drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.checkpoint.eagle3 import load_eagle3
from jaxdeploy.checkpoint.model import load_model
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.buckets import draft_shapes
from jaxdeploy.engine.device.features import Features, FeatureTap
from jaxdeploy.engine.device.kv_cache import CachePlan, allocate_pools
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.step import DeviceState
from jaxdeploy.engine.device.step_plan import plan_steps
from jaxdeploy.engine.limits import Limits
from jaxdeploy.engine.speculation.draft import DraftProposer
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.engine.speculation.speculation import Proposer, Speculation
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.eagle3 import Eagle3, Eagle3Config, eagle3_config
from jaxdeploy.models.model import Model
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import tensor_parallel
from jaxdeploy.tokenizer import Tokenizer

DEFAULT_DRAFTS = {"ngram": 7, "draft": 3, "eagle3": 3}
"""Method → drafts of a step if no count is given."""


@dataclass(frozen=True)
class DraftModel:
    """A model that makes drafts.

    Attributes:
        folder: of its files.
        hf: its ``config.json``.
        config: the options that follow from it.
        eagle3: the options of a head; ``None`` for a complete model.
    """

    folder: Path
    hf: Mapping[str, Any]
    config: ModelConfig
    eagle3: Eagle3Config | None = None


class Drafting(NamedTuple):
    """How drafts are made.

    Attributes:
        speculation: ``None`` without drafts.
        features: written by the steps of the model for the head that drafts.
        tap: how they are made.
    """

    speculation: Speculation | None = None
    features: Features | None = None
    tap: FeatureTap | None = None


def method_of(config: EngineConfig) -> str | None:
    """Return the method that makes drafts, or ``None``. Raises ``ConfigError``: a model is missing or superfluous."""
    method, model = config.speculative_method, config.speculative_model
    if method is None:
        return "draft" if model else None
    if method == "ngram" and model:
        raise ConfigError(f"speculative_model={model!r} has no use with speculative_method=ngram; leave one out")
    if method != "ngram" and not model:
        raise ConfigError(f"speculative_method={method!r} needs a speculative_model; name its folder or hub id")
    return method


def find_draft_model(folder: Path, model: ModelConfig, config: EngineConfig) -> DraftModel | None:
    """Return the draft model that ``config`` names for ``model``, which is in ``folder``; ``None`` if it names none.

    Raises ``ConfigError`` where it has other tokens, ``CheckpointError`` where a head is for another model, and what
    ``resolve_model`` and ``family_of`` raise.
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
    """Load ``draft``, the draft model of ``model``, if there is one. Raises ``CheckpointError``."""
    if draft is None:
        return None
    if draft.eagle3 is not None:
        embedding = model.embedding.table[...]
        return load_eagle3(draft.folder, draft.eagle3, embedding, mesh, dtype, progress=progress)
    return load_model(
        draft.folder,
        draft.hf,
        mesh=mesh,
        dtype=dtype,
        model=draft.config,
        load_format=config.load_format,
        outputs_first=outputs_first,
        progress=progress,
    )


def build_speculation(
    config: EngineConfig,
    draft: DraftModel | None,
    model: Model | None,
    plan: CachePlan,
    mesh: Mesh,
    dtype: CacheDtype,
    limits: Limits,
) -> Drafting:
    """Return what ``config`` asks for; ``model`` is the loaded ``draft``."""
    method = method_of(config)
    if method is None:
        return Drafting()
    count = config.num_speculative_tokens or DEFAULT_DRAFTS[method]
    if draft is None or model is None:
        return Drafting(Speculation(NgramProposer(), count))
    pools = allocate_pools(model.cache_layouts, plan, mesh, dtype)
    features, tap = None, None
    if draft.eagle3 is not None and isinstance(model, Eagle3):
        *pools_of_layers, array = pools
        pools = tuple(pools_of_layers)
        features = Features(array)
        tap = FeatureTap(draft.eagle3.taps, model.fuse[...])
    slots, session_len = limits.max_batch_size, limits.session_len
    shapes = draft_shapes(slots, limits.max_prefill_tokens, plan.blocks_for(session_len), count)
    steps = plan_steps(model, mesh, pools, shapes)
    state = DeviceState.of(pools, slots, session_len, mesh)
    runner = ModelRunner(model, steps, state, features=features)
    proposer: Proposer = DraftProposer(runner, shapes, draft.config.vocab_size, count, first=1 if features else 0)
    return Drafting(Speculation(proposer, count), features, tap)


def _tokens(folder: Path) -> list[str]:
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]
