"""The Python API on a generator that echoes, and on a real model."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxdeploy
from jaxdeploy import GenerationConfig, Response, Session, TurbomindEngineConfig, pipeline
from jaxdeploy.errors import ConfigError, ContextLengthError, RequestError
from jaxdeploy.messages import FinishReason
from tests.fake_generator import FakeGenerator, fake_pipeline


def only(result: Any) -> Response:
    assert isinstance(result, Response)
    return result


def texts(result: Any) -> list[str]:
    assert isinstance(result, list)
    return [response.text for response in result]


def device_bytes() -> int:
    gc.collect()  # what other tests have left
    return sum(array.nbytes for array in jax.live_arrays())


def test_one_prompt_gives_one_response() -> None:
    pipe, _ = fake_pipeline()
    response = only(pipe("hello"))
    assert (response.text, response.generate_token_len, response.input_token_len) == ("hello", 5, 6)
    assert response.finish_reason == "stop"
    assert response.token_ids == [ord(letter) for letter in "hello"]
    assert response.logprobs is None


def test_forms_of_prompts() -> None:
    pipe, _ = fake_pipeline()
    message = {"role": "user", "content": "m"}
    assert texts(pipe(["a", "b"])) == ["a", "b"]
    assert only(pipe([message])).text == "m"
    assert texts(pipe([[message], [message, {"role": "assistant", "content": "n"}]])) == ["m", "mn"]
    assert only(pipe({"prompt_token_ids": [65, 66]})).text == "AB"
    mixed: list[Any] = ["a", {"prompt_token_ids": [66]}, [message]]
    assert texts(pipe(mixed)) == ["a", "B", "m"]
    assert only(pipe([{"role": "user", "content": [{"type": "text", "text": "part"}]}])).text == "part"
    assert pipe([]) == []


@pytest.mark.parametrize("prompts", [7, [7], {"ids": [1]}, {"prompt_token_ids": "text"}, [{"text": "no role"}]])
def test_other_forms_are_refused(prompts: Any) -> None:
    with pytest.raises(RequestError, match="give a text"):
        fake_pipeline()[0](prompts)


@pytest.mark.parametrize(
    ("prompts", "fault"),
    [
        (("what is this?", object()), r"prompts\[1\]=object is no text, and this model reads text only"),
        (("what is this?", "https://example.com/a.png"), r"prompts\[1\]='https://example.com/a.png' is no text"),
        (("what is this?", [object()]), r"prompts\[1\]=list is no text"),
        ([("what is this?", b"\x89PNG")], r"prompts\[1\]=bytes is no text"),
        ([{"content": "Hi"}], r"messages\[0\].role is missing"),
        ([{"role": "usr", "content": "Hi"}], r"messages\[0\].role='usr' is unknown"),
        ({"role": "user", "content": "Hi"}, "is one message; put it into a list"),
        (
            [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]],
            "type='image_url' cannot",
        ),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompts: Any, fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        fake_pipeline()[0](prompts)


def test_a_reply_that_comes_last_is_continued_unless_told_otherwise() -> None:
    pipe, _ = fake_pipeline(template="chatml")
    begun: Any = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": "It is"}]
    assert only(pipe(begun)).text.endswith("<|im_start|>assistant\nIt is")
    assert only(pipe(begun, add_generation_prompt=True)).text.endswith("It is<|im_end|>\n<|im_start|>assistant\n")
    assert only(pipe(begun, continue_final_message=False)).text.endswith("<|im_start|>assistant\n")
    assert only(pipe("")).text.endswith("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(RequestError, match="add_generation_prompt=true begins a new reply and continue_final_message"):
        pipe(begun, add_generation_prompt=True, continue_final_message=True)


def test_chat_template_and_do_preprocess() -> None:
    pipe, generator = fake_pipeline(template="chatml")
    assert "<|im_start|>user\nhi<|im_end|>" in only(pipe("hi")).text
    assert only(pipe("hi", do_preprocess=False)).text == "hi"
    assert [request.text.stop_words for request in generator.submitted] == [("<|im_end|>",), ()]


def test_empty_text_begins_with_bos() -> None:
    pipe, generator = fake_pipeline()
    pipe("", do_preprocess=False)
    assert generator.submitted[0].prompt_token_ids == (1,)


def test_gen_config_for_all_or_for_each() -> None:
    pipe, _ = fake_pipeline()
    assert texts(pipe(["abc", "def"], GenerationConfig(max_new_tokens=2))) == ["ab", "de"]
    each = [GenerationConfig(max_new_tokens=1), GenerationConfig(max_new_tokens=3)]
    result = pipe(["abc", "defg"], gen_config=each)
    assert texts(result) == ["a", "def"]
    with pytest.raises(ConfigError, match="1 entries for 2 prompts"):
        pipe(["a", "b"], each[:1])


def test_old_keyword_arguments() -> None:
    pipe, generator = fake_pipeline()
    result = pipe("abcd", request_output_len=2, top_k=40, top_p=0.8, temperature=0.8, repetition_penalty=1.1)
    assert only(result).finish_reason is FinishReason.LENGTH
    sampling = generator.submitted[0].sampling
    assert (sampling.top_k, sampling.top_p, sampling.temperature) == (40, 0.8, 0.8)
    with pytest.raises(ConfigError, match="the nearest one is top_p"):
        pipe("a", top_pp=1)


def test_adapters_are_passed_on_for_all_or_for_each() -> None:
    pipe, generator = fake_pipeline()
    pipe(["a", "b"], adapter_name="x")
    pipe(["a", "b"], adapter_name=[None, "y"], n=2)
    pipe.chat("a", adapter_name="x")
    assert [request.adapter for request in generator.submitted] == ["x", "x", None, None, "y", "y", "x"]
    with pytest.raises(ConfigError, match="adapter_name has 1 entries for 2 prompts; give one for each"):
        pipe(["a", "b"], adapter_name=["x"])


def test_alternatives_are_flat_and_numbered() -> None:
    pipe, generator = fake_pipeline()
    result = pipe("a", GenerationConfig(n=2, temperature=1.0, random_seed=3))
    assert texts(result) == ["a", "a"]
    assert [request.sampling.seed for request in generator.submitted] == [3, 4]
    several = pipe(["a", "b"], GenerationConfig(n=2))
    assert texts(several) == ["a", "a", "b", "b"]
    assert isinstance(several, list)
    assert [response.index for response in several] == [0, 1, 2, 3]
    assert several[0].session_id == several[1].session_id != several[2].session_id


def test_logprobs_hold_the_chosen_token() -> None:
    pipe, _ = fake_pipeline()
    logprobs = only(pipe("a", GenerationConfig(logprobs=1))).logprobs
    assert logprobs == [{ord("a"): math.log(0.5), 7: math.log(0.25)}]


def test_stream_equals_the_whole() -> None:
    pipe, _ = fake_pipeline()
    whole = pipe(["abc", "de"])
    assert isinstance(whole, list)
    streamed = ["", ""]
    for piece in pipe.stream_infer(["abc", "de"]):
        assert piece.generate_token_len == len(streamed[piece.index]) + 1
        streamed[piece.index] += piece.text
    assert streamed == texts(whole)


def test_two_streams_in_turn() -> None:
    pipe, _ = fake_pipeline()
    first, second = pipe.stream_infer("abc"), pipe.stream_infer("xyz")
    pairs = [(a.text, b.text) for a, b in zip(first, second, strict=True)]
    assert pairs == [("a", "x"), ("b", "y"), ("c", "z")]


def test_threads_share_the_engine() -> None:
    pipe, _ = fake_pipeline()
    said: dict[int, list[str]] = {}

    def ask(index: int) -> None:
        said[index] = [only(pipe(f"thread {index} says {turn}")).text for turn in range(20)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert said == {index: [f"thread {index} says {turn}" for turn in range(20)] for index in range(4)}


def test_leaving_a_stream_drops_the_request() -> None:
    pipe, generator = fake_pipeline()
    stream = pipe.stream_infer("abc")
    next(stream)
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert len(generator.aborted) == 1
    assert not generator.has_work


def test_stop_session_ends_the_reply() -> None:
    pipe, generator = fake_pipeline()
    pieces = []
    for piece in pipe.stream_infer("abcdef"):
        pieces.append(piece)
        pipe.stop_session(piece.session_id)
    assert [piece.finish_reason for piece in pieces] == [None, FinishReason.ABORT]
    assert not generator.has_work


def test_a_prompt_too_long_stops_nothing_else() -> None:
    pipe, generator = fake_pipeline()
    with pytest.raises(ContextLengthError, match="session_len=256"):
        pipe(["short", "x" * 300])
    assert not generator.has_work
    assert only(pipe("fine")).text == "fine"


def test_chat_keeps_the_history() -> None:
    pipe, _ = fake_pipeline()
    session = pipe.chat("a")
    assert isinstance(session, Session)
    again = pipe.chat("b", session)
    assert again is session
    assert session.history == [("a", "a"), ("b", "aab")]
    assert session.response is not None
    assert session.response.session_id == session.session_id
    assert str(session) == "USER: a\nASSISTANT: a\nUSER: b\nASSISTANT: aab"


def test_chat_may_stream() -> None:
    pipe, _ = fake_pipeline()
    session = pipe.session()
    pieces = pipe.chat("ab", session, stream_response=True)
    assert not isinstance(pieces, Session)
    assert [piece.text for piece in pieces] == ["a", "b"]
    assert session.history == [("ab", "ab")]
    pipe.end_session(session)


def test_close_frees_and_refuses() -> None:
    pipe, generator = fake_pipeline()
    with pipe as same:
        assert same is pipe
    assert generator.closed
    pipe.close()
    with pytest.raises(RequestError, match="closed"):
        pipe("a")


def test_close_while_a_reply_runs() -> None:
    pipe, generator = fake_pipeline()
    stream = pipe.stream_infer("abc")
    next(stream)
    pipe.close()
    with pytest.raises(RequestError, match="closed while a reply ran"):
        next(stream)
    assert generator.aborted == []


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, _ = fake_pipeline()
    pipe(["a", "b"])
    assert capsys.readouterr().err == "", "no bar where nobody looks"
    pipe(["a", "b"], use_tqdm=True)
    captured = capsys.readouterr()
    assert "replies" in captured.err
    assert captured.out == ""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``pipeline`` asks ``Generator.from_pretrained`` for."""
    calls: list[dict[str, Any]] = []

    def load(model: str, config: Any, **kwargs: Any) -> FakeGenerator:
        calls.append({"model": model, "config": config, **kwargs})
        return FakeGenerator()

    monkeypatch.setattr("jaxdeploy.engine.front.generator.Generator.from_pretrained", load)
    return calls


