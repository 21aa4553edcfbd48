"""SpeculationCounts change no token, whoever makes them; they are counted, and left alone where they do not pay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from jaxdeploy.engine.device.buckets import ROW_LENGTH, StepShape
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.speculation.gate import MIN_SAMPLES, RETRY_FACTOR, Gate
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.messages import FinishReason, Request, SamplingParams, SpeculationCounts, StepOutput
from tests.tiny_models import (
    GUESSES,
    SHAPES,
    SLOTS,
    TABLE_LENGTH,
    VOCAB,
    dense_logits,
    guessing,
    outputs_of,
    prompt,
    reasons,
    request,
    run,
    run_one,
    tiny_engine,
)

METHODS = ("ngram", "draft", "itself")
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20, "seed": 3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.01, "seed": 5, "logprobs": 3},
    {"logprobs": 0, "stop_token_ids": frozenset(range(0, VOCAB, 9)), "min_new_tokens": 7},
    {"bad_token_sequences": ((5,), (7, 9), (11, 12, 13)), "temperature": 1.0, "seed": 8},
    {"logit_bias": ((3, 4.0), (8, -100.0))},
    {"num_speculative_tokens": 0, "temperature": 0.5},
    {"num_speculative_tokens": 2},
]
"""How requests choose their tokens."""


def mixed(count: int = SLOTS) -> list[Request]:
    """Requests of every kind, whose prompts and replies have all kinds of lengths; some prompts repeat themselves."""
    kinds = [{"max_new_tokens": 20 + n, **KINDS[n % len(KINDS)]} for n in range(count)]
    return [request(f"{n}", prompt(3 + 7 * n % 40, seed=n) * (1 + n % 2), **kind) for n, kind in enumerate(kinds)]


def texts(outputs: dict[str, list[StepOutput]]) -> dict[str, Any]:
    """Tokens, log-probabilities rounded, and ends."""
    return {
        name: (
            [token for step in steps for token in step.token_ids],
            [(item.token_id, [top[0] for top in item.top]) for step in steps for item in step.logprobs],
            steps[-1].finish_reason,
        )
        for name, steps in outputs.items()
    }


def logprobs(outputs: dict[str, list[StepOutput]]) -> list[float]:
    """Of all tokens that have them."""
    return [item.logprob for steps in outputs.values() for step in steps for item in step.logprobs]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[StepOutput]]:
    return outputs_of(tiny_engine(), mixed())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_all_kinds_has_the_tokens_that_it_has_without_guesses(
    method: str, plain: dict[str, list[StepOutput]]
) -> None:
    engine = tiny_engine(speculation=guessing(method))
    guessed = outputs_of(engine, mixed())
    assert texts(guessed) == texts(plain)
    assert engine.stats.speculation.accepted > 0
    np.testing.assert_allclose(logprobs(guessed), logprobs(plain), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_alone(method: str, plain: dict[str, list[StepOutput]]) -> None:
    engine = tiny_engine(speculation=guessing(method))
    for item in mixed(len(KINDS)):
        assert run(engine, [item])[item.request_id] == texts(plain)[item.request_id][0]


def test_the_same_model_is_always_right() -> None:
    """A draw too: it has the same noise."""
    engine = tiny_engine(speculation=guessing("itself"))
    for seed in range(4):
        run_one(engine, prompt(9, seed=seed), temperature=1.0, seed=seed, max_new_tokens=21)
    guesses = engine.stats.speculation
    assert guesses == SpeculationCounts(rounds=16, drafts=16 * GUESSES, accepted=16 * GUESSES)
    assert guesses.acceptance_rate == 1
    assert guesses.mean_length == GUESSES + 1


@pytest.mark.parametrize("method", METHODS)
def test_what_makes_room_is_guessed_anew(method: str, plain: dict[str, list[StepOutput]]) -> None:
    engine = tiny_engine(speculation=guessing(method), blocks=24)
    assert texts(outputs_of(engine, mixed())) == texts(plain)
    assert engine.scheduler.preemptions > 0


def test_nothing_is_guessed_behind_the_end() -> None:
    """Nor is a block taken for it: the last reply has all of them."""
    engine = tiny_engine(speculation=guessing("itself"), blocks=2)
    outputs = outputs_of(engine, [request("one", prompt(20), max_new_tokens=12)])
    assert reasons(outputs) == {"one": FinishReason.LENGTH}
    assert run_one(tiny_engine(), prompt(20), max_new_tokens=12) == texts(outputs)["one"][0]


def test_requests_say_how_many() -> None:
    engine = tiny_engine(speculation=guessing("itself"))
    for most, rounds, drafts in ((0, 0, 0), (1, 8, 8), (3, 4, 12), (GUESSES, 3, 12), (99, 3, 12)):
        outputs = outputs_of(engine, [request("one", prompt(9), max_new_tokens=17, num_speculative_tokens=most)])
        assert outputs["one"][-1].speculation == SpeculationCounts(rounds, drafts, drafts)


def test_a_request_that_leaves_while_guesses_are_verified() -> None:
    engine = tiny_engine(speculation=guessing("itself"))
    for name in "ab":
        engine.add(request(name, prompt(9), max_new_tokens=40))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    while engine.has_work:
        engine.step()
    engine.scheduler.blocks.check()
    assert engine.scheduler.blocks.active == 0
    assert engine.stats.speculation.accepted > 0


@pytest.mark.slow
def test_drawn_tokens_have_the_distribution_of_the_model() -> None:
    """20,000 draws of three tokens by top_k 4 against all 64 that there are (χ², 0.1 % of right ones would fail)."""
    start = telling_prompt()
    counts = {method: draws(start, method) for method in ("ngram", "draft")}
    assert counts["ngram"] == counts["draft"]  # by seed and position alone
    expected = enumerated(start)
    assert set(counts["draft"]) <= set(expected)
    observed = np.array([counts["draft"][cell] for cell in expected])
    frequent = (wanted := np.array([*expected.values()]) * observed.sum()) >= 5
    both = [np.append(a[frequent], a[~frequent].sum()) for a in (observed, wanted)]
    chi_squared = float((((both[0] - both[1]) ** 2) / np.maximum(both[1], 1e-9)).sum())
    freedom = len(both[0]) - 1
    assert chi_squared < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty


def telling_prompt() -> list[int]:
    """A prompt that goes on in a likely way, then begins again: it can be guessed from itself."""
    start = prompt(6, seed=4)
    likely: tuple[int, ...] = ()
    for _ in range(8):
        cells = enumerated([*start, *likely, *start])
        likely = max(cells, key=lambda cell: cells[cell])
    return [*start, *likely, *start]


def draws(start: list[int], method: str, count: int = 20_000) -> Counter[tuple[int, ...]]:
    """How often each continuation came."""
    together = StepShape(0, SLOTS * ROW_LENGTH, TABLE_LENGTH, SLOTS)  # all begin, and then guess, in the same step
    engine = tiny_engine(speculation=guessing(method), shapes=[*SHAPES, together], max_prefill=together.prefill_tokens)
    how = {"temperature": 1.0, "top_k": 4, "max_new_tokens": 4}
    found = Counter[tuple[int, ...]]()
    for first in range(0, count, SLOTS):
        seeds = range(first, first + SLOTS)
        replies = run(engine, [request(f"{seed}", start, seed=seed, **how) for seed in seeds])
        found.update(tuple(reply[:3]) for reply in replies.values())
    assert engine.stats.speculation.accepted > count // 20
    return found


def enumerated(start: list[int]) -> dict[tuple[int, ...], float]:
    """The probability of each continuation."""
    cells: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        cells = {
            (*before, token): share * likely
            for before, share in cells.items()
            for token, likely in top_four([*start, *before]).items()
        }
    return cells


def top_four(token_ids: list[int]) -> dict[int, float]:
    """The four likeliest tokens and their shares."""
    logits = dense_logits(token_ids)[-1].astype(np.float64)
    best = np.argsort(logits)[-4:]
    shares = np.exp(logits[best] - logits[best].max())
    return dict(zip(best.tolist(), (shares / shares.sum()).tolist(), strict=True))


def looked_up(*token_ids: int, most: int = 4) -> tuple[int, ...]:
    """What is guessed behind a sequence."""
    sequence = Sequence(Request("a", token_ids, SamplingParams()))
    return NgramProposer().propose({sequence: most})[sequence]


@pytest.mark.parametrize(
    ("tokens", "guessed"),
    [
        ((1, 2, 3, 4, 5, 6, 1, 2), (3, 4, 5, 6)),
        ((1, 2, 3, 1, 2), (3, 1, 2, 3)),  # goes on with what it guessed
        ((1, 2, 3, 9, 1, 2, 4, 9, 1, 2), (4, 9, 1, 2)),  # the last place of equal ones
        ((8, 1, 2, 3, 9, 7, 1, 2, 4, 9, 8, 1, 2), (3, 9, 7, 1)),  # more of it agrees
        ((5, 5, 5), (5, 5, 5, 5)),
        ((1, 2, 3, 4, 2), ()),
        ((1,), ()),
        ((1, 2), ()),
    ],
)
def test_guesses_from_the_sequence_itself(tokens: tuple[int, ...], guessed: tuple[int, ...]) -> None:
    assert looked_up(*tokens) == guessed


def test_a_growing_sequence_is_read_once() -> None:
    sequence, proposer = Sequence(Request("a", prompt(40), SamplingParams())), NgramProposer()
    for token in prompt(60, seed=1):
        found = proposer.propose({sequence: 4})[sequence]
        assert found == looked_up(*sequence.token_ids)
        sequence.token_ids.append(token % 7)


class Clocked:
    """A gate, and batches that take so many seconds a step."""

    def __init__(self, plain: float, drafted: float, tokens: int) -> None:
        self.gate = Gate()
        self.plain, self.drafted, self.tokens = plain, drafted, tokens
        self.tried = self.seconds = self.made = 0.0

    def run(self, steps: int, batch: int = 1) -> float:
        """Tokens a second over so many steps."""
        before = self.made, self.seconds
        for _ in range(steps):
            drafted = self.gate.is_open(batch)
            seconds, tokens = (self.drafted, self.tokens) if drafted else (self.plain, 1)
            self.gate.record(batch, drafted=drafted, seconds=seconds, tokens=tokens * batch)
            self.tried += drafted
            self.seconds += seconds
            self.made += tokens * batch
        return (self.made - before[0]) / (self.seconds - before[1])


def test_guesses_that_pay_are_kept() -> None:
    clocked = Clocked(plain=1.0, drafted=1.5, tokens=3)
    assert clocked.run(100) > 1.8
    assert clocked.tried == 100 - MIN_SAMPLES


@pytest.mark.parametrize(("drafted", "tokens"), [(4.0, 1), (1.1, 1), (2.2, 2)])
def test_guesses_that_lose_cost_little(drafted: float, tokens: int) -> None:
    clocked = Clocked(plain=1.0, drafted=drafted, tokens=tokens)
    clocked.run(100)
    assert clocked.run(4000) > 1 - 1.2 / RETRY_FACTOR
    assert clocked.tried > MIN_SAMPLES  # they get another chance


def test_guesses_get_better() -> None:
    clocked = Clocked(plain=1.0, drafted=3.0, tokens=1)
    clocked.run(100)
    clocked.tokens = 6
    assert clocked.run(3000) > 1.5


def test_batches_of_each_size_are_judged_by_themselves() -> None:
    gate = Gate()
    for batch, tokens in ((1, 3), (8, 8)):
        for _ in range(2 * MIN_SAMPLES):
            drafted = gate.is_open(batch)
            gate.record(batch, drafted=drafted, seconds=1.5 if drafted else 1.0, tokens=tokens if drafted else batch)
    assert [gate.is_open(batch) for batch in (1, 5, 8)] == [True, False, False]


def test_an_engine_measures_both_ways() -> None:
    speculation = guessing("ngram", gate=Gate())
    engine = tiny_engine(speculation=speculation)
    run(engine, [request(f"{n}", prompt(6, seed=n) * 4, max_new_tokens=60) for n in range(4)])
    size = speculation.gate._sizes[4]
    assert size.plain.seen >= MIN_SAMPLES
    assert size.drafted.seen or size.wait
