"""From an ``EngineConfig`` to who guesses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.batch import draft_shapes
from jaxdeploy.engine.model_runner import ModelRunner, Pools
from jaxdeploy.engine.speculation.draft import DraftProposer
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.engine.speculation.speculation import Proposer, Speculation
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.registry import family_of
from jaxdeploy.parallel.sharding import check_divisible
from jaxdeploy.tokenizer import Tokenizer

USUAL = {"ngram": 7, "draft": 3, "eagle3": 3}
"""Tokens guessed at a time unless a count is given."""


@dataclass(frozen=True)
class DraftModel:
    """The model that guesses: its folder, its ``config.json``, and what that means."""

    folder: Path
    hf: Mapping[str, Any]
    config: ModelConfig


def method_of(config: EngineConfig) -> str | None:
    """Who guesses, ``None`` where nobody does. Raises ``ConfigError`` where a model is missing, or one too many."""
    method, model = config.speculative_method, config.speculative_model
    if method is None:
        return "draft" if model else None
    if method == "ngram" and model:
        raise ConfigError(
            f"speculative_model={model!r} has no use with speculative_method=ngram; leave one of them out"
        )
    if method != "ngram" and not model:
        raise ConfigError(f"speculative_method={method!r} needs a speculative_model; name its folder or hub id")
    return method


def find_draft_model(folder: Path, config: EngineConfig) -> DraftModel | None:
    """The model that ``config`` names to guess for the one in ``folder``, if it names one.

    Raises ``ConfigError`` where it has other tokens, and what ``resolve_model`` and ``family_of`` raise.
    """
    if method_of(config) != "draft" or config.speculative_model is None:
        return None
    found = resolve_model(config.speculative_model, download_dir=config.download_dir)
    if _tokens(found) != _tokens(folder):
        raise ConfigError(
            f"speculative_model={config.speculative_model!r} has other tokens than the model; take one of its family"
        )
    hf = read_hf_config(found)
    model = family_of(hf).model_config(hf)
    check_divisible(
        config.tp, {"num_key_value_heads": model.num_kv_heads, "intermediate_size": model.intermediate_size}
    )
    return DraftModel(found, hf, model)


def build_speculation(
    config: EngineConfig,
    mesh: Mesh,
    draft: tuple[Decoder, Pools] | None,
    *,
    slots: int,
    session_len: int,
    max_prefill_tokens: int,
    table_length: int,
) -> Speculation | None:
    """What ``config`` asks for; ``draft`` is the model that guesses and its KV pools, which have the model's blocks."""
    method = method_of(config)
    if method is None:
        return None
    count = config.num_speculative_tokens or USUAL[method]
    proposer: Proposer = NgramProposer()
    if draft is not None:
        decoder, pools = draft
        runner = ModelRunner(decoder, pools, mesh, slots=slots, session_len=session_len)
        shapes = draft_shapes(slots, max_prefill_tokens, table_length, count)
        proposer = DraftProposer(runner, shapes, decoder.config.vocab_size, count)
    return Speculation(proposer, count)


def _tokens(folder: Path) -> list[str]:
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]
