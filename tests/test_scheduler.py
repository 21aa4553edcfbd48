"""Scheduling, with a model that only remembers which token's keys and values lie in which block."""

from __future__ import annotations

from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.engine.device.buckets import ROW_LENGTH, BucketTable, step_shapes
from jaxdeploy.engine.device.packing import choose_bucket
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.host_tier import Transfer
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.scheduler import MAX_PARTIAL, Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.scheduling.waiting import MAX_TENANTS
from jaxdeploy.messages import FinishReason, Request, SamplingParams

BLOCK_SIZE = 4
SESSION_LEN = 96


def make_scheduler(
    blocks: int = 64,
    batch: int = 4,
    budget: int = 64,
    max_prompt_len: int = SESSION_LEN,
    host_blocks: int = 0,
    mixed: int | None = None,
    decode_steps: int = 1,
) -> Scheduler:
    manager = BlockManager(blocks)
    return Scheduler(
        manager,
        PrefixCache(manager, BLOCK_SIZE, max_prompt_len, host_blocks),
        SchedulerLimits(
            block_size=BLOCK_SIZE,
            max_batch_size=batch,
            max_prefill_tokens=budget,
            max_mixed_tokens=budget + batch if mixed is None else mixed,
            row_length=ROW_LENGTH,
            session_len=SESSION_LEN,
            decode_steps=decode_steps,
        ),
    )


def sequence(name: str, length: int, new: int = 4, **sampling: object) -> Sequence:
    params = SamplingParams(max_new_tokens=new, **sampling)  # type: ignore[arg-type]
    return Sequence(Request(name, tuple(token_at(name, position) for position in range(length)), params))


def token_at(name: str, position: int) -> int:
    """What the model says at a position, prompt or not."""
    return crc32(f"{name} {position}".encode()) % 1000


def sampled(chunk: Chunk) -> list[int]:
    """What the model says behind a chunk."""
    return [token_at(chunk.sequence.request_id, place) for place in range(chunk.first_new, chunk.end + 1)]


