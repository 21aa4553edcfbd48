"""Lone surrogates, which Python strings and JSON escapes can hold and UTF-8 cannot, at every entrance."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from jaxdeploy import GenerationConfig
from jaxdeploy.api.prompts import encode
from jaxdeploy.bundled import bundled_model
from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.generation.resolved import resolve
from jaxdeploy.server.body_text import well_formed_body
from jaxdeploy.tokenizer import Tokenizer
from jaxdeploy.unicode_text import well_formed, well_formed_values
from tests.served import NAME, RunningServer

HALF = "\ud83d"
SAY = [{"role": "user", "content": "x"}]
HALF_SAID = [{"role": "user", "content": f"a{HALF}b"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {HALF: {"enum": [HALF]}}}}}
CHOICE = {"type": "json_schema", "json_schema": {"schema": {"enum": [HALF]}}}

BODIES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1, **fields})
        for fields in (
            {"messages": HALF_SAID},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            {"messages": [{**SAY[0], "name": HALF}]},
            {"messages": [{"role": HALF, "content": "x"}]},
            {"stop": [HALF]},
            {"stop": HALF},
            {"bad_words": [HALF]},
            {"user": HALF},
            {"metadata": {HALF: HALF}},
            {"model": HALF},
            {"tools": [TOOL]},
            {"tools": [{"type": "function", "function": {"name": HALF}}]},
            {"chat_template_kwargs": {HALF: [HALF]}},
            {"response_format": CHOICE},
            {"response_format": {"type": "regex_schema", "regex_schema": f"{HALF}+"}},
            {"response_format": {"type": "choice", "choice": [HALF]}},
            {"session_id": HALF},
            {HALF: 1},
        )
    ),
    ("/v1/completions", {"model": NAME, "prompt": HALF, "max_tokens": 1}),
    ("/v1/completions", {"model": NAME, "prompt": "x", "suffix": HALF, "max_tokens": 1}),
    ("/v1/embeddings", {"model": HALF, "input": HALF}),
    ("/v1/responses", {"model": NAME, "input": HALF, "instructions": HALF, "max_output_tokens": 1}),
    ("/v1/responses", {"model": NAME, "input": "x", "previous_response_id": HALF}),
    ("/v1/messages", {"model": NAME, "messages": HALF_SAID, "system": HALF, "max_tokens": 1}),
    ("/v1/messages", {"model": NAME, "messages": SAY, "stop_sequences": [HALF], "max_tokens": 1}),
    ("/v1/messages/count_tokens", {"model": NAME, "messages": HALF_SAID}),
    ("/v1/chat/interactive", {"prompt": HALF, "request_output_len": 1}),
    ("/generate", {"prompt": HALF, "max_tokens": 1}),
    ("/tokenize", {"prompt": HALF}),
    ("/tokenize", {"messages": HALF_SAID}),
    ("/v1/encode", {"input": [HALF, "x"], "do_preprocess": True}),
]


def test_no_field_of_any_route_fails_on_half_a_character(server: RunningServer) -> None:
    """One test for all: each body costs a token at most."""
    for index, (path, body) in enumerate(BODIES):
        streamed = {"stream": True} if index % 2 and "max_tokens" in body else {}
        reply = httpx2.post(server.url + path, content=json.dumps({**body, **streamed}), headers=JSON, timeout=60)
        assert reply.status_code in (200, 400, 404), (path, body, reply.text)
        assert "server failed" not in reply.text, (path, body)


JSON = {"Content-Type": "application/json"}


def test_half_a_character_is_read_as_the_replacement_character(server: RunningServer) -> None:
    def count(text: str) -> Any:
        return httpx2.post(f"{server.url}/tokenize", content=text, headers=JSON).json()["tokens"]

    assert count('{"prompt": "a\\ud83d"}') == count('{"prompt": "a\ufffd"}')
    assert count('{"prompt": "a\\ud83d\\ude00"}') == count('{"prompt": "a\U0001f600"}')


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (rb'{"a": "\ud83d"}', {"a": "\ufffd"}),
        (rb'{"a": "\uD83D\uDE00"}', {"a": "\U0001f600"}),
        (rb'{"a": "\uDE00\uD83D"}', {"a": "\ufffd\ufffd"}),
        (rb'{"a": "\ud83d\ud83d\ude00"}', {"a": "\ufffd\U0001f600"}),
        (rb'{"a": "\\ud83d"}', {"a": r"\ud83d"}),
        (rb'{"a": "\\\ud83d"}', {"a": "\\\ufffd"}),
        (b'{"a": "\xed\xa0\xbd"}', {"a": "\ufffd" * 3}),
        (b'{"a": "\xff"}', {"a": "\ufffd"}),
        ('{"a": "\\ud83dé"}'.encode("utf-16"), {"a": "\ufffdé"}),
        ('{"a": "é"}'.encode(), {"a": "é"}),
    ],
)
def test_bodies(body: bytes, expected: dict[str, str]) -> None:
    assert json.loads(well_formed_body(body)) == expected


def test_texts() -> None:
    assert well_formed("a\U0001f600") == "a\U0001f600"
    assert well_formed("\ud83d\ude00") == "\U0001f600"
    assert well_formed("\ude00\ud83da\ud83d") == "\ufffd\ufffda\ufffd"
    assert well_formed_values({HALF: [1, (HALF, None)]}) == {"\ufffd": [1, ["\ufffd", None]]}


def test_python_takes_them_in_prompts_and_settings() -> None:
    tokenizer = Tokenizer.load(bundled_model())
    template = ChatTemplate.resolve(None, tokenizer, "LlamaForCausalLM")
    replaced = encode("a\ufffd", tokenizer, template, do_preprocess=True)
    assert encode(f"a{HALF}", tokenizer, template, do_preprocess=True) == replaced
    message = {"role": "user", "content": [{"type": "text", "text": f"a{HALF}"}]}
    assert encode([message], tokenizer, template, do_preprocess=True) == replaced
    texts = GenerationConfig(stop_words=[HALF], bad_words=[HALF])
    assert resolve(texts, {}, tokenizer).text.stop_words == ("\ufffd",)
    schema = GenerationConfig(response_format={"type": "json_schema", "json_schema": {"schema": {"enum": [HALF]}}})
    assert "\ufffd" in str(resolve(schema, {}, tokenizer).sampling.grammar)
