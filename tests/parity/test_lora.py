"""LoRA adapters against PEFT: every target set, unmerged and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES

from jaxdeploy.checkpoint.adapter import adaptable, read_adapter
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.compress.merge import merge_lora
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.lora import bank_of
from jaxdeploy.models.model import Positions
from jaxdeploy.models.registry import family_of
from jaxdeploy.parallel.mesh import make_mesh
from tests.parity.measure import TOLERANCE, load_decoder, relative_error

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings=True.:UserWarning"),
]

Array = np.ndarray[Any, Any]
MAX_RANK = 8
TOKENS = np.random.RandomState(5).randint(64, size=24).astype(np.int32)


@dataclass(frozen=True)
class Tuned:
    """A base of ``golden_cases`` and the options of an adapter."""

    options: Mapping[str, Any]
    base: str = "llama"


def _tuned(target: Any, base: str = "llama", **options: Any) -> Tuned:
    return Tuned({"r": 4, "lora_alpha": 12, "target_modules": target, **options}, base)


TUNED = {
    "queries": _tuned(["q_proj"]),
    "queries and values": _tuned(["q_proj", "v_proj"], r=8),
    "attention": _tuned(["q_proj", "k_proj", "v_proj", "o_proj"], r=1),
    "feed-forward": _tuned(["gate_proj", "up_proj", "down_proj"], r=3),
    "all-linear": _tuned("all-linear", "qwen2_window"),
    "all-linear, biases": _tuned("all-linear", "llama_bias"),
    "regex": _tuned(r".*layers\.1\..*(up|down|k)_proj", "mistral_window"),
    "one layer": _tuned(["o_proj", "up_proj"], layers_to_transform=[1]),
    "mixed ranks": _tuned(
        "all-linear",
        rank_pattern={"q_proj": 7, r"layers\.0\..*down_proj": 2, "model.layers.1.self_attn.v_proj": 1},
        alpha_pattern={"gate_proj": 3, "v_proj": 0.5},
    ),
    "rslora": _tuned("all-linear", use_rslora=True, r=8, rank_pattern={"up_proj": 2}),
    "head": _tuned(["lm_head", "down_proj"]),
    "tied head": _tuned(["lm_head", "q_proj"], "llama_tied"),
}


@dataclass(frozen=True)
class Made:
    """Folders of a base and an adapter that PEFT wrote just now; logits [T, V] with it, and the weights merged."""

    base: Path
    adapter: Path
    logits: Array
    merged: Mapping[str, Array] = field(repr=False)
    tied: bool


@pytest.fixture(scope="module", params=TUNED)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    import torch
    from make_goldens import build
    from peft import LoraConfig, get_peft_model

    tuned, folder = TUNED[request.param], tmp_path_factory.mktemp("lora")
    model = build(next(case for case in CASES if case.name == tuned.base))
    model.save_pretrained(folder / "base")
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **tuned.options))
    random = np.random.RandomState(11)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                drawn = random.standard_normal(tuple(value.shape)) * 0.6 / np.sqrt(value.shape[1])
                value.copy_(torch.from_numpy(drawn.astype(np.float32)))
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        logits = adapted(torch.from_numpy(TOKENS[None].astype(np.int64))).logits[0].numpy()
        merged = adapted.merge_and_unload().state_dict()
    weights = {name: value.numpy() for name, value in merged.items()}
    return Made(folder / "base", folder / "adapter", logits, weights, model.config.tie_word_embeddings)


def test_logits(made: Made) -> None:
    hf, decoder = read_hf_config(made.base), load_decoder(made.base)
    linears = adaptable(family_of(hf), decoder.config)
    adapter = read_adapter(made.adapter, linears, max_rank=MAX_RANK)
    sizes: dict[str, Any] = {"slots": 2, "max_rank": MAX_RANK, "dtype": jnp.dtype(jnp.float32), "head": True}
    bank = bank_of(decoder.config, linears, make_mesh(1), **sizes)
    pairs = {path: pair for path, linear in linears.items() if (pair := adapter.pair(linear)) is not None}
    arrays = bank.put(bank.zeros(), 1, bank.content(pairs))

    @jax.jit
    def logits(slot: jax.Array) -> jax.Array:
        length = len(TOKENS)
        slots, positions = jnp.full((length,), slot), Positions.of_prompts(1, length)
        adapted = bank.adapted(decoder, arrays, slots)
        pools = [None] * len(adapted.layers)
        x = adapted.hidden(adapted.embed(jnp.asarray(TOKENS)), positions, DenseContext(1), pools).states
        return bank.logits(adapted, arrays, x, slots)

    assert relative_error(np.asarray(logits(jnp.int32(1))), made.logits) < TOLERANCE
    plain = np.asarray(decoder(jnp.asarray(TOKENS[None])))[0]
    assert relative_error(np.asarray(logits(jnp.int32(-1))), plain) < TOLERANCE
    assert relative_error(plain, made.logits) > 0.05


def test_merged(made: Made, tmp_path: Path) -> None:
    merge_lora(made.base, made.adapter, tmp_path / "merged")
    ours = np.asarray(load_decoder(tmp_path / "merged")(jnp.asarray(TOKENS[None])))[0]
    assert relative_error(ours, made.logits) < TOLERANCE
    for name, ref in open_checkpoint(tmp_path / "merged").items():
        if made.tied and name in ("lm_head.weight", "model.embed_tokens.weight"):
            continue  # PEFT merges a tied head into the embeddings as well
        assert relative_error(ref.read(), made.merged[name]) < 1e-6, name