def test_pipeline_reads_its_settings(loads: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    pipeline("m", backend_config=TurbomindEngineConfig(tp=2), session_len=128)
    assert (loads[0]["config"].tp, loads[0]["config"].session_len) == (2, 128)
    pipeline("m", model_name="internlm2-chat-7b")
    pipeline("m", "my-own-name")
    assert [call["chat_template"] for call in loads] == [None, "internlm2-chat-7b", None]
    assert "model_name='my-own-name'" in caplog.text
    with pytest.raises(ConfigError, match="the nearest one is tp"):
        pipeline("m", tpp=2)
    with pytest.raises(ConfigError, match="log_level='LOUD'"):
        pipeline("m", log_level="LOUD")


def check_what_is_told_of_prompts(pipe: jaxdeploy.Pipeline) -> None:
    said = only(pipe("Once upon", do_preprocess=False, max_new_tokens=6, logprobs=0))
    ids = pipe.tokenizer.encode("Once upon") + said.token_ids
    again = only(pipe({"prompt_token_ids": ids}, max_new_tokens=1, prompt_logprobs=2))
    assert again.prompt_logprobs is not None
    assert said.logprobs is not None
    chosen = [scores[token] for scores, token in zip(said.logprobs, said.token_ids, strict=True)]
    found = [scores[token] for scores, token in zip(again.prompt_logprobs, ids[1:], strict=True)]
    assert found[-6:] == pytest.approx(chosen, abs=1e-4)
    assert pipe.get_ppl([ids, ids[:3]])[0] == pytest.approx(-sum(found) / len(found), abs=1e-4)
    assert pipe.get_ppl(ids) == pytest.approx([-sum(found) / len(found)], abs=1e-4)
    last, mean = (pipe.embed(["Once upon", "One day"], pooling=pooling) for pooling in ("last", "mean"))
    for vector in (*last, *mean):
        assert math.hypot(*vector) == pytest.approx(1)
    assert last != mean
    with pytest.raises(RequestError, match="pooling='first' is not one of last, mean"):
        pipe.embed(["x"], pooling="first")
    with pytest.raises(RequestError, match="at least 2 tokens"):
        pipe.get_ppl([5])


def test_a_real_model(shared: Path) -> None:
    folder = shared / "assets/models/stories260K"
    config = jaxdeploy.EngineConfig(max_batch_size=2, session_len=64, warmup=False)
    held = device_bytes()
    with pipeline(str(folder), backend_config=config) as pipe:
        assert device_bytes() - held > 1_000_000
        whole = pipe(["Once upon", "One day"], max_new_tokens=8)
        assert isinstance(whole, list)
        streamed = ["", ""]
        for piece in pipe.stream_infer(["Once upon", "One day"], max_new_tokens=8):
            streamed[piece.index] += piece.text
        assert streamed == texts(whole)
        assert [response.generate_token_len for response in whole] == [8, 8]
        either = {"type": "choice", "choice": ["cat", "dog"]}
        assert str(pipe("Once upon", response_format=either)) in ("cat", "dog")
        with pytest.raises(ContextLengthError, match="session_len"):
            pipe("Once upon a time " * 50)
        check_what_is_told_of_prompts(pipe)
    assert device_bytes() - held < 10_000, "close frees weights and KV cache"