class FakeModel:
    """Runs what is scheduled. What a step attends to must lie where the block table says.

    Keys and values of a token depend on all tokens up to it, and on nothing else. ``ahead``: tokens of a step are known
    only when the next one has been scheduled.
    """

    def __init__(self, scheduler: Scheduler, *, ahead: bool = False) -> None:
        self.scheduler = scheduler
        self.computed = 0
        self._ahead = ahead
        self._flight: list[Chunk] = []
        self._contents: dict[tuple[int, int], int] = {}
        self._host: dict[tuple[int, int], int] = {}

    @property
    def flying(self) -> bool:
        """Whether tokens have been sampled that the scheduler does not know."""
        return bool(self._flight)

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        for copy in self.scheduler.prefixes.transfers():
            self._copy(copy)
        chunks = [*batch.decodes, *batch.chunks]
        for chunk in chunks:
            assert chunk.end == chunk.sequence.placement.computed
            self.computed += chunk.length
            for position in range(chunk.start, chunk.end):
                self._contents[self._place(chunk, position)] = self._keys_and_values(chunk, position)
        for chunk in chunks:
            for position in range(chunk.end):
                assert self._contents[self._place(chunk, position)] == self._keys_and_values(chunk, position)
        launched = [chunk for chunk in chunks if chunk.samples]
        landed, self._flight = (self._flight, launched) if self._ahead else (launched, [])
        running = [chunk for chunk in landed if chunk.sequence.finish_reason is None]
        self.scheduler.commit({chunk.sequence: sampled(chunk) for chunk in running})
        self.scheduler.blocks.check()
        return batch

    def _keys_and_values(self, chunk: Chunk, position: int) -> int:
        """Tokens in flight are those that will come."""
        item = chunk.sequence
        coming = [token_at(item.request_id, place) for place in range(len(item.token_ids), position + 1)]
        return hash((*item.token_ids[: position + 1], *coming))

    def _copy(self, copy: Transfer) -> None:
        """A whole block, as it is at this moment."""
        for offset in range(BLOCK_SIZE):
            block, here = (copy.block, offset), (copy.host_block, offset)
            if copy.to_device:
                self._contents[block] = self._host[here]
            else:
                self._host[here] = self._contents[block]

    def _place(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.sequence.placement.blocks[position // BLOCK_SIZE].index, position % BLOCK_SIZE


def run(scheduler: Scheduler, sequences: list[Sequence], model: FakeModel | None = None) -> list[ScheduledBatch]:
    """Everything to its end."""
    model, batches = model or FakeModel(scheduler), []
    for item in sequences:
        scheduler.add(item)
    while scheduler.has_work:
        flying = model.flying
        batches.append(model.step())
        assert batches[-1] or flying, "there is work, so something must run"
    assert scheduler.blocks.active == 0
    return batches


def names(batch: ScheduledBatch) -> tuple[str, str, str]:
    """Decodes, chunks, admitted: one letter a sequence."""
    chunks = ([chunk.sequence for chunk in chunks] for chunks in (batch.decodes, batch.chunks))
    groups = *chunks, batch.admitted
    return tuple("".join(item.request_id for item in group) for group in groups)  # type: ignore[return-value]


def test_prefill_then_decode() -> None:
    item = sequence("a", 5, new=3)
    batches = run(make_scheduler(), [item])
    assert [names(batch) for batch in batches] == [("", "a", "a"), ("a", "", ""), ("a", "", "")]
    assert item.token_ids == [token_at("a", position) for position in range(8)]
    assert item.finish_reason is FinishReason.LENGTH
    assert item.placement.slot is None


def test_nothing_to_do() -> None:
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert not scheduler.schedule()


def test_prompts_are_cut_into_the_budget() -> None:
    batches = run(make_scheduler(budget=32), [sequence("a", 70, new=1)])
    cut = [(chunk.start, chunk.length, chunk.samples) for batch in batches for chunk in batch.chunks]
    assert cut == [(0, 32, False), (32, 32, False), (64, 6, True)]


def test_a_chunk_costs_whole_rows() -> None:
    batches = run(make_scheduler(budget=64), [sequence(name, 3, new=1) for name in "abc"])
    assert [names(batch) for batch in batches] == [("", "ab", "ab"), ("", "c", "c")]


def test_decodes_go_on_beside_prompts() -> None:
    scheduler = make_scheduler(budget=32)
    model = FakeModel(scheduler)
    scheduler.add(sequence("a", 3, new=9))
    model.step()
    scheduler.add(sequence("b", 50, new=1))
    assert [names(model.step()) for _ in range(3)] == [("a", "b", "b"), ("a", "b", ""), ("a", "", "")]


def test_first_come_first_served() -> None:
    scheduler = make_scheduler(batch=2, blocks=64)
    batches = run(scheduler, [sequence("a", 3, new=5), sequence("b", 3, new=2), sequence("c", 3), sequence("d", 3)])
    assert "".join(names(batch)[2] for batch in batches) == "abcd"
    assert max(len(batch.decodes) + len(batch.chunks) for batch in batches) == 2


def test_a_large_prompt_is_not_overtaken() -> None:
    scheduler = make_scheduler(blocks=24)
    model = FakeModel(scheduler)
    for item in (sequence("a", 40, new=20), sequence("b", 80, new=1), sequence("c", 3, new=1)):
        scheduler.add(item)
    assert names(model.step())[2] == "a"
    assert names(model.step())[2] == ""  # c would fit
    assert scheduler.waiting == 2


def test_replies_do_not_wait_for_long_prompts() -> None:
    scheduler = make_scheduler(budget=96, mixed=35)
    model = FakeModel(scheduler)
    scheduler.add(sequence("a", 3, new=9))
    model.step()
    scheduler.add(sequence("b", 90, new=1))
    assert [chunk.length for _ in range(3) for chunk in model.step().chunks] == [32, 32, 26]


def test_the_least_is_a_row() -> None:
    scheduler = make_scheduler(budget=96, mixed=1)
    model = FakeModel(scheduler)
    scheduler.add(sequence("a", 3, new=9))
    model.step()
    scheduler.add(sequence("b", 40, new=1))
    assert [chunk.length for _ in range(2) for chunk in model.step().chunks] == [32, 8]


def test_short_prompts_pass_long_ones_which_go_on() -> None:
    scheduler = make_scheduler(budget=64, blocks=200, batch=8)
    model = FakeModel(scheduler)
    for name in "ab":
        scheduler.add(sequence(name, 200, new=1))
    steps = []
    for _ in range(5):
        steps.append([(chunk.sequence.request_id, chunk.length) for chunk in model.step().chunks])
        if len(steps) == 2:
            scheduler.add(sequence("s", 10, new=1))
    assert steps == [[("a", 64)], [("a", 32), ("b", 32)], [("a", 32), ("s", 10)], [("a", 64)], [("a", 8), ("b", 32)]]


def test_few_prompts_are_half_computed() -> None:
    scheduler = make_scheduler(budget=64, blocks=400, batch=16)
    model = FakeModel(scheduler)
    for index in range(12):
        scheduler.add(sequence(f"{index}", 90, new=1))
    while scheduler.has_work:
        model.step()
        assert sum(item.prefilling for item in scheduler._running) <= MAX_PARTIAL


def asked(name: str, *, priority: int = 0, tenant: str = "", length: int = 3, new: int = 2) -> Sequence:
    tokens = tuple(token_at(name, position) for position in range(length))
    return Sequence(Request(name, tokens, SamplingParams(max_new_tokens=new), priority, tenant))


def test_the_most_urgent_comes_first() -> None:
    scheduler = make_scheduler(batch=1)
    batches = run(
        scheduler, [asked(name, priority=priority) for name, priority in zip("abcd", (1, 0, -1, 0), strict=True)]
    )
    assert "".join(names(batch)[2] for batch in batches) == "cbda"


def test_the_least_urgent_makes_room() -> None:
    scheduler = make_scheduler(blocks=6)
    model = FakeModel(scheduler)
    items = [asked(name, priority=priority, length=7, new=12) for name, priority in zip("abc", (1, 0, 0), strict=True)]
    for item in items:
        scheduler.add(item)
    while not scheduler.preemptions:
        batch = model.step()
    assert (names(batch)[0], items[0].placement.slot) == ("bc", None)
    while scheduler.has_work:
        model.step()


def test_tenants_share() -> None:
    """However many one has asked before: after two of A's, B has been served less."""
    scheduler = make_scheduler(batch=1)
    items = [asked(f"{n}", tenant="A") for n in range(5)] + [asked(name, tenant="B") for name in "xyz"]
    batches = run(scheduler, items)
    assert "".join(names(batch)[2] for batch in batches) == "0x1y2z34"


def test_service_cannot_be_saved_up() -> None:
    """B, who comes late, is not served until it has had as much as A ever had, but takes turns from now on."""
    scheduler = make_scheduler(batch=1)
    model = FakeModel(scheduler)
    run(scheduler, [asked(f"{n}", tenant="A") for n in range(10)], model)
    first = [asked(f"{n}", tenant="A") for n in range(3)]
    batches = run(scheduler, [*first, *(asked(name, tenant="B") for name in "xyz")], model)
    assert "".join(names(batch)[2] for batch in batches) == "0x1y2z"


def test_accounts_are_few() -> None:
    scheduler = make_scheduler()
    for tenant in range(MAX_TENANTS + 50):
        item = asked("a", tenant=f"{tenant}")
        scheduler.add(item)
        scheduler.abort(item)
    assert len(scheduler._waiting._served) <= MAX_TENANTS + 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("sampling", "length", "reason"),
    [
        ({"stop_token_ids": frozenset({token_at("a", 5)})}, 6, FinishReason.STOP),
        ({"stop_token_ids": frozenset({token_at("a", 5)}), "min_new_tokens": 4}, 13, FinishReason.LENGTH),
        ({"stop_token_ids": frozenset({token_at("a", 2)})}, 13, FinishReason.LENGTH),  # the prompt's own do not count
    ],
)
def test_stop_tokens(sampling: dict[str, object], length: int, reason: FinishReason, ahead: bool) -> None:
    scheduler, item = make_scheduler(), sequence("a", 3, new=10, **sampling)
    run(scheduler, [item], FakeModel(scheduler, ahead=ahead))
    assert (len(item.token_ids), item.finish_reason) == (length, reason)


def test_decodes_in_a_row_while_nobody_waits() -> None:
    scheduler = make_scheduler(decode_steps=4)
    model, item = FakeModel(scheduler), sequence("a", 5, new=12)
    scheduler.add(item)
    batches = [model.step() for _ in range(3)]
    scheduler.add(sequence("b", 3, new=2))
    batches += [model.step() for _ in range(3)]
    assert [(batch.repeats, [chunk.length for chunk in batch.decodes]) for batch in batches] == [
        (1, []),  # the prompt
        (4, [4]),
        (4, [4]),
        (1, [1]),  # beside the other's prompt
        (1, [1, 1]),  # the other has but one left
        (1, [1]),  # and now it has
    ]
    assert item.token_ids == [token_at("a", position) for position in range(17)]


def test_a_stop_within_decodes_in_a_row() -> None:
    scheduler = make_scheduler(decode_steps=4)
    item = sequence("a", 5, new=12, stop_token_ids=frozenset({token_at("a", 7)}))
    run(scheduler, [item])
    assert (len(item.token_ids), item.finish_reason) == (8, FinishReason.STOP)


def test_nobody_is_preempted_for_decodes_in_a_row() -> None:
    scheduler = make_scheduler(blocks=24, decode_steps=8)
    items = [sequence(name, 20, new=20) for name in "ab"]
    batches = run(scheduler, items)
    assert scheduler.preemptions == 0
    assert {batch.repeats for batch in batches} == {1, 8}


def test_nothing_runs_beyond_what_may_be_generated() -> None:
    """An end by length is known while its last token is in flight; an end by a stop token costs a step."""
    for stops, batches in (frozenset(), 4), (frozenset({token_at("a", 5)}), 4):
        scheduler = make_scheduler()
        item = sequence("a", 3, new=3, stop_token_ids=stops)
        ran = run(scheduler, [item], FakeModel(scheduler, ahead=True))
        assert [len(batch.decodes) for batch in ran] == [0, 1, 1, 0]
        assert len(ran) == batches


def test_a_sequence_preempted_in_flight_waits_for_its_token() -> None:
    scheduler = make_scheduler(blocks=24)
    model, item = FakeModel(scheduler, ahead=True), sequence("a", 8, new=9)
    scheduler.add(item)
    model.step()
    assert item.in_flight == 1
    scheduler._preempt(item)
    assert not model.step(), "nothing runs before the token is known"
    (chunk,) = model.step().chunks
    assert (chunk.start, chunk.length) == (8, 1)
    while scheduler.has_work:
        model.step()
    assert item.token_ids == [token_at("a", position) for position in range(17)]


def test_a_sequence_may_end_while_it_waits() -> None:
    scheduler = make_scheduler(blocks=24)
    model, item = FakeModel(scheduler, ahead=True), sequence("a", 8, new=1)
    scheduler.add(item)
    model.step()
    scheduler._preempt(item)
    model.step()
    assert (item.finish_reason, scheduler.has_work) == (FinishReason.LENGTH, False)


def test_session_len_ends_a_sequence() -> None:
    item = sequence("a", SESSION_LEN - 2, new=50)
    run(make_scheduler(), [item])
    assert (item.generated, item.finish_reason) == (2, FinishReason.LENGTH)


def test_the_youngest_makes_room() -> None:
    scheduler = make_scheduler(blocks=6)
    model = FakeModel(scheduler)
    items = [sequence(name, 7, new=12) for name in "abc"]
    for item in items:
        scheduler.add(item)
    while not scheduler.preemptions:
        batch = model.step()
    assert names(batch)[0] == "ab"
    assert items[2].placement.slot is None
    while scheduler.has_work:
        model.step()
    assert [item.token_ids for item in items] == [[token_at(name, p) for p in range(19)] for name in "abc"]


def preempted(scheduler: Scheduler) -> Sequence:
    """A sequence of ten tokens, nine of them computed in three blocks, that has just lost its slot."""
    model, item = FakeModel(scheduler), sequence("b", 8, new=9)
    scheduler.add(item)
    model.step()
    model.step()
    scheduler._preempt(item)
    assert (item.placement.computed, len(item.token_ids), scheduler.blocks.cached) == (9, 10, 3)
    return item


def test_blocks_that_are_still_cached_are_revived() -> None:
    scheduler = make_scheduler(blocks=24)
    item = preempted(scheduler)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.sequence, chunk.start, chunk.length) == (item, 9, 1)


