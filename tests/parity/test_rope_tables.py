"""Rotary tables against transformers' at the sizes and lengths of real models, where a whole model would be too big."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import DYNAMIC, LLAMA3, YARN

from jaxdeploy.models.hf_config import read_rope
from jaxdeploy.models.rope import RopeConfig, rotary

pytestmark = pytest.mark.parity

Settings = Mapping[str, Any]

ROPES: Mapping[str, tuple[int, Settings]] = {
    "llama2": (4096, {"rope_type": "default", "rope_theta": 10000.0}),
    "mistral": (32768, {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (16384, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "internlm2.5": (32768, {**DYNAMIC, "rope_theta": 1e6}),
    "dynamic": (4096, {**DYNAMIC, "factor": 4.0, "rope_theta": 10000.0}),
    "dynamic with an original length": (4096, {**DYNAMIC, "original_max_position_embeddings": 1024}),
    "llama3.1": (131072, {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}),
    "llama3.2": (131072, {**LLAMA3, "factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}),
    "llama3 without its original length": (8192, {key: LLAMA3[key] for key in list(LLAMA3)[:-1]} | {"rope_theta": 5e5}),
    "qwen2.5": (131072, {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768}),
    "yarn mscale": (16384, {**YARN, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "yarn mscale alone": (16384, {**YARN, "original_max_position_embeddings": 4096, "mscale": 0.7}),
    "yarn attention_factor": (16384, {**YARN, "original_max_position_embeddings": 4096, "attention_factor": 1.25}),
    "yarn untruncated": (16384, {**YARN, "original_max_position_embeddings": 4096, "truncate": False}),
    "yarn betas": (16384, {**YARN, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn without a factor": (16384, {**YARN, "original_max_position_embeddings": 4096, "factor": None}),
}
HEAD_DIM = 128
LENGTHS = (1, 4095, 4096, 4097, 12000)
EPSILON = 2.0**-23


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ROPES)
def test_tables(name: str, length: int) -> None:
    """An angle may be wrong by its own rounding: a few units in the last place of position · frequency ≤ position."""
    positions = np.unique(np.linspace(0, length - 1, 400).astype(np.int32))
    rope, theirs = _transformers_table(*ROPES[name], positions)
    ours = rotary(rope, HEAD_DIM, jnp.asarray(positions), jnp.full(positions.shape, length, jnp.int32))
    tolerance = 4 * EPSILON * (positions[:, None] + 1) * np.abs(theirs).max()
    assert np.all(np.abs(np.stack(ours) - theirs) <= tolerance)


def _transformers_table(max_position: int, settings: Settings, positions: Any) -> tuple[RopeConfig, Any]:
    """Our reading of the configuration that transformers writes, and its cos and sin [2, T, H/2]."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 2 * HEAD_DIM, "num_attention_heads": 2, "max_position_embeddings": max_position}
    config = LlamaConfig(**sizes, rope_parameters={"rope_theta": 10000.0, **settings})
    embedding = LlamaRotaryEmbedding(config)
    tables = embedding(torch.zeros(1), torch.from_numpy(positions.astype(np.int64))[None])
    half = HEAD_DIM // 2
    return read_rope(config.to_dict()), np.stack([table[0, :, :half].numpy() for table in tables])
