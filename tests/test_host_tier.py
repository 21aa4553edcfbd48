"""Blocks that the device evicts lie in host memory until they are wanted again, and nothing but time changes by it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.host_blocks import GROUP, HostBlocks
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.scheduling.host_tier import Transfer
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.parallel.mesh import make_mesh
from tests.test_prefix_cache import TEXT, ask, ran
from tests.test_scheduler import FakeModel, make_scheduler, run, sequence
from tests.tiny_models import CONFIG, SHAPES, lasting_runner, outputs_of, prompt, request, tiny_engine
from tests.tiny_models import run as run_engine

FILLING = range(500, 590)
"""Tokens that take all of 24 blocks but one."""


def copies(scheduler: Scheduler) -> list[bool]:
    """Directions of what the scheduler has copied from now on; to the device: true."""
    seen: list[bool] = []
    transfers = scheduler.prefixes.transfers

    def noted() -> list[Transfer]:
        taken = transfers()
        seen.extend(copy.to_device for copy in taken)
        return taken

    scheduler.prefixes.transfers = noted  # type: ignore[method-assign]
    return seen


def test_what_was_evicted_comes_back() -> None:
    scheduler = make_scheduler(blocks=24, host_blocks=40)
    seen = copies(scheduler)
    assert ran(scheduler, ask("a", TEXT[:40]), ask("x", FILLING), ask("b", TEXT[:40])) == [0, 0, 36]
    assert seen.count(True) == scheduler.prefixes.restored == 8  # one was never evicted


def test_the_oldest_is_given_up() -> None:
    """The last blocks of a prompt are evicted first, so three on the host end with its first ones."""
    scheduler = make_scheduler(blocks=24, host_blocks=3)
    assert ran(scheduler, ask("a", TEXT[:40]), ask("x", FILLING), ask("b", TEXT[:40])) == [0, 0, 16]
    assert scheduler.prefixes.host.used == 3


def test_what_is_kept_there_is_copied_once() -> None:
    scheduler = make_scheduler(blocks=24, host_blocks=40)
    model = FakeModel(scheduler)
    for round_ in range(4):
        run(scheduler, [ask(f"a{round_}", TEXT[:40])], model)
        run(scheduler, [ask(f"x{round_}", FILLING)], model)
    seen = copies(scheduler)
    for round_ in range(4):
        run(scheduler, [ask(f"b{round_}", TEXT[:40])], model)
        run(scheduler, [ask(f"y{round_}", FILLING)], model)
    assert seen.count(True) > 40
    assert seen.count(False) == 0


def test_what_is_about_to_come_back_is_not_given_up() -> None:
    """Making room for it evicts others, who would like its place."""
    scheduler = make_scheduler(blocks=24, host_blocks=9)
    asked = [ask("a", TEXT[:40]), ask("x", FILLING), ask("b", TEXT[:40]), ask("c", (*TEXT[:36], 1, 2, 3))]
    assert ran(scheduler, *asked) == [0, 0, 36, 36]


def test_a_preempted_sequence_is_swapped_in() -> None:
    scheduler = make_scheduler(blocks=24, host_blocks=24)
    model, item = FakeModel(scheduler), sequence("b", 50, new=9)
    scheduler.add(item)
    model.step()
    scheduler._preempt(item)
    scheduler.blocks.release(scheduler.blocks.allocate(24))
    (chunk,) = model.step().chunks
    assert (chunk.start, chunk.length) == (48, 3)
    while scheduler.has_work:
        model.step()


def crowded(**sampling: Any) -> list[Any]:
    """More than a small engine holds, and all of it asked for twice."""
    return [request(f"{n}", prompt(20 + 11 * n), **{"max_new_tokens": 24, **sampling}) for n in range(7)]


@pytest.mark.parametrize("tp", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("host_blocks", [3, 64])
def test_tokens_are_those_of_a_large_device(host_blocks: int, tp: int) -> None:
    engine, items = tiny_engine(blocks=12, host_blocks=host_blocks, tp=tp), crowded()
    truth = run_engine(tiny_engine(tp=tp), items)
    assert run_engine(engine, items) == truth
    outputs = outputs_of(engine, items)
    assert {name: [output.token_ids[0] for output in each] for name, each in outputs.items()} == truth
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.prefixes.restored > 0


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("tp", [1, 4])
def test_copies_are_exact(bits: int | None, tp: int) -> None:
    """There and back, into other blocks, in groups of any size."""
    mesh, layouts, dtype = make_mesh(tp), cache_layouts(CONFIG), CacheDtype(jnp.dtype(jnp.bfloat16), bits)
    count = 2 * GROUP + 3
    sizes = EngineConfig(block_size=4, num_blocks=2 * count)
    plan = plan_cache(layouts, sizes, mesh, session_len=4, max_batch_size=1, dtype=dtype)
    random = np.random.default_rng(0)
    pools = jax.tree.map(
        lambda array: jax.device_put(random.integers(0, 200, array.shape).astype(array.dtype), array.sharding),
        allocate_pools(layouts, plan, mesh, dtype),
    )
    before = [np.asarray(array).copy() for array in jax.tree.leaves(pools)]
    host = HostBlocks(pools)
    places = random.permutation(2 * count)
    there = [Transfer(int(block), here, to_device=False) for here, block in enumerate(places[:count])]
    back = [Transfer(int(block), here, to_device=True) for here, block in enumerate(places[count:])]
    pools = host.copy(pools, [*there, *back])
    assert all(held.sharding.memory_kind == "pinned_host" for held in jax.tree.leaves(host._held))
    for old, array in zip(before, jax.tree.leaves(pools), strict=True):
        new = np.asarray(array)
        np.testing.assert_array_equal(new[places[:count]], old[places[:count]])
        np.testing.assert_array_equal(new[places[count:]], old[places[:count]])


@pytest.mark.parametrize(("restore", "used"), [(0.0, 5), (9.0, 0)])
def test_the_faster_way_is_taken(monkeypatch: pytest.MonkeyPatch, restore: float, used: int) -> None:
    """Whether to bring back or to compute again is measured at warm-up."""
    engine = tiny_engine(host_blocks=5, shapes=SHAPES[3:4])
    runner = lasting_runner(1)
    monkeypatch.setattr(runner, "warm_up", lambda shapes, progress: None)
    assert runner.seconds_to_restore() > 0
    assert runner.seconds_to_compute(SHAPES[3]) > 0
    monkeypatch.setattr(runner, "seconds_to_restore", lambda: restore)
    engine.warm_up()
    assert engine.scheduler.prefixes.host.num_blocks == used
