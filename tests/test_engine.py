"""The engine against the decoder without a cache, and against itself under every way of scheduling."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.errors import ContextLengthError, RequestError
from jaxdeploy.messages import FinishReason, Request
from tests.tiny_models import (
    IN_A_ROW,
    SESSION_LEN,
    SHAPES_IN_A_ROW,
    VOCAB,
    dense_greedy,
    dense_logits,
    outputs_of,
    prompt,
    reasons,
    request,
    run,
    run_one,
    tiny_engine,
)

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 90, 111)
"""Around the edges of blocks, rows, budget and window."""

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 11}
LOADED: dict[str, Any] = {**SAMPLED, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}


def mixed(lengths: tuple[int, ...] = LENGTHS, **sampling: Any) -> list[Request]:
    """Greedy and sampled requests in turn."""
    return [
        request(f"{length}", prompt(length), **({**LOADED, "seed": length} if index % 2 else {}), **sampling)
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("length", [1, 16, 33, 100])
def test_paged_is_dense(length: int) -> None:
    assert run_one(tiny_engine(), prompt(length)) == dense_greedy(prompt(length), 16)


def test_whole_prefill_is_chunked_prefill() -> None:
    requests = [request("a", prompt(100)), request("b", prompt(101), **LOADED)]
    whole = [dense_greedy(prompt(100), 16)]
    results = [run(tiny_engine(max_prefill=budget), requests) for budget in (32, 64)]
    assert results[0] == results[1]
    assert [results[0]["a"]] == whole


def test_sixteen_together_are_singles() -> None:
    engine = tiny_engine()
    together = run(engine, mixed())
    assert engine.scheduler.preemptions == 0
    for item in mixed():
        assert run(tiny_engine(), [item])[item.request_id] == together[item.request_id]


def test_requests_that_come_later_change_nothing() -> None:
    engine, items = tiny_engine(batch=4), mixed()
    collected: dict[str, list[int]] = {item.request_id: [] for item in items}
    while items or engine.has_work:
        if items:
            engine.add(items.pop())
        for output in engine.step():
            collected[output.request_id] += output.token_ids
    assert collected == run(tiny_engine(), mixed())


@pytest.mark.parametrize("blocks", [8, 11, 20])
def test_preempted_is_uninterrupted(blocks: int) -> None:
    requests = mixed((40, 41, 42, 43, 30, 60), max_new_tokens=40)
    engine = tiny_engine(blocks=blocks)
    starts = count_chunk_starts(engine)
    assert run(engine, requests) == run(tiny_engine(), requests)
    assert engine.scheduler.preemptions > 0
    assert starts["revived"] + starts["recomputed"] > 0


def count_chunk_starts(engine: Any) -> dict[str, int]:
    """How often a preempted sequence went on from cached blocks, and how often it began anew."""
    counts = {"revived": 0, "recomputed": 0}
    schedule = engine.scheduler.schedule

    def counted(drafter: Any = None) -> Any:
        batch = schedule(drafter)
        for chunk in batch.chunks:
            if chunk.sequence in batch.admitted and chunk.sequence.generated:
                counts["revived" if chunk.start else "recomputed"] += 1
        return batch

    engine.scheduler.schedule = counted
    return counts


def test_preempted_sequences_revive_blocks_and_recompute_lost_ones() -> None:
    engine = tiny_engine(blocks=9)
    starts = count_chunk_starts(engine)
    requests = mixed((30, 31, 33, 47, 28), max_new_tokens=60)
    assert run(engine, requests) == run(tiny_engine(), requests)
    assert starts["revived"] > 0
    assert starts["recomputed"] > 0


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    """Alone in the smallest bucket; in another slot among seven that were there before; with other blocks."""
    alone = run_one(tiny_engine(), prompt(20), **LOADED)
    others = [request(f"{seed}", prompt(20 + seed), temperature=1.5, seed=seed) for seed in range(7)]
    for items in ([*others, request("one", prompt(20), **LOADED)], [request("one", prompt(20), **LOADED), *others]):
        assert run(tiny_engine(), items)["one"] == alone
    assert run_one(tiny_engine(), prompt(20), **{**LOADED, "seed": 12}) != alone


def test_greedy_beside_sampled_is_greedy() -> None:
    """Both samplers take the same likeliest token."""
    items = [request("greedy", prompt(20)), request("sampled", prompt(21), **SAMPLED)]
    assert run(tiny_engine(), items)["greedy"] == dense_greedy(prompt(20), 16)


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@pytest.mark.parametrize("sampling", [{}, LOADED], ids=["greedy", "sampled"])
def test_logprobs(sampling: dict[str, Any]) -> None:
    item = request("a", prompt(20), logprobs=5, **sampling)
    outputs = outputs_of(tiny_engine(), [item, request("other", prompt(9), **SAMPLED)])
    assert not any(output.logprobs for output in outputs["other"])
    tokens = [output.token_ids[0] for output in outputs["a"]]
    truth = log_softmax(dense_logits([*item.prompt_token_ids, *tokens]))[19:-1]
    for token, output, row in zip(tokens, outputs["a"], truth, strict=True):
        (reported,) = output.logprobs
        assert reported.token_id == token
        assert reported.logprob == pytest.approx(row[token], abs=2e-5)
        assert [token_id for token_id, _ in reported.top] == np.argsort(-row)[:5].tolist()
        assert [value for _, value in reported.top] == pytest.approx(-np.sort(-row)[:5], abs=2e-5)


def test_logprobs_zero_reports_the_chosen_token_alone() -> None:
    outputs = outputs_of(tiny_engine(), [request("a", prompt(5), logprobs=0)])["a"]
    assert all(len(output.logprobs) == 1 and output.logprobs[0].top == () for output in outputs)


def test_stop_tokens_and_minimum() -> None:
    plain = dense_greedy(prompt(20), 16)
    stop = plain[5]
    first = plain.index(stop)
    outputs = outputs_of(tiny_engine(), [request("a", prompt(20), stop_token_ids=frozenset({stop}))])
    assert [output.token_ids[0] for output in outputs["a"]] == plain[: first + 1]
    assert reasons(outputs) == {"a": FinishReason.STOP}
    longer = run_one(tiny_engine(), prompt(20), stop_token_ids=frozenset({stop}), min_new_tokens=10)
    assert stop not in longer[:10]
    assert len(longer) > 10


def test_without_stop_ids_nothing_but_length_ends() -> None:
    """This is all that ``GenerationConfig.ignore_eos`` does: it leaves the model's ends out of ``stop_token_ids``."""
    stop = dense_greedy(prompt(20), 1)[0]
    outputs = outputs_of(tiny_engine(), [request("a", prompt(20))])
    assert outputs["a"][0].token_ids == (stop,)
    assert (len(outputs["a"]), reasons(outputs)["a"]) == (16, FinishReason.LENGTH)


