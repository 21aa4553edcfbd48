"""The device's side of a step: what stays there, what is updated in place, what is given back."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.inputs import padding_inputs
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.decoder import decoder_from
from jaxdeploy.models.model import Positions
from jaxdeploy.models.rope import RopeConfig
from tests.tiny_models import (
    CONFIG,
    SHAPES,
    SHAPES_IN_A_ROW,
    VOCAB,
    changed,
    lasting_runner,
    live_arrays,
    params,
    prompt,
    request,
    run_one,
    runner_of,
    tiny_engine,
)


def test_the_device_knows_the_tokens_that_the_host_knows() -> None:
    """Neither padding rows nor unfinished prompts write into the token buffer."""
    engine, runner = tiny_engine(max_prefill=32), lasting_runner(1)
    for length in (40, 20, 3):
        engine.add(request(f"{length}", prompt(length), temperature=1.0))
    for _ in range(9):
        engine.step()
        for sequence in engine.scheduler._running:
            known = np.asarray(runner._own_state.token_buffer)[sequence.placement.slot, : len(sequence.token_ids)]
            assert known.tolist() == sequence.token_ids


def test_dynamic_rope_goes_by_the_prompt() -> None:
    """The base is picked once for a sequence, so that keys in the cache and later queries agree."""
    config = changed(CONFIG, rope=RopeConfig(kind="dynamic", factor=4.0, original_length=16))
    runner, decoder = runner_of(ModelRunner, config=config), decoder_from(config, params(config))
    engine = tiny_engine(runner=runner, shapes=[SHAPES[0], SHAPES[3]], batch=1, max_prefill=32)
    tokens = [*prompt(50), *run_one(engine, prompt(50))]
    values = jnp.arange(len(tokens), dtype=jnp.int32)
    for prompt_length, same in ((50, True), (len(tokens), False)):
        positions = Positions(values, jnp.full_like(values, prompt_length))
        x = decoder.hidden(decoder.embed(jnp.array(tokens)), positions, DenseContext(1), [None, None]).states
        assert (np.asarray(decoder.logits(x)).argmax(axis=-1)[49:-1].tolist() == tokens[50:]) == same
    engine.close()


def test_pools_and_buffer_are_donated() -> None:
    """They are updated in place, not copied."""
    engine, runner = tiny_engine(), lasting_runner(1)
    engine.add(request("a", prompt(5)))
    for _ in range(2):
        before = jax.tree.leaves(runner._own_state)
        engine.step()
        assert all(array.is_deleted() for array in before)
    engine.abort("a")


@pytest.mark.parametrize("full_sampler", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, SHAPES_IN_A_ROW[-1]], ids=str)
def test_no_step_copies_a_pool(shape: StepShape, full_sampler: bool) -> None:
    """XLA may find a copy handy, and then every step would move the whole cache; pools are updated in place."""
    compiled = lasting_runner(1).compiled(padding_inputs(shape, VOCAB, full_sampler=full_sampler))
    pools = jax.tree.leaves(lasting_runner(1)._own_state.pools)
    dims = ",".join(map(str, pools[0].shape))
    assert not re.findall(rf"f32\[{dims}\]\S* copy\(", str(compiled.as_text()))
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(pool.nbytes for pool in pools)


def test_close_gives_the_memory_back() -> None:
    """Pools and buffer are donated from step to step: none is left behind, and closing frees the last."""
    run_one(tiny_engine(), prompt(5))
    before = live_arrays()
    engine = tiny_engine(runner=runner_of(ModelRunner), shapes=[SHAPES[0], SHAPES[3]], batch=1)
    held = live_arrays()
    assert run_one(engine, prompt(5)) == run_one(tiny_engine(), prompt(5))
    assert live_arrays() == held
    engine.close()
    assert live_arrays() == before


def test_a_cpu_computes_angles_once_a_step() -> None:
    """XLA would do it in every layer, for every head (``models/rope.py``)."""
    compiled = str(lasting_runner(1).compiled(padding_inputs(SHAPES[3], VOCAB, full_sampler=False)).as_text())
    assert len(re.findall(r" (?:cosine|sine)\(", compiled)) == 2


def test_only_what_is_wanted_passes_the_last_layer() -> None:
    decoder, tokens = decoder_from(CONFIG, params()), jnp.array(prompt(12))
    wanted = jnp.array([11, 3])
    step = (decoder.embed(tokens), Positions.of_prompts(1, 12), DenseContext(1), [None, None])
    every = decoder.hidden(*step).states
    some = decoder.hidden(*step, wanted).states
    np.testing.assert_allclose(some, every[wanted], rtol=0, atol=2e-5)
    for rows, narrow in ((None, False), (wanted, True)):
        traced = str(jax.make_jaxpr(lambda rows=rows: decoder.hidden(*step, rows).states)())
        assert ("f32[2,2,64]" in traced) == narrow, "the feed-forward of two tokens"
