"""Sequences that follow a grammar, in a batch with free ones."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.front.intake import GRAMMAR_THREADS
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import FinishReason, Request
from tests.tiny_models import SHAPES_IN_A_ROW, guessing, outputs_of, prompt, reasons, request, run, tiny_engine

END = 95


class Counting:
    """Lets 2, 3, 4 … come in this order up to ``last``, then the end."""

    def __init__(self, last: int, lost_after: int | None = None) -> None:
        self._next, self._last, self._lost_after = 2, last, lost_after

    def allow(self, words: np.ndarray[Any, np.dtype[np.uint32]], drafts: tuple[int, ...] = ()) -> None:
        following = self._next
        for row, draft in zip(words, (following - 1, *drafts), strict=True):
            if draft != following - 1:
                return
            token_id = following if following <= self._last else END
            row[:] = 0
            row[token_id // 32] = 1 << token_id % 32
            following += 1

    def take(self, token_id: int) -> bool:
        assert token_id in (self._next, END), "what was allowed was chosen"
        self._next += 1
        return token_id != self._lost_after


class CountingGrammars:
    """A grammar is the last number, or a fault. ``held``: none is ready before ``ready`` is set."""

    def __init__(self, *, held: bool = False) -> None:
        self.ready = threading.Event()
        if not held:
            self.ready.set()

    def matcher(self, grammar: str) -> Counting:
        assert self.ready.wait(20)
        if grammar == "!":
            raise TypeError("a fault of the library's own")
        if grammar == "loses its way":
            return Counting(9, lost_after=4)
        if not grammar.isdecimal():
            raise RequestError("the grammar cannot be followed")
        return Counting(int(grammar))


def counting(name: str, last: object, length: int = 20, **sampling: Any) -> Request:
    return request(name, prompt(length), grammar=str(last), stop_token_ids=frozenset({END}), **sampling)


def free(name: str, length: int) -> Request:
    return request(name, prompt(length))


def counted(last: int) -> list[int]:
    return [*range(2, last + 1), END]


def test_replies_follow_their_grammar_and_others_are_free() -> None:
    alone = run(tiny_engine(), [free("a", 20), free("b", 33)])
    engine = tiny_engine(grammars=CountingGrammars())
    asked = [free("a", 20), counting("x", 9), free("b", 33), counting("y", 5, 40, temperature=1.0, seed=3)]
    assert run(engine, asked) == {**alone, "x": counted(9), "y": counted(5)}


def test_a_reply_that_loses_its_grammar_ends_with_an_error() -> None:
    engine = tiny_engine(grammars=CountingGrammars())
    outputs = outputs_of(engine, [counting("lost", "loses its way"), counting("kept", 6)])
    assert [token for output in outputs["lost"] for token in output.token_ids] == [2, 3, 4]
    assert reasons(outputs) == {"lost": FinishReason.ERROR, "kept": FinishReason.STOP}


@pytest.mark.parametrize("how", [{"blocks": 8}, {"decode_steps": 3, "shapes": SHAPES_IN_A_ROW}, {"sharing": False}])
def test_whatever_else_happens(how: dict[str, Any]) -> None:
    engine = tiny_engine(grammars=CountingGrammars(), **how)
    asked = [counting(str(last), last, 20 + last) for last in (4, 9, 14)]
    assert run(engine, [*asked, free("a", 20)])["14"] == counted(14)
    assert engine.scheduler.blocks.active == 0


def test_guesses_that_follow_and_others() -> None:
    """The prompt counts as the reply will, at first; then it goes on in another way."""
    engine = tiny_engine(grammars=CountingGrammars(), speculation=guessing("ngram"))
    asked = counting("x", 30, max_new_tokens=60)
    start = (*prompt(9), *range(2, 12), 50, 51, *range(12, 20), 1)
    asked = replace(asked, prompt_token_ids=start)
    assert run(engine, [asked, free("a", 20)])["x"] == counted(30)
    assert 0 < engine.stats.speculation.accepted < engine.stats.speculation.drafts


def test_others_go_on_while_a_grammar_is_made() -> None:
    grammars = CountingGrammars(held=True)
    engine = tiny_engine(grammars=grammars)
    engine.add(counting("slow", 4))
    assert engine.stats.waiting == 1
    engine.add(free("a", 20))
    ended: list[str] = []
    while "a" not in ended:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert engine.has_work
    grammars.ready.set()
    ended += [output.request_id for output in until_idle(engine) if output.finish_reason]
    assert ended == ["a", "slow"]


def test_one_that_is_given_up_while_its_grammar_is_made() -> None:
    grammars = CountingGrammars(held=True)
    engine = tiny_engine(grammars=grammars)
    engine.add(counting("x", 4))
    engine.abort("x")
    assert not engine.has_work
    engine.add(Request("y", prompt(20), counting("y", 4).sampling, timeout=0.01))
    ended = until_idle(engine)
    assert [(output.request_id, output.finish_reason) for output in ended] == [("y", FinishReason.ABORT)]
    grammars.ready.set()
    engine.close()


def test_one_that_is_given_up_while_it_waits_for_others_is_never_made() -> None:
    grammars = CountingGrammars(held=True)
    engine = tiny_engine(grammars=grammars)
    for number in range(2 * GRAMMAR_THREADS):
        engine.add(counting(str(number), 4))
    waiting = list(engine._intake.compiling.values())[GRAMMAR_THREADS:]
    for number in range(2 * GRAMMAR_THREADS):
        engine.abort(str(number))
    assert all(future.cancelled() for future in waiting)
    grammars.ready.set()
    engine.close()


def test_a_grammar_that_is_none_ends_its_sequence_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine(grammars=CountingGrammars())
    engine.add(counting("bad", "?"))
    engine.add(counting("worse", "!"))
    engine.add(counting("good", 5))
    reasons = {output.request_id: output.finish_reason for output in until_idle(engine) if output.finish_reason}
    assert reasons == {
        "bad": FinishReason.ERROR,
        "worse": FinishReason.ERROR,
        "good": FinishReason.STOP,
    }
    assert "request bad failed: the grammar cannot be followed" in caplog.text
    engine.add(counting("bad", 5))  # the name is free again
    until_idle(engine)


def test_an_engine_without_a_tokenizer_refuses_grammars() -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match="the engine has no tokenizer"):
        engine.add(counting("x", 5))
    assert not engine.has_work
    engine.add(free("x", 5))
    until_idle(engine)


def until_idle(engine: Engine) -> list[Any]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs
