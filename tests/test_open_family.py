"""Blocks that no product file knows work everywhere: see ``open_family`` and ``latent_family``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.compress.evaluate import load_decoder
from jaxdeploy.compress.folds import folds
from jaxdeploy.compress.forward import LayerForward
from jaxdeploy.compress.merge import merge_lora
from jaxdeploy.compress.weights import FloatModel
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.quantized import Int4Weight
from jaxdeploy.models.registry import FAMILIES
from tests import open_family
from tests.test_quantize import run as quantize
from tests.test_quantize import write_model
from tests.tiny_models import request, run

HF: dict[str, Any] = {
    "architectures": ["OpenForCausalLM"],
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
}
SIZES = {
    "warmup": False,
    "dtype": "float32",
    "block_size": 16,
    "max_batch_size": 4,
    "max_prefill_token_num": 64,
    "session_len": 96,
}
PROMPT = np.random.default_rng(3).integers(0, 1024, 40)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "OpenForCausalLM", "tests.open_family")
    monkeypatch.setitem(FAMILIES, "LatentForCausalLM", "tests.latent_family")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", HF)


def replies(folder: Path, *adapters: str | None, **options: Any) -> list[list[int]]:
    """Greedy replies to two prompts with a common beginning, one after the other, with each of ``adapters``."""
    engine = build_engine(folder, read_hf_config(folder), EngineConfig(**{**SIZES, **options}))
    found = []
    for adapter in adapters or (None,):
        for length in (36, 40):
            item = replace(request(str(length), PROMPT[:length].tolist(), max_new_tokens=8), adapter=adapter)
            found.append(run(engine, [item])[str(length)])
    assert (engine.scheduler.prefixes.found > 0) == options.get("enable_prefix_caching", True)
    engine.close()
    return found


def expected_replies(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    """The replies according to numpy."""
    tensors = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}
    added = {} if adapter is None else load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in added if name.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        tensors[f"{module}.weight"] += added[name.replace("lora_A", "lora_B")] @ added[name]
    found = []
    for length in (36, 40):
        tokens = PROMPT[:length].tolist()
        for _ in range(8):
            tokens.append(int(open_family.logits(tensors, HF, np.array(tokens))[-1].argmax()))
        found.append(tokens[length:])
    return found


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_runs_with_an_adapter_of_the_new_map(tp: int, model: Path, tmp_path: Path) -> None:
    """As numpy says, on one device and on two."""
    adapter = write_adapter(tmp_path / "adapter")
    expected = expected_replies(model) + expected_replies(model, adapter)
    assert expected[:2] != expected[2:]
    assert replies(model, None, "a", tp=tp, adapters={"a": str(adapter)}) == expected


@pytest.mark.slow
def test_prefix_cache_and_merged_adapter(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    merge_lora(model, adapter, tmp_path / "merged")
    assert replies(model, enable_prefix_caching=False) == replies(model) == expected_replies(model)
    assert replies(tmp_path / "merged") == expected_replies(model, adapter)


def test_folds_leave_its_outputs_unchanged(model: Path) -> None:
    """Norm, gate and up together with ``mix``; values; up."""
    stored = FloatModel.open(model, HF, "auto")
    params, specs = stored.layer(0), stored.linears(0)
    changed, paths = dict(params), {spec.name: spec.path for spec in specs}

    def multiply(name: str, factors: jax.Array) -> None:
        weight = changed[paths[name]]
        changed[paths[name]] = (weight.reshape(len(factors), -1) * factors[:, None]).reshape(weight.shape)

    found = list(folds(specs, changed, lambda path, value: value, multiply))
    assert [fold.linears for fold in found] == [("wqkv",), ("wo",), ("gate_up", "mix"), ("down",)]
    widths = {spec.name: spec.width for spec in specs}
    for seed, fold in enumerate(found):
        random = np.random.default_rng(seed).uniform(0.5, 2, widths[fold.linears[0]]).astype(np.float32)
        fold.apply(fold.tie(jnp.asarray(random)))
    assert all(np.abs(changed[path] - params[path]).max() > 1e-3 for path in paths.values())
    forward = LayerForward(stored.config.layers[0], stored.config.hidden_size)
    x = jnp.asarray(np.random.default_rng(9).standard_normal((1, 12, 64)), jnp.float32)
    before, after = (forward.outputs(values, x, DenseContext(1)) for values in (params, changed))
    np.testing.assert_allclose(after, before, atol=1e-5)


def write_adapter(folder: Path, module: str = "mlp.mix_proj", rows: int = 128) -> Path:
    """An adapter of rank 4 that adapts a linear map with 64 inputs in both layers."""
    folder.mkdir()
    random = np.random.default_rng(5)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((4, 64)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((rows, 4)).astype(np.float32)
    put_tensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [module.split(".")[-1]], "bias": "none"}
    put_json(folder / "adapter_config.json", config)
    return folder


@pytest.mark.parametrize("method", [pytest.param("gptq", marks=pytest.mark.slow), "awq"])
def test_it_is_quantised(method: str, model: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / method, method=method)
    assert [linear.linear for linear in report.linears[:5]] == ["wqkv", "wo", "gate_up", "mix", "down"]
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.2
    decoder = load_decoder(tmp_path / method)
    assert isinstance(decoder.layers[1].mlp.mix, Int4Weight)
    if method == "gptq":
        assert replies(tmp_path / method) == replies(tmp_path / method, tp=2)


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_another_cache_geometry(tp: int, tmp_path: Path) -> None:
    """A folder of a family with latent attention: loaded, with and without prefix cache, adapted, quantised."""
    hf = {**HF, "architectures": ["LatentForCausalLM"], "latent_rank": 16}
    model = write_model(tmp_path / "model", hf)
    adapter = write_adapter(tmp_path / "adapter", "self_attn.down_proj", 32)
    merge_lora(model, adapter, tmp_path / "merged")
    expected = [dense_replies(folder) for folder in (model, tmp_path / "merged")]
    assert expected[0] != expected[1]
    assert replies(model, None, "a", tp=tp, adapters={"a": str(adapter)}) == expected[0] + expected[1]
    if tp == 1:
        assert replies(model, enable_prefix_caching=False) == expected[0]
        report = quantize(model, tmp_path / "awq", method="awq")
        assert [linear.linear for linear in report.linears[:5]] == ["query", "kv", "out", "gate_up", "down"]
        assert replies(tmp_path / "awq") == dense_replies(tmp_path / "awq")


def dense_replies(folder: Path) -> list[list[int]]:
    """The replies according to the whole sequences, without a cache."""
    decoder, found = load_decoder(folder), []
    for length in (36, 40):
        tokens = PROMPT[:length].tolist()
        for _ in range(8):
            padded = jnp.asarray([tokens + [0] * (48 - len(tokens))], jnp.int32)
            tokens.append(int(decoder(padded)[0, len(tokens) - 1].argmax()))
        found.append(tokens[length:])
    return found