@pytest.mark.parametrize(("evicted", "start"), [(1, 8), (2, 4), (3, 0)])
def test_blocks_that_were_evicted_are_computed_again(evicted: int, start: int) -> None:
    scheduler = make_scheduler(blocks=24)
    preempted(scheduler)
    taken = scheduler.blocks.allocate(21 + evicted)
    scheduler.blocks.release(taken)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.start, chunk.length) == (start, 10 - start)


def test_what_waits_for_room_keeps_its_cached_blocks() -> None:
    scheduler = make_scheduler(blocks=24)
    preempted(scheduler)
    taken = scheduler.blocks.allocate(22)  # evicts one of three, and leaves no room for another
    assert not scheduler.schedule()
    assert scheduler.blocks.cached == 2
    scheduler.blocks.release(taken)
    assert scheduler.schedule().chunks[0].start == 8


def test_a_prompt_preempted_half_way_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(blocks=24, budget=32)
    model, item = FakeModel(scheduler), sequence("a", 70, new=2)
    scheduler.add(item)
    model.step()
    scheduler._preempt(item)
    (chunk,) = model.step().chunks
    assert (chunk.start, chunk.length) == (32, 32)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_abort_frees_everything(steps: int) -> None:
    scheduler = make_scheduler(budget=32)
    model, item = FakeModel(scheduler), sequence("a", 40, new=9)
    scheduler.add(item)
    for _ in range(steps):
        model.step()
    scheduler.abort(item)
    assert (scheduler.has_work, scheduler.blocks.active, item.placement.slot) == (False, 0, None)
    assert item.finish_reason is FinishReason.ABORT
    run(scheduler, [sequence(name, 3) for name in "bcdef"])  # its slot is free again


