"""What parity is measured on: a model loaded as the engine loads it, its submodules' outputs, its greedy reply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxdeploy.checkpoint.loader import load_params
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.messages import Request, SamplingParams
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder, Params, abstract_params, decoder_from
from jaxdeploy.models.registry import family_of

Array = np.ndarray[Any, Any]
Outputs = Mapping[str, Array]

TOLERANCE = 1e-4
"""Largest relative error that float32 may show here (issue 2)."""

STRUCTURES = ("llama", "llama_tied", "qwen2_window", "mistral_window", "internlm2_bias", "rope_dynamic_long")
"""One case of each structure, for tests that compile a whole decoder for each: that is what takes the time."""
NOT_OUTPUTS = ("prompt", "greedy")


def fast_and_slow(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: ``names``, but those outside ``STRUCTURES`` are slow."""
    return [name if name in STRUCTURES else pytest.param(name, marks=pytest.mark.slow) for name in names]


def read_expected(folder: Path) -> dict[str, Array]:
    """What transformers computed for the checkpoint in ``folder``."""
    expected: dict[str, Array] = load_file(folder / "expected.safetensors")
    return expected


def reference_versions(folder: Path) -> dict[str, str]:
    """Return the versions that the golden in ``folder`` was made with."""
    with safe_open(folder / "expected.safetensors", "np") as file:
        return dict(file.metadata() or {})


def load_model(folder: Path) -> tuple[ModelConfig, Params]:
    """Configuration and float32 parameters of the checkpoint in ``folder``, through the product's own loader."""
    hf = read_hf_config(folder)
    family = family_of(hf)
    config = family.model_config(hf)
    abstract = abstract_params(config, jnp.dtype(jnp.float32))
    return config, load_params(abstract, family.weights(config), open_checkpoint(folder, None))


def load_decoder(folder: Path) -> Decoder:
    """The decoder of the checkpoint in ``folder``."""
    return decoder_from(*load_model(folder))


def submodule_outputs(decoder: Decoder, tokens: Array) -> dict[str, Array]:
    """Every submodule's output over one prompt ``tokens`` [T], by the names that the goldens use.

    Nothing is compiled as a whole: cases of equal shapes share the compiled operations, whatever their options.
    """
    length = len(tokens)
    positions, lengths = jnp.arange(length, dtype=jnp.int32), jnp.full((length,), length, jnp.int32)
    angles = decoder.config.layers[0].positions.tables(positions, lengths)
    x = decoder.embed(jnp.asarray(tokens))
    outputs = {"rope.cos": angles[0], "rope.sin": angles[1], "embed": x}
    for index, layer in enumerate(decoder.layers):
        attended, _ = layer.attention(layer.attention_norm(x), angles, DenseContext(1), None)
        fed = layer.mlp(layer.mlp_norm(x + attended))
        x = x + attended + fed
        outputs |= {f"layers.{index}.attention": attended, f"layers.{index}.mlp": fed, f"layers.{index}": x}
    normed = decoder.norm(x)
    outputs |= {"norm": normed, "logits": decoder.logits(normed)}
    return {name: np.asarray(value) for name, value in outputs.items()}


def relative_error(ours: Array, theirs: Array) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, f"shapes {ours.shape} and {theirs.shape} differ"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def errors(ours: Outputs, expected: Outputs) -> dict[str, float]:
    """The relative error of every output that ``expected`` has."""
    return {name: relative_error(ours[name], value) for name, value in expected.items() if name not in NOT_OUTPUTS}


def greedy_reply(folder: Path, prompt: Array, count: int, tp: int = 1) -> list[int]:
    """Return the ``count`` greedy tokens after ``prompt``, from the paged engine on ``tp`` devices."""
    config = EngineConfig(
        dtype="float32",
        tp=tp,
        max_batch_size=1,
        max_prefill_token_num=32,
        session_len=128,
        block_size=16,
        num_blocks=8,
        warmup=False,
    )
    engine = build_engine(folder, read_hf_config(folder), config)
    sampling = SamplingParams(max_new_tokens=count)
    engine.add(Request("greedy", tuple(prompt.tolist()), sampling))
    reply: list[int] = []
    while engine.has_work:
        for output in engine.step():
            reply.extend(output.token_ids)
    engine.close()
    return reply