def test_bad_words_of_several_tokens() -> None:
    plain = dense_greedy(prompt(20), 16)
    single = next(token for token in plain[6:] if token not in plain[:6])
    bad = (tuple(plain[3:6]), (single,))
    tokens = run_one(tiny_engine(), prompt(20), bad_token_sequences=bad)
    assert tokens[:5] == plain[:5]
    assert tokens[5] == dense_logits([*prompt(20), *plain[:5]])[-1].argsort()[-2] != plain[5]
    assert single not in tokens
    assert all(tuple(tokens[i : i + 3]) != bad[0] for i in range(len(tokens)))


def in_a_row(**options: Any) -> Engine:
    """An engine that decodes several tokens in a launch."""
    return tiny_engine(shapes=SHAPES_IN_A_ROW, decode_steps=IN_A_ROW, **options)


def test_decodes_in_a_row_are_those_one_by_one() -> None:
    """With samplers, preemption, and requests of different lengths; as many in a row as none of them minds."""
    for blocks in (128, 20):
        engine, items = in_a_row(blocks=blocks), mixed((40, 41, 42, 43, 30, 60), max_new_tokens=40)
        assert run(engine, items) == run(tiny_engine(), items)
        assert (engine.scheduler.preemptions > 0) == (blocks == 20)
    outputs = outputs_of(in_a_row(), [request("a", prompt(20), max_new_tokens=14)])["a"]
    assert [len(output.token_ids) for output in outputs] == [1, 3, 3, 3, 3, 1]