def test_abort_while_preempted() -> None:
    scheduler = make_scheduler(blocks=24)
    scheduler.abort(preempted(scheduler))
    assert (scheduler.has_work, scheduler.blocks.active, scheduler.blocks.available) == (False, 0, 24)


REQUEST = st.tuples(
    st.integers(1, SESSION_LEN - 1),  # prompt length
    st.integers(1, 30),  # new tokens
    st.integers(0, 12),  # step at which it comes
    st.none() | st.integers(0, 25),  # steps until it is aborted
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=10),
    blocks=st.integers(SESSION_LEN // BLOCK_SIZE, 60),
    batch=st.integers(1, 5),
    budget=st.sampled_from([32, 64, 96]),
    ahead=st.booleans(),
    host_blocks=st.sampled_from([0, 3, 40]),
    decode_steps=st.sampled_from([1, 3]),
)
def test_every_request_finishes_in_order_and_within_bounds(
    requests: list[tuple[int, int, int, int | None]],
    blocks: int,
    batch: int,
    budget: int,
    ahead: bool,
    host_blocks: int,
    decode_steps: int,
) -> None:
    scheduler = make_scheduler(blocks, batch, budget, host_blocks=host_blocks, decode_steps=decode_steps)
    shapes = step_shapes(
        batch, budget, scheduler.limits.max_mixed_tokens, scheduler.limits.blocks_for(SESSION_LEN), decode_steps
    )
    buckets = BucketTable(shapes)
    model = FakeModel(scheduler, ahead=ahead)
    items = [sequence(f"{index:03}", length, new) for index, (length, new, _, _) in enumerate(requests)]
    arrival = sorted(range(len(items)), key=lambda index: requests[index][2])
    position = {items[index]: rank for rank, index in enumerate(arrival)}
    admitted: list[int] = []
    for step in range(5000):
        for index in arrival:
            _, _, comes, patience = requests[index]
            if comes == step:
                scheduler.add(items[index])
            if patience is not None and step == comes + patience and items[index].finish_reason is None:
                scheduler.abort(items[index])
        if step > 12 and not scheduler.has_work:
            break
        done = model.step()
        if done:
            choose_bucket(buckets, done)  # asserts that one fits
        queue = [position[item] for item in (*scheduler._running, *scheduler._waiting)]
        assert queue == sorted(queue), "who came first runs first, preempted or not"
        admitted += [position[item] for item in done.admitted if position[item] not in admitted]
        running = [position[chunk.sequence] for chunk in (*done.decodes, *done.chunks)]
        assert len(running) == len(set(running)) <= batch
        assert sum(-(-chunk.length // ROW_LENGTH) * ROW_LENGTH for chunk in done.chunks) <= budget
    assert admitted == sorted(admitted)
    assert not scheduler.has_work
    assert (scheduler.blocks.active, scheduler.blocks.available) == (0, blocks)
    for item, (length, new, _, patience) in zip(items, requests, strict=True):
        assert item.finish_reason is not None
        if item.finish_reason is FinishReason.ABORT:
            assert patience is not None
        else:
            assert len(item.token_ids) == min(length + new, SESSION_LEN)
        assert item.token_ids == [token_at(item.request_id, p) for p in range(len(item.token_ids))]
