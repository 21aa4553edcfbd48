"""Prompts that begin alike share blocks, and nothing but time changes by it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import max_shared_len
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request, SamplingParams
from jaxdeploy.models.rope import RopeConfig
from tests import test_quantized_kv as quantized
from tests.test_scheduler import BLOCK_SIZE, SESSION_LEN, FakeModel, make_scheduler, run
from tests.tiny_models import CONFIG, changed, outputs_of, prompt, request, tiny_engine
from tests.tiny_models import run as run_engine

TEXT = tuple(range(100, 100 + SESSION_LEN))


def ask(name: str, tokens: Iterable[int], new: int = 1) -> Sequence:
    return Sequence(Request(name, tuple(tokens), SamplingParams(max_new_tokens=new)))


def ran(scheduler: Scheduler, *sequences: Sequence) -> list[int]:
    """Cached tokens of each, run one after the other."""
    model = FakeModel(scheduler)
    for sequence in sequences:
        run(scheduler, [sequence], model)
    return [sequence.placement.cached_tokens for sequence in sequences]


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (19, 16), (20, 16), (21, 20)])
def test_whole_blocks_are_found_and_a_token_is_left(length: int, cached: int) -> None:
    assert ran(make_scheduler(), ask("a", TEXT[:40]), ask("b", TEXT[:length])) == [0, cached]


def test_only_what_begins_alike_is_found() -> None:
    other = (1, *TEXT[1:40])
    split = (*TEXT[:10], 1, *TEXT[11:40])
    assert ran(make_scheduler(), ask("a", TEXT[:40]), ask("b", other), ask("c", split)) == [0, 0, 8]


def test_equal_prompts_in_one_step_are_computed_once() -> None:
    scheduler = make_scheduler(budget=96)
    first, second = ask("a", TEXT[:22], new=8), ask("b", TEXT[:22], new=8)
    (batch, *_) = run(scheduler, [first, second])
    assert [(chunk.start, chunk.length) for chunk in batch.chunks] == [(0, 22), (20, 2)]
    assert (scheduler.prefixes.asked, scheduler.prefixes.found) == (44, 20)


def test_a_prompt_that_is_still_being_computed_is_shared_as_far_as_it_is() -> None:
    scheduler = make_scheduler(budget=32)
    model, long = FakeModel(scheduler), ask("a", TEXT[:70])
    scheduler.add(long)
    model.step()
    later = ask("b", TEXT[:60])
    scheduler.add(later)
    while scheduler.has_work:
        model.step()
    assert later.placement.cached_tokens == 56


def test_the_next_turn_finds_the_reply_too() -> None:
    scheduler = make_scheduler()
    model, first = FakeModel(scheduler), ask("a", TEXT[:9], new=12)
    run(scheduler, [first], model)
    second = ask("b", (*first.token_ids, 1, 2, 3))
    run(scheduler, [second], model)
    assert second.placement.cached_tokens == 20


def test_what_was_evicted_is_computed_again() -> None:
    scheduler = make_scheduler(blocks=24)
    other = ask("x", range(500, 590))  # takes 14 free blocks, then 9 of the 10 cached ones, the last ones first
    assert ran(scheduler, ask("a", TEXT[:40]), other, ask("b", TEXT[:40])) == [0, 0, 4]


def test_prompts_that_are_too_long_do_not_share() -> None:
    scheduler = make_scheduler(max_prompt_len=20)
    asked = [ask(name, TEXT[:length]) for name, length in (("a", 21), ("b", 20), ("c", 21), ("d", 20))]
    assert ran(scheduler, *asked) == [0, 0, 0, 16]


def test_aborted_sequences_leave_what_they_computed() -> None:
    scheduler = make_scheduler(budget=32)
    model, item = FakeModel(scheduler), ask("a", TEXT[:70])
    scheduler.add(item)
    model.step()
    scheduler.abort(item)
    assert scheduler.blocks.active == 0
    again = ask("b", TEXT[:70])
    run(scheduler, [again], model)
    assert again.placement.cached_tokens == 32


LIKE = st.tuples(
    st.sampled_from([TEXT, (*TEXT[:16], *range(300, 400)), (*TEXT[:33], *range(400, 500))]),
    st.integers(1, SESSION_LEN - 1),
    st.integers(1, 20),
    st.integers(0, 12),  # step at which it comes
    st.none() | st.integers(0, 25),  # steps until it is aborted
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(LIKE, min_size=1, max_size=10),
    blocks=st.integers(SESSION_LEN // BLOCK_SIZE, 60),
    batch=st.integers(1, 5),
    budget=st.sampled_from([32, 64, 96]),
    ahead=st.booleans(),
    host_blocks=st.sampled_from([0, 3, 40]),
)
def test_shared_blocks_hold_what_everybody_expects(
    requests: list[tuple[tuple[int, ...], int, int, int, int | None]],
    blocks: int,
    batch: int,
    budget: int,
    ahead: bool,
    host_blocks: int,
) -> None:
    """The model asserts it at every step, under preemption, eviction to the host and back, and abort."""
    scheduler = make_scheduler(blocks, batch, budget, host_blocks=host_blocks)
    model = FakeModel(scheduler, ahead=ahead)
    items = [ask(f"{index}", text[:length], new) for index, (text, length, new, _, _) in enumerate(requests)]
    for step in range(5000):
        for item, (_, _, _, comes, patience) in zip(items, requests, strict=True):
            if comes == step:
                scheduler.add(item)
            if patience is not None and step == comes + patience and item.finish_reason is None:
                scheduler.abort(item)
        if step > 12 and not scheduler.has_work:
            break
        model.step()
        assert len(scheduler.prefixes._known) <= blocks + host_blocks, "what lies nowhere is forgotten"
        scheduler.prefixes.check()
    assert not scheduler.has_work
    assert (scheduler.blocks.active, scheduler.blocks.available) == (0, blocks)
    assert scheduler.prefixes.found == sum(item.placement.cached_tokens for item in items)


def alike(**sampling: Any) -> list[Request]:
    """Prompts over one beginning of 50 tokens; some are parts of others, and two are equal."""
    text = prompt(110)
    ends = (60, 110, 48, 49, 110, 20)
    items = [request(f"{index}", text[:end], **sampling) for index, end in enumerate(ends)]
    return [*items, *(request(f"x{n}", (*text[:50], *prompt(n)), **sampling) for n in (1, 13, 40))]


@pytest.mark.parametrize("max_prefill", [32, 64])
@pytest.mark.parametrize("blocks", [128, 14])
def test_tokens_are_those_without_sharing(max_prefill: int, blocks: int) -> None:
    """Whole or chunked, with room or with preemptions; the second time most of it is cached."""
    engine, items = tiny_engine(blocks=blocks, max_prefill=max_prefill), alike()
    truth = run_engine(tiny_engine(sharing=False), items)
    assert run_engine(engine, items) == truth
    assert run_engine(engine, items) == truth
    assert engine.scheduler.prefixes.found > 0
    assert (engine.scheduler.preemptions > 0) == (blocks == 14)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_on_several_devices(tp: int) -> None:
    engine, items = tiny_engine(tp=tp), alike(max_new_tokens=6)
    truth = run_engine(tiny_engine(tp=tp, sharing=False), items)
    assert [run_engine(engine, items) for _ in range(2)] == [truth] * 2


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_in_a_quantised_cache(bits: int) -> None:
    items = alike(max_new_tokens=6)
    truth = run_engine(quantized.engine_of(bits, sharing=False), items)
    engine = quantized.engine_of(bits)
    assert [run_engine(engine, items) for _ in range(2)] == [truth] * 2


def test_alternatives_share_their_prompt() -> None:
    """``n`` replies are ``n`` requests: the prompt's whole blocks are computed by the first alone."""
    items = [request(f"{seed}", prompt(70), temperature=1.0, seed=seed) for seed in range(4)]
    engine = tiny_engine()
    outputs = outputs_of(engine, items)
    assert {name: [step.token_ids[0] for step in steps] for name, steps in outputs.items()} == run_engine(
        tiny_engine(sharing=False), items
    )
    assert sorted(steps[0].cached_tokens for steps in outputs.values()) == [0, 64, 64, 64]


@pytest.mark.parametrize(
    ("kind", "enabled", "longest"),
    [("default", True, sys.maxsize), ("llama3", True, sys.maxsize), ("dynamic", True, 48), ("default", False, 0)],
)
def test_who_shares(kind: Any, enabled: bool, longest: int) -> None:
    """Dynamic NTK turns the keys of long prompts by angles of their own."""
    model = changed(CONFIG, rope=RopeConfig(kind=kind, original_length=48))
    assert max_shared_len(model, EngineConfig(enable_prefix_caching=enabled)) == longest
