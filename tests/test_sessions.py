"""A conversation's next turn computes its new tokens only."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request, SamplingParams
from tests.test_prefix_cache import TEXT
from tests.test_scheduler import BLOCK_SIZE, FakeModel, make_scheduler, run
from tests.tiny_models import outputs_of, prompt, tiny_engine


def turn(name: str, tokens: Iterable[int], new: int = 5, session: str | None = "one") -> Sequence:
    return Sequence(Request(name, tuple(tokens), SamplingParams(max_new_tokens=new), session_id=session))


def test_all_but_the_last_token_is_there() -> None:
    """The last token of a turn was sampled and never computed."""
    scheduler = make_scheduler()
    model, first = FakeModel(scheduler), turn("a", TEXT[:9])
    run(scheduler, [first], model)
    second = turn("b", (*first.token_ids, 1, 2, 3))
    run(scheduler, [second], model)
    third = turn("c", (*second.token_ids, 4))
    run(scheduler, [third], model)
    assert [second.placement.cached_tokens, third.placement.cached_tokens] == [9 + 4, 17 + 4]
    assert scheduler.blocks.active == 0


def test_prompts_that_share_nothing_go_on_from_nothing() -> None:
    """Say, for the angles of their positions depend on their length."""
    scheduler = make_scheduler(max_prompt_len=15)
    model, first = FakeModel(scheduler), turn("a", TEXT[:9])
    run(scheduler, [first], model)
    second = turn("b", (*first.token_ids, 1, 2, 3))
    run(scheduler, [second], model)
    assert second.placement.cached_tokens == 0


def test_what_does_not_go_on_gets_whole_blocks_only() -> None:
    scheduler = make_scheduler()
    model, first = FakeModel(scheduler), turn("a", TEXT[:11])
    run(scheduler, [first], model)
    other = turn("b", (*first.token_ids[:13], 1, 2, 3))
    stranger = turn("c", (*first.token_ids, 1), session="two")
    nobody = turn("d", (*first.token_ids[:14], 7), session=None)
    run(scheduler, [other, stranger, nobody], model)
    assert [other.placement.cached_tokens, stranger.placement.cached_tokens, nobody.placement.cached_tokens] == [
        12,
        12,
        12,
    ]


def test_only_one_may_go_on() -> None:
    """Two at once would write behind the same tokens, into the same block."""
    scheduler = make_scheduler()
    model, first = FakeModel(scheduler), turn("a", TEXT[:9])
    run(scheduler, [first], model)
    both = [turn(name, (*first.token_ids, token)) for name, token in (("b", 1), ("c", 2))]
    run(scheduler, both, model)
    assert [item.placement.cached_tokens for item in both] == [13, 12]
    assert not both[0].placement.block_table
    assert not both[1].placement.block_table


def test_blocks_are_not_kept_from_others() -> None:
    scheduler = make_scheduler(blocks=24)
    model, first = FakeModel(scheduler), turn("a", TEXT[:40])
    run(scheduler, [first], model)
    assert scheduler.blocks.available == 24
    run(scheduler, [turn("x", range(500, 580), session=None)], model)
    again = turn("b", (*first.token_ids, 1))
    run(scheduler, [again], model)
    assert again.placement.cached_tokens < 40
    assert again.placement.cached_tokens % BLOCK_SIZE == 0


def test_an_aborted_turn_can_be_gone_on_from() -> None:
    """Say, for it contained a stop word."""
    scheduler = make_scheduler()
    model, first = FakeModel(scheduler), turn("a", TEXT[:9], new=50)
    scheduler.add(first)
    while first.generated < 6:
        model.step()
    scheduler.abort(first)
    second = turn("b", (*first.token_ids, 1, 2))
    run(scheduler, [second], model)
    assert second.placement.cached_tokens >= 9 + 4


def test_old_sessions_are_forgotten() -> None:
    scheduler = make_scheduler(blocks=24)
    model = FakeModel(scheduler)
    for index in range(60):
        run(scheduler, [turn(f"{index}", TEXT[:9], session=f"{index}")], model)
    assert len(scheduler._sessions._turns) == 24


def talk(engine: Engine, sessions: bool) -> tuple[list[list[int]], int]:
    """Replies of three turns of six conversations, one after the other, and tokens that were cached."""
    talks = {f"{n}": list(prompt(n)) for n in (3, 17, 20, 30, 33, 40)}
    replies, cached = [], 0
    for index in range(3):
        asked = [
            Request(name, tuple(tokens), SamplingParams(max_new_tokens=9), session_id=name if sessions else None)
            for name, tokens in talks.items()
        ]
        outputs = outputs_of(engine, asked)
        for name, tokens in talks.items():
            replies.append([token for output in outputs[name] for token in output.token_ids])
            tokens += [*replies[-1], *prompt(4, seed=index)]
            cached += outputs[name][-1].cached_tokens
    return replies, cached


@pytest.mark.parametrize("host_blocks", [0, 64])
@pytest.mark.parametrize("blocks", [128, 14])
def test_on_is_off(blocks: int, host_blocks: int) -> None:
    """With room for all conversations and for one or two. Engines here share their pools: one must end first."""
    expected, none = talk(tiny_engine(sharing=False), sessions=False)
    replies, cached = talk(tiny_engine(blocks=blocks, host_blocks=host_blocks), sessions=True)
    assert replies == expected
    assert cached > none == 0


def test_more_is_kept_than_whole_blocks() -> None:
    assert talk(tiny_engine(), sessions=True)[1] > talk(tiny_engine(), sessions=False)[1] > 0
