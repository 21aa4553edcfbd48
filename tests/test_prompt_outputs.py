"""Hidden states and log-probabilities of prompts equal those of the decoder without a cache."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxdeploy.engine.device.buckets import prompt_output_shapes, step_shapes
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import PromptResult, Request, StepOutput
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.model import Positions
from tests.tiny_models import (
    CONFIG,
    SESSION_LEN,
    VOCAB,
    dense_decoder,
    dense_logits,
    outputs_of,
    prompt,
    request,
    run,
    tiny_engine,
)

Array = np.ndarray[Any, Any]


@lru_cache
def dense_hidden_function() -> Any:
    decoder = dense_decoder()

    def hidden(tokens: jax.Array) -> jax.Array:
        positions, pools = Positions.of_prompts(1, SESSION_LEN), [None] * CONFIG.num_layers
        return decoder.hidden(decoder.embed(tokens), positions, DenseContext(1), pools).states

    return jax.jit(hidden)


def dense_hidden(token_ids: tuple[int, ...]) -> Array:
    padded = np.zeros(SESSION_LEN, np.int32)
    padded[: len(token_ids)] = token_ids
    return np.asarray(dense_hidden_function()(padded))[: len(token_ids)]


def embedded(name: str, length: int, **sampling: Any) -> Request:
    return dataclasses.replace(request(name, prompt(length), **{"max_new_tokens": 1, **sampling}), embed=True)


def result_of(outputs: list[StepOutput]) -> PromptResult:
    assert [output.prompt is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)
    assert outputs[0].prompt is not None
    return outputs[0].prompt


def check(result: PromptResult, ids: tuple[int, ...], alternatives: int | None = None) -> None:
    hidden = dense_hidden(ids)
    np.testing.assert_allclose(result.mean, hidden.mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(result.last, hidden[-1], atol=2e-5)
    if alternatives is None:
        assert result.logprobs == ()
        return
    scores = np.asarray(jax.nn.log_softmax(dense_logits(ids), axis=-1))[:-1]
    assert [token.token_id for token in result.logprobs] == list(ids[1:])
    np.testing.assert_allclose([t.logprob for t in result.logprobs], scores[range(len(scores)), ids[1:]], atol=2e-5)
    for token, row in zip(result.logprobs, scores, strict=True):
        np.testing.assert_allclose([value for _, value in token.top], np.sort(row)[::-1][:alternatives], atol=2e-5)
        np.testing.assert_allclose([row[index] for index, _ in token.top], [value for _, value in token.top], atol=2e-5)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prompts_are_read_beside_others(tp: int) -> None:
    """Shorter and longer than a chunk, one token, a whole context; two that share their blocks."""
    engine = tiny_engine(tp=tp)
    lengths = (1, 2, 33, 64, 100, 127)
    reads = [embedded(f"embed {length}", length) for length in lengths]
    reads += [request(f"score {length}", prompt(length), prompt_logprobs=3, max_new_tokens=5) for length in lengths]
    others = [request(f"other {length}", prompt(length), temperature=1.0, seed=length) for length in lengths]
    for _ in range(2):  # the second time everything is in the cache
        outputs = outputs_of(engine, [*reads, *others])
        for length in lengths:
            check(result_of(outputs[f"embed {length}"]), prompt(length))
            check(result_of(outputs[f"score {length}"]), prompt(length), 3)
            assert all(output.prompt is None for output in outputs[f"other {length}"])
    alone = run(tiny_engine(tp=tp), others)
    assert {name: [token for output in outputs[name] for token in output.token_ids] for name in alone} == alone


def test_a_preempted_prompt_is_read_once() -> None:
    engine = tiny_engine(blocks=11)
    items = [request(f"score {length}", prompt(length), prompt_logprobs=0, max_new_tokens=40) for length in (40, 60)]
    items += [request(f"other {length}", prompt(length), max_new_tokens=40) for length in (41, 42, 43)]
    outputs = outputs_of(engine, items)
    assert engine.scheduler.preemptions
    for length in (40, 60):
        check(result_of(outputs[f"score {length}"]), prompt(length), 0)


def test_others_go_on_while_what_reads_prompts_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    engine.add(request("other", prompt(5), max_new_tokens=50))
    engine.step()
    engine.add(embedded("embed", 5))
    assert engine.stats.waiting == 1
    assert engine.step()[0].request_id == "other"
    engine.abort("embed")
    while engine.has_work:
        assert {output.request_id for output in engine.step()} <= {"other"}
    assert leftovers(engine) == []


def leftovers(engine: Engine) -> list[Any]:
    return [*engine._collectors._collectors, *engine._intake.compiling, *engine._intake.sequences]


def test_too_many_alternatives_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt_logprobs=21 must be between 0 and 20; ask for fewer"):
        tiny_engine().add(request("a", prompt(3), prompt_logprobs=21))


@pytest.mark.parametrize("sizes", [(16, 512, 128), (1, 2048, 2048), (128, 8192, 2048), (8, 32, 32)])
def test_few_shapes_read_prompts_and_hold_every_batch(sizes: tuple[int, int, int]) -> None:
    shapes = step_shapes(*sizes, 4)
    few = prompt_output_shapes(shapes)
    assert len(few) <= 3
    assert max(shape.prefill_tokens for shape in few) == max(shape.prefill_tokens for shape in shapes)
    beside = [shape for shape in shapes if shape.decodes and shape.prefill_tokens]
    assert not beside or max(beside, key=lambda shape: (shape.decodes, shape.prefill_tokens)) in few


def test_a_bias_makes_tokens_likelier_and_leaves_log_probabilities_alone() -> None:
    engine = tiny_engine()
    plain = run(engine, [request("a", prompt(9), logprobs=5)])["a"]
    never = request("never", prompt(9), logit_bias=((plain[0], -100.0),))
    always = request("always", prompt(9), logit_bias=((7, 100.0), (8, -3.0)), temperature=1.0, logprobs=0)
    outputs = outputs_of(engine, [never, always, request("free", prompt(9))])
    tokens = {name: [token for output in of for token in output.token_ids] for name, of in outputs.items()}
    assert plain[0] not in tokens["never"]
    assert set(tokens["always"]) == {7}
    assert tokens["free"] == plain
    score = jax.nn.log_softmax(dense_logits(prompt(9))[-1])[7]
    assert outputs["always"][0].logprobs[0].logprob == pytest.approx(float(score), abs=2e-5)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (((VOCAB, 1.0),), f"logit_bias: token {VOCAB} must be between 0 and {VOCAB - 1}"),
        (((1, float("nan")),), "logit_bias: nan for token 1 must be finite"),
        (tuple((1, 1.0) for _ in range(257)), "logit_bias has 257 tokens, 256 at most"),
    ],
)
def test_biases_that_are_none_are_refused(bias: tuple[tuple[int, float], ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_engine().add(request("a", prompt(3), logit_bias=bias))