def test_decodes_in_a_row_stop_where_they_should() -> None:
    plain = dense_greedy(prompt(20), 16)
    for place in range(3, 9):
        stop = plain[place]
        item = request("a", prompt(20), stop_token_ids=frozenset({stop}), logprobs=2)
        got, expected = (outputs_of(engine, [item])["a"] for engine in (in_a_row(), tiny_engine()))
        assert [token for output in got for token in output.token_ids] == plain[: plain.index(stop) + 1]
        assert reasons({"a": got}) == {"a": FinishReason.STOP}
        for ours, theirs in zip(
            *([each for one in outputs for each in one.logprobs] for outputs in (got, expected)), strict=True
        ):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-5)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_what_the_host_must_see_is_decoded_one_by_one() -> None:
    plain = dense_greedy(prompt(20), 16)
    for sampling in (
        {"bad_token_sequences": (tuple(plain[3:6]),)},
        {"stop_token_ids": frozenset(plain), "min_new_tokens": 9},
    ):
        item = request("a", prompt(20), **sampling)
        assert run(in_a_row(), [item]) == run(tiny_engine(), [item])


def test_session_len_ends_a_reply() -> None:
    outputs = outputs_of(tiny_engine(), [request("a", prompt(SESSION_LEN - 3), max_new_tokens=50)])
    assert (len(outputs["a"]), reasons(outputs)["a"]) == (3, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (request("new", []), "prompt='' must have at least one token; give some text"),
        (request("used", [1]), "request_id=used is in use; choose another"),
        (request("new", [1, VOCAB]), "prompt_token_ids must be between 0 and 95; check the tokenizer"),
        (request("new", [-1]), "prompt_token_ids must be between 0 and 95; check the tokenizer"),
        (replace(request("new", [1]), timeout=0.0), "timeout=0.0 must be above 0; give a number of seconds, or none"),
        (request("new", [1], logprobs=21), "logprobs=21 must be between 0 and 20; ask for fewer"),
    ],
)
def test_bad_requests_touch_nothing(item: Request, message: str) -> None:
    engine = tiny_engine()
    engine.add(request("used", prompt(5)))
    with pytest.raises(RequestError) as caught:
        engine.add(item)
    assert str(caught.value) == message
    assert engine.scheduler.waiting == 1


@pytest.mark.parametrize("length", [SESSION_LEN, SESSION_LEN + 1])
def test_a_prompt_longer_than_the_session(length: int) -> None:
    with pytest.raises(ContextLengthError, match=f"prompt of {length} tokens must be shorter than session_len=128"):
        tiny_engine().add(request("a", prompt(length)))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_what_a_request_holds(steps: int) -> None:
    engine = tiny_engine()
    engine.add(request("gone", prompt(100)))
    engine.add(request("stays", prompt(20)))
    tokens: list[int] = []

    def step() -> set[str]:
        outputs = engine.step()
        tokens.extend(token for output in outputs if output.request_id == "stays" for token in output.token_ids)
        return {output.request_id for output in outputs}

    for _ in range(steps):
        step()
    engine.abort("gone")
    engine.abort("gone")
    engine.abort("never was")
    assert engine.scheduler.blocks.active == (0 if steps <= 2 else engine.scheduler.limits.blocks_for(20 + len(tokens)))
    while engine.has_work:
        assert step() <= {"stays"}
    assert tokens == dense_greedy(prompt(20), 16)
    engine.add(request("gone", prompt(5)))  # its name is free again


@pytest.mark.parametrize("steps", [0, 3])
def test_a_request_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """It ends as aborted, waiting or running, with what it has; a later one of its name has its own time."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine = tiny_engine()
    engine.add(replace(request("late", prompt(20)), timeout=5))
    engine.add(request("other", prompt(20)))
    outputs = [output for _ in range(steps) for output in engine.step()]
    now = 104.9
    outputs += engine.step()
    assert not any(output.finish_reason for output in outputs)
    now = 105.0
    outputs = engine.step()
    assert [output.token_ids for output in outputs if output.request_id == "late"] == [()]
    assert [output.finish_reason for output in outputs if output.request_id == "late"] == [FinishReason.ABORT]
    engine.add(replace(request("late", prompt(20)), timeout=5))
    while engine.has_work:
        assert FinishReason.ABORT not in [output.finish_reason for output in engine.step()]
    assert engine.scheduler.blocks.active == 0


def test_names_are_free_again_after_the_end() -> None:
    engine = tiny_engine()
    assert run(engine, [request("a", prompt(5))]) == run(engine, [request("a", prompt(5))])


def test_a_step_without_work() -> None:
    assert tiny_engine().step() == []
