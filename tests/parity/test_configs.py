"""The ways in which ``config.json`` says the same thing, and what holds where it says nothing."""

from __future__ import annotations

from typing import Any

import pytest
from golden_cases import CASES, GOLDENS

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.registry import read_config
from tests.tiny_models import attention_of, windows_of

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 64,
}


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.internlm2])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_older_rope_spelling(name: str, kind: str) -> None:
    """``rope_theta`` beside ``rope_scaling``, as files before transformers 5 have it."""
    newer = read_hf_config(GOLDENS / name)
    older = dict(newer)
    rope = dict(older.pop("rope_parameters"))
    older["rope_theta"] = rope.pop("rope_theta")
    rope[kind] = rope.pop("rope_type")
    older["rope_scaling"] = None if rope[kind] == "default" else rope
    assert read_config(older) == read_config(newer)


def _mistral(**options: Any) -> ModelConfig:
    return read_config({**SIZES, "num_attention_heads": 16, "architectures": ["MistralForCausalLM"], **options})


def test_mistral_without_the_key_has_a_window_of_4096() -> None:
    assert windows_of(_mistral()) == (4096,) * 3
    assert windows_of(_mistral(sliding_window=None)) == (None,) * 3
    assert windows_of(_mistral(sliding_window=7)) == (7,) * 3


def test_mistral_without_kv_heads_has_8() -> None:
    assert attention_of(_mistral()).num_kv_heads == 8
    assert attention_of(_mistral(num_key_value_heads=4)).num_kv_heads == 4


def test_qwen2_layer_types_of_another_length_are_refused() -> None:
    with pytest.raises(CheckpointError, match="layer_types has 2 entries for num_hidden_layers=3"):
        _qwen2(layer_types=["full_attention"] * 2)


def _qwen2(**options: Any) -> ModelConfig:
    return read_config({**SIZES, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 7, **options})


def test_qwen2_window() -> None:
    assert windows_of(_qwen2()) == (None,) * 3
    assert windows_of(_qwen2(use_sliding_window=False, max_window_layers=0)) == (None,) * 3
    assert windows_of(_qwen2(use_sliding_window=True)) == (None,) * 3, "max_window_layers is 28 where it is not given"
    assert windows_of(_qwen2(use_sliding_window=True, max_window_layers=1)) == (None, 7, 7)


def test_qwen2_layer_types_win() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows_of(_qwen2(use_sliding_window=True, max_window_layers=1, layer_types=kinds)) == (7, None, 7)
