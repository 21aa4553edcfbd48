"""From a folder with a ``config.json`` to an engine that compiles nothing while it serves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdeploy.checkpoint.kv_parameters import write_kv_parameters
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine, resolve_limits
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.errors import CacheTooSmallError, CheckpointError, ConfigError
from jaxdeploy.models.registry import read_config
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.kv_pool import QuantizedPool, pool_bits
from tests.tiny_models import VOCAB, live_arrays, outputs_of, prompt, request

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
COMPILE = "/jax/core/compile/backend_compile_duration"


def build(folder: Path, **config: Any) -> Engine:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF))
    small = {"load_format": "dummy", "max_batch_size": 2, "max_prefill_token_num": 32, "warmup": False}
    return build_engine(folder, HF, EngineConfig(**{**small, **config}))


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of what XLA was asked to compile since the last ``clear``; cached programs count too."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILE:
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_nothing_is_compiled_after_warm_up(
    tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = live_arrays()
    engine = build(tmp_path, warmup=True, num_blocks=2, block_size=32)
    assert "jit(run_step)" in compiled
    compiled.clear()
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "min_p": 0.1, "seed": 1},
        {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logprobs": 3},
        {"bad_token_sequences": ((1, 2), (3,)), "stop_token_ids": frozenset({5}), "min_new_tokens": 4},
    ]
    requests = [
        request(f"{length} {index}", prompt(length), max_new_tokens=20, **sampling)
        for length in (1, 30, 33, 60)
        for index, sampling in enumerate(settings)
    ]
    outputs = outputs_of(engine, requests)
    assert engine.scheduler.preemptions > 0
    assert all(outputs.values())
    for item in requests[:4]:
        outputs_of(engine, [item])
    assert compiled == []
    assert "compiling a step after warm-up" not in caplog.text
    engine.close()
    assert live_arrays() == before


def test_a_compile_after_warm_up_is_noticed(
    tmp_path: Path, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The partner of the test above: its two witnesses speak when a step does compile."""
    engine = build(tmp_path)
    engine._runner.warm_up([], iter)
    compiled.clear()
    with caplog.at_level(logging.WARNING):
        outputs_of(engine, [request("a", prompt(5), max_new_tokens=1)])
    assert "compiling a step after warm-up" in caplog.text
    assert "jit(run_step)" in compiled
    engine.close()


def test_the_plan_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="jaxdeploy"):
        build(tmp_path, num_blocks=5).close()
    assert "KV cache: 5 blocks of 64 tokens = 320 tokens" in caplog.text


def test_weights_and_pools_are_spread_over_devices(tmp_path: Path) -> None:
    engine = build(tmp_path, tp=4)
    arrays = (*engine._runner._arrays.weights, *jax.tree.leaves(engine._runner._own_state.pools))
    assert all(len(array.sharding.device_set) == 4 for array in arrays)
    cut = sum(not array.sharding.is_fully_replicated for array in arrays)
    assert cut == 2 * 4 + 1 + 2  # four weights a layer, the head, a pool a layer
    engine.close()


@pytest.mark.parametrize(("policy", "bits"), [("int8", 8), ("int4", 4)])
def test_a_quantised_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: str, bits: int) -> None:
    with caplog.at_level(logging.INFO, logger="jaxdeploy"):
        engine = build(tmp_path, quant_policy=policy, num_blocks=2)
    assert f"int{bits} KV cache: 2 blocks of 64 tokens" in caplog.text
    assert caplog.text.count("in v0.3 it meant int8, which is 8") == (bits == 4)
    pools = engine._runner._own_state.pools
    assert {pool_bits(pool, 8) for pool in pools} == {bits}
    assert len(outputs_of(engine, [request("a", prompt(5), max_new_tokens=3)])["a"]) == 3
    engine.close()


@pytest.mark.slow
def test_ranges_that_v03_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_kv_parameters(tmp_path, np.array([[0.5, 1, 0.25, 0]] * 2, np.float32))
    engine = build(tmp_path, quant_policy=4, num_blocks=2, tp=2)
    assert caplog.text.count("the KV cache is int8 with their calibrated ranges") == 1
    outputs_of(engine, [request("a", prompt(5), max_new_tokens=3)])
    for pool in engine._runner._own_state.pools:
        assert isinstance(pool, QuantizedPool)
        assert pool.calibrated
        held = {
            (half, which): set(np.asarray(pool.scales)[:, half, :, which].flat) for half in (0, 1) for which in (0, 1)
        }
        assert held == {(0, 0): {0.5}, (0, 1): {1 - 64}, (1, 0): {0.25}, (1, 1): {-32}}
    engine.close()
    (tmp_path / "layers.1.past_kv_scale.0.weight").write_bytes(b"x" * 7)
    with pytest.raises(CheckpointError, match=r"layers.1.past_kv_scale.0.weight: has 7 bytes, 16 expected"):
        build(tmp_path, quant_policy=4)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"tp": 3}, ConfigError, r"tp=3 must divide 4 query heads \(4 = 1 x 3 \+ 1\); use tp=1, 2 or 4"),
        ({"num_blocks": 1, "block_size": 32}, CacheTooSmallError, "session_len=64 needs 2 KV blocks of 32 tokens"),
    ],
)
def test_what_cannot_be_built(tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, **config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (64, 8, 512, "float32")),
        ({"session_len": 40, "max_batch_size": 3}, (40, 3, 128, "float32")),  # no more than fills the batch
        ({"max_prefill_token_num": 33, "dtype": "bfloat16"}, (64, 8, 64, "bfloat16")),
        ({"rope_scaling_factor": 2.0}, (128, 8, 512, "float32")),
    ],
)
def test_gaps_are_filled(config: dict[str, Any], expected: tuple[int, int, int, str]) -> None:
    limits = resolve_limits(read_config(HF), EngineConfig(**config), make_mesh(1))
    assert (limits.session_len, limits.max_batch_size, limits.max_prefill_tokens, limits.dtype.name) == expected


def test_a_session_beyond_what_the_model_was_made_for_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_limits(read_config(HF), EngineConfig(session_len=100), make_mesh(1)).session_len == 100
    assert "session_len=100 is more than the 64 tokens the model was made for" in caplog.text
