"""The tiny models that parity is measured on: data only, for ``make_goldens.py`` (with torch) and tests (without).

Every size differs from the others where a mix-up could hide, weights are large enough for positions and windows to
matter, and ``rms_norm_eps`` is large enough to be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).resolve().parents[1] / "tests/goldens/models"
PROMPT_LENGTH = 24
NEW_TOKENS = 64
LONG = 128  # more than prompt and reply together
SHORT = 16  # less than the prompt

SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONG,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """One tiny model. ``reference`` is the transformers class's prefix, ``rope`` its ``rope_parameters``.

    ``internlm2`` stores a Llama's weights in InternLM2's layout: transformers has no class for it. ``seed`` draws the
    weights; it was chosen for a varied reply that no rounding decides.
    """

    name: str
    reference: str = "Llama"
    options: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    internlm2: bool = False
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the transformers configuration."""
        rope = {"rope_type": "default", "rope_theta": 10000.0, **self.rope}
        return {**SIZES, **self.options, "rope_parameters": rope}


def _stretched(name: str, rope: Mapping[str, Any], max_position: int = LONG, *, seed: int = 0) -> Case:
    """A Llama with heads of 16, so that there are eight frequencies to stretch."""
    options = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": max_position}
    return Case(name, options=options, rope=rope, seed=seed)


LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: Mapping[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC: Mapping[str, Any] = {"rope_type": "dynamic", "factor": 2.0}

CASES = (
    Case("llama"),
    Case("llama_mha", options={"num_key_value_heads": 4}),
    Case("llama_mqa", options={"num_key_value_heads": 1}),
    Case("llama_bias", options={"attention_bias": True, "mlp_bias": True}, seed=1),
    Case("llama_tied", options={"tie_word_embeddings": True}, seed=6),
    Case("qwen2", "Qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1}, seed=3),
    Case("qwen2_window", "Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, seed=2),
    Case("mistral_window", "Mistral", {"sliding_window": 6}, seed=1),
    Case("mistral_full", "Mistral", {"sliding_window": None}),
    Case("mistral_head_dim", "Mistral", {"sliding_window": 20, "head_dim": 16}),
    Case("internlm2", internlm2=True),
    Case(
        "internlm2_bias", options={"attention_bias": True}, rope={**DYNAMIC, "rope_theta": 1e6}, internlm2=True, seed=5
    ),
    _stretched("rope_linear", {"rope_type": "linear", "factor": 4.0}, seed=2),
    _stretched("rope_dynamic_short", DYNAMIC, seed=1),
    _stretched("rope_dynamic_long", DYNAMIC, SHORT),
    _stretched("rope_llama3", {**LLAMA3, "rope_theta": 5e5}),
    _stretched("rope_yarn", YARN, seed=1),
    _stretched("rope_yarn_mscale", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, seed=1),
    _stretched("rope_yarn_attention_factor", {**YARN, "attention_factor": 1.3}, seed=2),
    _stretched("rope_yarn_untruncated", {**YARN, "beta_fast": 4.0, "beta_slow": 0.8, "truncate": False}, seed=1),
)
