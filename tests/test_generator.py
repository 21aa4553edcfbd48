"""The engine with text around it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.errors import CheckpointError, ContextLengthError
from jaxdeploy.messages import FinishReason, Request, SamplingParams, TextOptions
from tests.test_text_stream import cut
from tests.tiny_models import IN_A_ROW, SESSION_LEN, SHAPES_IN_A_ROW, dense_greedy, prompt, request, tiny_engine
from tests.tiny_text import LETTERS, active_blocks, generate, joined, text_of, tiny_generator


def text_request(name: str, length: int, *, stop_words: tuple[str, ...] = (), **kw: Any) -> Request:
    include = kw.pop("include_stop", False)
    return replace(request(name, prompt(length), **kw), text=TextOptions(stop_words, include_stop=include))


def plain_text(length: int, count: int = 16) -> str:
    return text_of(dense_greedy(prompt(length), count))


def test_streamed_text_is_the_text_of_all_tokens() -> None:
    outputs = generate(tiny_generator(), [text_request("a", 20), text_request("b", 5)])
    for name, length in (("a", 20), ("b", 5)):
        text, tokens = joined(outputs[name])
        assert text == plain_text(length) == text_of(tokens)
        assert [output.finish_reason for output in outputs[name]] == [None] * 15 + [FinishReason.LENGTH]


def test_a_stop_word_ends_a_reply_and_frees_its_blocks() -> None:
    generator = tiny_generator()
    stop = plain_text(20)[7:10]  # neither begins nor ends with a token
    outputs = generate(generator, [text_request("a", 20, stop_words=("never", stop))])["a"]
    assert joined(outputs)[0] == cut(plain_text(20), (stop,), include_stop=False)
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert len(outputs) < 16
    assert active_blocks(generator) == 0


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_word_among_tokens_that_come_together(include_stop: bool) -> None:
    """What comes behind it in the same output is neither text nor token."""
    stop = plain_text(20)[7:10]
    item = text_request("a", 20, stop_words=(stop,), include_stop=include_stop)
    together = tiny_generator(tiny_engine(shapes=SHAPES_IN_A_ROW, decode_steps=IN_A_ROW))
    got, expected = (joined(generate(generator, [item])["a"]) for generator in (together, tiny_generator()))
    assert got == expected
    assert active_blocks(together) == 0


def test_stop_words_at_random() -> None:
    """Whatever the word and wherever the tokens end, the stream is the whole text cut."""
    random, whole = np.random.default_rng(0), plain_text(20)
    cases = []
    for index in range(12):
        starts, sizes = random.integers(0, 29, 2), random.integers(1, 5, 2)
        words = tuple(whole[start : start + size] for start, size in zip(starts, sizes, strict=True))
        cases.append(text_request(str(index), 20, stop_words=words, include_stop=bool(index % 2)))
    outputs = generate(tiny_generator(), cases)
    for case in cases:
        steps = outputs[case.request_id]
        assert joined(steps)[0] == cut(whole, case.text.stop_words, include_stop=case.text.include_stop)
        assert steps[-1].finish_reason is FinishReason.STOP


def test_a_stop_word_in_what_the_decoder_held_back() -> None:
    """The last letter of a reply comes only at its end; the reply has ended by the word, not by its length."""
    stop = plain_text(20)[-3:]
    whole = plain_text(20)
    assert whole.index(stop) == len(whole) - 3
    outputs = generate(tiny_generator(), [text_request("a", 20, stop_words=(stop,))])["a"]
    assert joined(outputs)[0] == whole[:-3]
    assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_token_is_shown_on_demand(include_stop: bool) -> None:
    tokens = dense_greedy(prompt(20), 16)
    end = tokens.index(tokens[6])
    item = text_request("a", 20, stop_token_ids=frozenset({tokens[6]}), include_stop=include_stop)
    text, got = joined(generate(tiny_generator(), [item])["a"])
    assert got == tokens[: end + 1]
    assert text == text_of(tokens[: end + 1] if include_stop else tokens[:end])


def test_stop_words_do_not_count_before_min_new_tokens() -> None:
    """Any letter is a stop word here: the first that counts is the one that the fourth token makes certain."""
    item = text_request("a", 20, stop_words=tuple(LETTERS), min_new_tokens=4)
    text, tokens = joined(generate(tiny_generator(), [item])["a"])
    assert (text, len(tokens)) == (plain_text(20)[:5], 4)


def test_logprobs_come_with_the_tokens() -> None:
    outputs = generate(tiny_generator(), [text_request("a", 20, logprobs=2)])["a"]
    assert [output.logprobs[0].token_id for output in outputs] == [output.token_ids[0] for output in outputs]


def test_abort_says_nothing_more_and_frees_blocks() -> None:
    generator = tiny_generator()
    generator.submit(text_request("a", 20))
    generator.submit(text_request("b", 21))
    generator.step()
    generator.abort("a")
    generator.abort("never was")
    while generator.has_work:
        assert {output.request_id for output in generator.step()} == {"b"}
    assert active_blocks(generator) == 0
    assert joined(generate(generator, [text_request("a", 20)])["a"])[0] == plain_text(20)


def test_a_bad_request_leaves_nothing_behind() -> None:
    generator = tiny_generator()
    with pytest.raises(ContextLengthError):
        generator.submit(text_request("a", SESSION_LEN))
    assert not generator.has_work
    assert joined(generate(generator, [text_request("a", 20)])["a"])[0] == plain_text(20)


def test_the_detokenizer_is_told_what_was_asked() -> None:
    generator = tiny_generator()
    item = request("a", prompt(3))
    generator.submit(replace(item, text=TextOptions(skip_special_tokens=False, spaces_between_special_tokens=False)))
    assert cast(Any, generator.tokenizer).asked == [
        {
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "prompt_ids": item.prompt_token_ids,
        }
    ]


def test_as_a_context_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, closed = tiny_engine(), []
    monkeypatch.setattr(engine, "close", lambda: closed.append(True))
    with tiny_generator(engine) as generator:
        assert generator.session_len == SESSION_LEN
    assert closed == [True]


CONFIG = EngineConfig(max_batch_size=1, max_prefill_token_num=32, warmup=False)


@pytest.mark.parametrize("own_process", [False, True])
def test_golden_story(shared: Path, own_process: bool) -> None:
    """The text that the model's author published, byte for byte; his program ended it with a newline."""
    folder = shared / "assets/models/stories260K"
    with Generator.from_pretrained(str(folder), CONFIG, own_process=own_process) as generator:
        bos = generator.tokenizer.bos_token_id
        assert bos is not None
        sampling = SamplingParams(max_new_tokens=256, stop_token_ids=generator.eos_token_ids)
        text, _ = joined(generate(generator, [Request("a", (bos,), sampling)])["a"])
    assert f"{text}\n".encode() == (folder / "golden_greedy.txt").read_bytes()


def test_a_broken_generation_config(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shared / "assets/models/stories260K", folder)
    (folder / "generation_config.json").chmod(0o644)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json.* JSON .*; download"):
        Generator.from_pretrained(str(folder), CONFIG)
