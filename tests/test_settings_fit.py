"""Every accepted combination of settings: each batch that the scheduler makes fits one of the shapes of the engine."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.buckets import BucketTable, draft_shapes, prompt_output_shapes
from jaxdeploy.engine.device.inputs import ModelInputs
from jaxdeploy.engine.device.kv_cache import CachePlan
from jaxdeploy.engine.device.packing import choose_bucket, pack, prompt_outputs_of
from jaxdeploy.engine.front.build import make_scheduler, max_shared_len, resolve_limits, scheduler_limits, shapes_of
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.batch import ScheduledBatch
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.speculation.draft import DraftProposer
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.engine.speculation.speculation import Proposer, Speculation
from jaxdeploy.errors import ConfigError
from jaxdeploy.messages import Request, SamplingParams
from tests.tiny_models import CONFIG, VOCAB, AlwaysOpen

STEPS = 60


def maybe(least: int, most: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(least, most)


CONFIGS = st.builds(
    EngineConfig,
    session_len=maybe(2, 200),
    max_batch_size=maybe(1, 6),
    max_prefill_token_num=maybe(1, 400),
    num_tokens_per_iter=maybe(0, 400),
    block_size=st.sampled_from((1, 2, 16, 64)),
    decode_steps=st.integers(1, 300),
    num_speculative_tokens=maybe(1, 16),
    speculative_method=st.sampled_from((None, "ngram", "draft")),
    num_cpu_blocks=st.integers(0, 5),
    enable_prefix_caching=st.booleans(),
)


class NoDevice:
    """In place of a model runner: every token is 1."""

    def write_tokens(self, slot: int, token_ids: list[int]) -> None:
        """Nothing is kept."""

    def run(self, inputs: ModelInputs) -> Any:
        shape = inputs.shape
        return SimpleNamespace(sampled=SimpleNamespace(tokens=np.ones((shape.repeats, shape.samples), np.int32)))


def drafter(config: EngineConfig, limits: SchedulerLimits) -> Speculation | None:
    if config.speculative_method is None:
        return None
    count = config.num_speculative_tokens or 3
    proposer: Proposer = NgramProposer()
    if config.speculative_method == "draft":
        table = limits.blocks_for(limits.session_len)
        shapes = draft_shapes(limits.max_batch_size, limits.max_prefill_tokens, table, count)
        proposer = DraftProposer(cast(Any, NoDevice()), shapes, VOCAB, count)
    return Speculation(proposer, count, AlwaysOpen())


def some_request(name: int, session_len: int, dice: random.Random) -> Request:
    length = min(dice.choice((1, 5, 31, 32, 33, 90, 1000)), session_len - 1)
    sampling = SamplingParams(max_new_tokens=dice.choice((1, 2, 9, 500)), prompt_logprobs=dice.choice((None, None, 0)))
    tokens = tuple(dice.choices((1, 2), k=length))
    session = dice.choice((None, "session"))
    return Request(str(name), tokens, sampling, priority=dice.randrange(2), session_id=session)


def new_tokens(
    batch: ScheduledBatch, speculation: Speculation | None, dice: random.Random
) -> dict[Sequence, list[int]]:
    """What a step samples: 1 or 2, so that drafts are right now and then."""
    new = {}
    for chunk in (*batch.decodes, *batch.chunks):
        if not chunk.samples:
            continue
        sampled = dice.choices((1, 2), k=1 + len(chunk.drafts) if chunk.drafts else batch.repeats)
        if chunk.drafts and speculation is not None:
            sampled = speculation.accept(chunk.sequence, chunk.drafts, sampled)
        new[chunk.sequence] = sampled
    return new


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=CONFIGS, spare=st.integers(0, 8), seed=st.integers(0, 1000))
@example(config=EngineConfig(max_prefill_token_num=1), spare=8, seed=0)
@example(config=EngineConfig(max_prefill_token_num=64, num_tokens_per_iter=300), spare=8, seed=0)
def test_every_batch_fits_a_shape(platform: str, config: EngineConfig, spare: int, seed: int) -> None:
    mesh = cast(Any, SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)])))
    limits = resolve_limits(CONFIG, config, mesh)
    needed = -(-limits.session_len // config.block_size)
    plan = CachePlan(needed + spare, config.block_size, 1, "as few as may be", host_blocks=config.num_cpu_blocks or 0)
    bounds = scheduler_limits(limits, plan)
    scheduler = make_scheduler(BlockManager(plan.num_blocks), plan, bounds, max_shared_len(CONFIG, config))
    speculation = drafter(config, bounds)
    shapes = shapes_of(bounds, speculation.count if speculation else 0)
    dice = random.Random(seed)
    run(scheduler, shapes, speculation, dice)
    scheduler.blocks.check()
    scheduler.prefixes.check()


def run(scheduler: Scheduler, shapes: Any, speculation: Speculation | None, dice: random.Random) -> None:
    for step in range(STEPS):
        for index in range(dice.randrange(3) if step < STEPS // 2 else 0):
            scheduler.add(Sequence(some_request(10 * step + index, scheduler.limits.session_len, dice)))
        guesses = speculation if speculation is not None and speculation.should_draft(scheduler.decoding) else None
        batch = scheduler.schedule(guesses)
        assert batch or not scheduler.has_work, "work waits and nothing can run"
        scheduler.prefixes.transfers()
        assert not scheduler.faults
        if batch:
            of_kind = prompt_output_shapes(shapes) if prompt_outputs_of(batch) else shapes
            pack(choose_bucket(BucketTable(of_kind), batch), batch, VOCAB)
            scheduler.commit(new_tokens(batch, speculation, dice))
            for chunk in batch.chunks:
                if chunk.samples:
                    chunk.sequence.prompt_outputs = PromptOutputs.NONE


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("session_len", 1, 2), ("max_batch_size", 0, 1), ("max_prefill_token_num", 0, 1), ("decode_steps", 0, 1)],
)
def test_sizes_that_nothing_fits_in_are_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must be at least {least}"):
        EngineConfig(**cast(Any, {name: value}))
