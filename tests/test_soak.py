"""The scheduler for a long time: at random, and on a simulated device through hours of traffic."""

from __future__ import annotations

import gc
import random

import pytest
from simulate_traffic import BLOCKS, HOST_BLOCKS, HOUR, Device, new_scheduler, simulate

from jaxdeploy.engine.scheduling.blocks import Node
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request, SamplingParams
from tests.test_scheduler import SESSION_LEN, FakeModel, make_scheduler

TEXTS = [tuple(range(start, start + SESSION_LEN)) for start in (1000, 2000, 3000)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("operations", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_operations_at_random(operations: int, ahead: bool) -> None:
    """Add, fork, go on, abort, preempt, step. The model asserts that everybody finds the right keys and values."""
    chance = random.Random(operations)
    scheduler = make_scheduler(blocks=48, batch=6, budget=64, host_blocks=30, mixed=40, decode_steps=2)
    model, alive, ended = FakeModel(scheduler, ahead=ahead), list[Sequence](), 0
    talks: dict[str, tuple[int, ...]] = {}
    for operation in range(operations):
        what = chance.choices(["step", "add", "fork", "go on", "abort", "preempt"], [60, 12, 4, 4, 3, 4])[0]
        if what == "add" and len(alive) < 40:
            alive.append(asked(chance, f"{operation}", chance.choice(TEXTS)[: chance.randint(1, 90)]))
            scheduler.add(alive[-1])
        elif what == "fork" and alive:
            first = chance.choice(alive)
            for number in range(3):
                alive.append(asked(chance, f"{operation} {number}", first.request.prompt_token_ids))
                scheduler.add(alive[-1])
        elif what == "go on" and talks:
            session, tokens = chance.choice(sorted(talks.items()))
            alive.append(asked(chance, f"{operation}", (*tokens, *range(chance.randint(1, 9))), session))
            scheduler.add(alive[-1])
        elif what == "abort" and alive:
            scheduler.abort(chance.choice(alive))
        elif what == "preempt" and scheduler._running:
            scheduler._preempt(chance.choice(list(scheduler._running)))
        else:
            model.step()
        for item in [item for item in alive if item.finish_reason is not None]:
            alive.remove(item)
            ended += 1
            if item.request.session_id is not None and len(item.token_ids) < 80:
                talks[item.request.session_id] = tuple(item.token_ids)
        scheduler.blocks.check()
        scheduler.prefixes.check()
    while scheduler.has_work:
        model.step()
    assert ended > operations // 12
    assert scheduler.preemptions > operations // 50
    assert scheduler.prefixes.restored > operations // 50
    assert_nothing_is_left(scheduler, 48, 30)


def asked(chance: random.Random, name: str, tokens: tuple[int, ...], session: str | None = None) -> Sequence:
    sampling = SamplingParams(max_new_tokens=chance.randint(1, 20))
    session = session or chance.choice([None, "s", "t", "u", "v"])
    priority, tenant = chance.choice([0, 0, 0, 1]), chance.choice("ABC")
    return Sequence(Request(name, tokens, sampling, priority, tenant, session_id=session))


def assert_nothing_is_left(scheduler: Scheduler, blocks: int, host_blocks: int) -> None:
    scheduler.blocks.check()
    scheduler.prefixes.check()
    assert (scheduler.blocks.active, scheduler.blocks.available) == (0, blocks)
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert sorted(scheduler._running._free_slots) == list(range(scheduler.limits.max_batch_size))
    assert len(scheduler.prefixes._known) <= blocks + host_blocks
    assert not scheduler._waiting._queues


@pytest.mark.parametrize("seconds", [30, pytest.param(HOUR, marks=pytest.mark.slow)])
def test_hours_of_traffic(seconds: float) -> None:
    """Nobody starves, tenants that ask for more than their share get it alike, and nothing is left behind."""
    device = Device(new_scheduler())
    found = simulate(device, calm=seconds, busy=seconds)
    assert found["calm_wait_s"]["max"] < 30
    assert found["busy_waiting_at_the_end"] > 10 * seconds
    assert found["busy_fairness_index"] > 0.99
    assert_nothing_is_left(device.scheduler, BLOCKS, HOST_BLOCKS)
    device.flight.clear()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Sequence], "somebody holds what has ended"
    assert sum(type(thing) is Node for thing in gc.get_objects()) <= 2 * (BLOCKS + HOST_BLOCKS)
