"""Decoders with quantised weights at work: on several devices, in the engine, through the fused kernels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.step import DeviceState
from jaxdeploy.engine.device.step_plan import StepPlan
from jaxdeploy.models import fused_decode
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.parallel.mesh import make_mesh
from tests import test_fused_decode as fused_steps
from tests import tiny_models
from tests.selection import every_other
from tests.stored_models import (
    AWQ,
    SCATTERED,
    SHARED,
    SMOOTH_QUANT,
    SUMMED_APART,
    Layout,
    apart,
    checkpoint,
    hf_of,
    kinds,
    logits,
    weights_of,
)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "jaxdeploy")
    return caplog


@pytest.mark.parametrize(("layout", "tp"), [pytest.param(AWQ, 2, marks=pytest.mark.slow), (AWQ, 4), (SCATTERED, 2)])
def test_int4_on_several_devices(layout: Layout, tp: int, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    stored = checkpoint(layout, SHARED)
    decoder = stored.load(tmp_path, tp=tp)
    assert kinds(decoder) == [["int4"] * 4]
    assert not said.messages
    assert apart(logits(decoder), logits(stored.load(tmp_path))) < SUMMED_APART
    for weight, cut in zip(weights_of(decoder), (2, 0, 3, 0), strict=True):
        array = weight.packed[...]
        share = [size // tp if axis == cut else size for axis, size in enumerate(array.shape)]
        assert [list(shard.data.shape) for shard in array.addressable_shards] == [share] * tp


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_int8_on_several_devices(tp: int, tmp_path: Path) -> None:
    """Where inputs are cut, each device rounds its own, in smaller steps than one device has for all of them."""
    stored = checkpoint(SMOOTH_QUANT, SHARED)
    one, several = stored.load(tmp_path), stored.load(tmp_path, tp=tp)
    random = np.random.default_rng(2)
    for index, cut in ((0, False), (3, True)):
        alone, shared = (weights_of(decoder)[index] for decoder in (one, several))
        x = random.standard_normal((5, alone.values[...].shape[-1]), np.float32)
        truth, found = (np.asarray(jax.jit(weight.multiply)(x)).reshape(5, -1) for weight in (alone, shared))
        if not cut:
            np.testing.assert_array_equal(found, truth)
            continue
        # Each input is off by at most half a step, evenly so; two such errors, over all inputs of an output.
        weight = np.asarray(alone.values[...], np.float64) * np.asarray(alone.scales[...])[:, None]
        step = np.abs(x).max(axis=1, keepdims=True) / 127
        likely = step * np.sqrt((weight**2).sum(axis=1)) * np.sqrt(2 / 12)
        assert 0.1 < (np.abs(found - truth) / likely).max() < 6
    exact = logits(stored.floats())
    assert apart(logits(several), logits(one)) < 2 * apart(logits(one), exact)


def test_inputs_that_devices_cannot_share(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """128 of ``wo``, which the packed form keeps together; the 256 of ``down`` are shared."""
    stored = checkpoint(AWQ)
    decoder = stored.load(tmp_path, tp=2)
    assert kinds(decoder) == [["int4", "float", "int4", "int4"]] * 2
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    assert said.messages == [
        "quantised linear maps expanded to floats: 2; tp=2 devices cannot share 128 inputs in multiples of 128"
    ]


@pytest.mark.parametrize("layout", every_other([AWQ, SMOOTH_QUANT]))
def test_the_engine_generates_what_the_decoder_says(layout: Layout, tmp_path: Path) -> None:
    """In chunks and from the cache, alone and together."""
    stored = checkpoint(layout)
    decoder = stored.load(tmp_path)
    truth = jax.jit((stored.floats() if layout is AWQ else decoder).__call__)
    runner, prompts = runner_over(decoder), [tiny_models.prompt(length) for length in (1, 17, 70)]
    together = [tiny_models.request(str(len(prompt)), prompt, max_new_tokens=8) for prompt in prompts]
    found = tiny_models.run(tiny_models.tiny_engine(runner=runner, shapes=STEPS), together)
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            padded = np.zeros((1, 96), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.asarray(truth(padded))[0, len(tokens) - 1].argmax()))
        assert found[str(len(prompt))] == tokens[len(prompt) :]
        alone = tiny_models.run_one(tiny_models.tiny_engine(runner=runner, shapes=STEPS), prompt, max_new_tokens=8)
        assert alone == found[str(len(prompt))]


STEPS = [tiny_models.SHAPES[2], tiny_models.SHAPES[4]]
"""One to decode, one to prefill."""


def runner_over(decoder: Decoder) -> ModelRunner:
    mesh, dtype, length = make_mesh(1), CacheDtype(jnp.dtype(jnp.float32)), tiny_models.SESSION_LEN
    sizes, layouts = EngineConfig(block_size=tiny_models.BLOCK_SIZE), decoder.cache_layouts
    plan = plan_cache(layouts, sizes, mesh, session_len=length, max_batch_size=tiny_models.SLOTS, dtype=dtype)
    pools = allocate_pools(layouts, plan, mesh, dtype)
    return tiny_models.LastingRunner(decoder, StepPlan(mesh), DeviceState.of(pools, tiny_models.SLOTS, length, mesh))


def test_decode_steps_through_the_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaded weights through the fused kernels (interpreted) are those weights op by op."""
    sizes = tiny_models.changed(fused_steps.CONFIG, num_layers=1, windows=(12,))
    monkeypatch.setattr(fused_steps, "CONFIG", sizes)
    hf = hf_of(
        "Qwen2ForCausalLM",
        num_hidden_layers=1,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_key_value_heads=tiny_models.attention_of(sizes).num_kv_heads,
        head_dim=tiny_models.attention_of(sizes).head_dim,
    )
    decoder = checkpoint(AWQ, hf).load(tmp_path, dtype=jnp.dtype(jnp.bfloat16), model=sizes)
    monkeypatch.setattr(fused_steps, "decoder_on", lambda tp, dtype: decoder)
    went, decode_hidden = [], fused_decode.decode_hidden

    def noted(*args: Any) -> Any:
        went.append("fused")
        return decode_hidden(*args)

    monkeypatch.setattr(fused_decode, "decode_hidden", noted)
    fused, pools = fused_steps.step("pallas_triton")
    plain, plain_pools = fused_steps.step("reference")
    assert went == ["fused", "fused"], "planned, then run; the reference does neither"
    # As for float weights there; those of the kernel are rounded to bfloat16 once more.
    tolerance = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    assert fused_steps.difference(fused, plain) < tolerance
    assert np.abs(pools - plain_pools).max() < tolerance * np.abs(plain_pools).max()
