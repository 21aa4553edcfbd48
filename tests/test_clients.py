"""Third-party clients: their requests are accepted, and content of our replies can be sent back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from jaxdeploy.server.protocol.anthropic import MessagesRequest
from jaxdeploy.server.protocol.chat import ChatRequest
from jaxdeploy.server.protocol.responses import ResponsesRequest
from jaxdeploy.server.routes import chat, completions
from jaxdeploy.server.streaming import event_stream
from tests.lmdeploy_client import LMDeployClient
from tests.served import NAME, SESSION_LEN, RunningServer

ASK: Any = [{"role": "user", "content": "What is 6 times 7?"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(params=["0.3", "0.9", "0.16"])
def lmdeploy(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[LMDeployClient]:
    with closing(LMDeployClient(server.url, request.param)) as client:
        yield client


def test_lmdeploys_client(lmdeploy: LMDeployClient) -> None:
    assert lmdeploy.models() == [NAME]
    ids, length = lmdeploy.encode(ASK[0]["content"], do_preprocess=True)
    assert len(ids) == length
    assert lmdeploy.encode(["a", "b c"])[1][0] >= 1
    (whole,) = lmdeploy.chat(ASK, **GREEDY)
    assert "42" in whole["choices"][0]["message"]["content"]
    (as_text,) = lmdeploy.chat(ASK[0]["content"], **GREEDY)
    assert as_text["choices"][0]["message"] == whole["choices"][0]["message"]
    chunks = list(lmdeploy.chat(ASK, stream=True, **GREEDY))
    assert (
        "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        == (whole["choices"][0]["message"]["content"])
    )
    named: dict[str, Any] = {"temperature": 0.0, "session_id": 140_000_000_000_000, "stop": "\n"}
    (text,) = lmdeploy.complete("The cat", **named)  # as OpenCompass asks; not every version has session_id
    pieces = list(lmdeploy.complete("The cat", stream=True, **named))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text["choices"][0]["text"]


def test_sessions_of_lmdeploys_client(lmdeploy: LMDeployClient) -> None:
    options: dict[str, Any] = {
        "session_id": 5,
        "interactive_mode": True,
        "request_output_len": 12,
        "temperature": 0.0,
        "stream": True,
    }
    first = list(lmdeploy.interact(ASK[0]["content"], **options))
    assert "42" in "".join(piece["text"] for piece in first)
    assert list(lmdeploy.interact("And 2 times 3?", **options))[-1]["history_tokens"] > 0
    (full,) = lmdeploy.interact("word " * SESSION_LEN, **options)
    assert (full["text"], full["tokens"], full["finish_reason"]) == ("", 0, "length")
    (ended,) = lmdeploy.end_session(5)
    assert set(ended) == set(first[-1])
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert list(lmdeploy.interact("Hi", **options))[-1]["history_tokens"] == 0, "it ended"
    lmdeploy.end_session(5)


def test_completion_tokens_come_before_tokens(server: RunningServer) -> None:
    asked = {"prompt": "The cat", "max_completion_tokens": 3, "max_tokens": 9, "ignore_eos": True}
    reply = httpx2.post(f"{server.url}/v1/completions", json=asked).json()
    assert reply["usage"]["completion_tokens"] == 3


def test_pings_are_chunks_for_clients_that_read_no_comments(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for route in (chat, completions):
        monkeypatch.setattr(route, "event_stream", partial(event_stream, ping_seconds=0.001))
    with closing(LMDeployClient(server.url, "0.3")) as client:
        chunks = list(client.chat(ASK, stream=True, **GREEDY))
        pieces = list(client.complete("The cat", stream=True))
    assert sum(not chunk["choices"][0]["delta"] for chunk in chunks) > 1, "pings came"
    assert any(piece["choices"][0]["text"] == "" and not piece["choices"][0]["finish_reason"] for piece in pieces)


SAID: Any = {
    "annotations": [],
    "audio": None,
    "function_call": None,
    "refusal": None,
    "reasoning": None,
    "provider_specific_fields": {},
}
CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"content": "42", **SAID}, {"content": "42"}),
        ({"content": None, **SAID, "refusal": "I will not."}, {"content": "I will not."}),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, {"content": [{"type": "text", "text": "No."}]}),
        (
            {"content": [{"type": "text", "text": "42", "annotations": [], "cache_control": {"type": "ephemeral"}}]},
            {"content": [{"type": "text", "text": "42"}]},
        ),
        ({"content": "42", "parsed": {"answer": 42}, "tool_calls": []}, {"content": "42", "tool_calls": []}),
        ({"content": "42", "reasoning": "6 x 7"}, {"content": "42", "reasoning_content": "6 x 7"}),
        ({"content": None, "tool_calls": [{**CALL, "index": 0}]}, {"tool_calls": [CALL]}),
        (
            {
                "content": "",
                "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {}, "parsed_arguments": {}}}],
            },
            {"content": "", "tool_calls": [CALL]},
        ),
    ],
)
def test_messages_with_the_fields_of_other_peoples_objects(message: Any, read: Any) -> None:
    asked = ChatRequest.model_validate({"messages": [*ASK, {"role": "assistant", **message}]})
    assert asked.messages[-1].model_dump(exclude_none=True) == {"role": "assistant", **read}


@pytest.mark.parametrize(
    "fields",
    [
        {"kwargs": {}, "functions": [], "stop": "", "response_format": {}, "stream_options": {}, "model": None},
        {"stream": None, "priority": None, "top_logprobs": 0, "logprobs": False, "extra_headers": None},
        {"do_preprocess": True, "repetition_ngram_size": 0, "return_token_ids": False, "modalities": ["text"]},
        {"stream_options": {"include_usage": False}, "tools": None, "tool_choice": None, "store": None, "audio": {}},
    ],
)
def test_null_and_empty_fields_say_nothing(fields: dict[str, Any]) -> None:
    ChatRequest.model_validate({"messages": ASK, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kwargs": {"temprature": 1}}, "temprature"),
        ({"temprature": 0}, "temprature"),
        ({"messages": [{"role": "user", "content": "x", "citations": ["y"]}]}, "citations"),
        ({"return_token_ids": True}, "return_token_ids=True is not there"),
    ],
)
def test_fields_that_say_something_are_never_dropped(server: RunningServer, fields: dict[str, Any], says: str) -> None:
    reply = httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": ASK, **fields})
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_openai_reads_its_own_replies_again(server: RunningServer) -> None:
    """Chat and responses, whole and streamed, each as its objects and as its dictionaries."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask: Any = {"model": NAME, "temperature": 0}
        create = client.chat.completions.create
        message = create(messages=ASK, max_tokens=12, logprobs=True, **ask).choices[0].message
        choice: Any = {"type": "choice", "choice": ["yes"]}
        parse = client.chat.completions.parse
        parsed = parse(messages=ASK, max_tokens=40, response_format=choice, **ask).choices[0].message
        with client.chat.completions.stream(messages=ASK, max_tokens=12, **ask) as stream:
            final = stream.get_final_completion().choices[0].message
        again: Any = {"role": "user", "content": "And?"}
        echoes: list[Any] = [message, message.model_dump(), parsed.model_dump(), final.model_dump(), final.to_dict()]
        for said in echoes:
            assert create(messages=[*ASK, said, again], max_tokens=1, **ask).choices
        first = client.responses.create(input=ASK, max_output_tokens=12, **ask)
        for items in (first.output, [item.model_dump() for item in first.output]):
            listed: Any = [*ASK, *items, again]
            assert client.responses.create(input=listed, max_output_tokens=16, **ask).output


RESPONSES: Any = [
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "phase": None,
        "content": [
            {"type": "output_text", "text": "42", "annotations": [], "logprobs": None, "parsed": None},
            {"type": "refusal", "refusal": ""},
        ],
    },
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None, "status": None},
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "add",
        "arguments": "{}",
        "parsed_arguments": {},
        "namespace": None,
        "caller": None,
        "status": "completed",
    },
    {"type": "function_call_output", "call_id": "call_1", "output": "", "id": None, "status": None},
]
BLOCKS: Any = [
    {"type": "thinking", "thinking": "6 x 7", "signature": None},
    {"type": "text", "text": "42", "citations": None, "parsed_output": None},
    {"type": "tool_use", "id": "t", "name": "add", "input": {}, "caller": {"type": "direct"}, "cache_control": None},
]


def test_items_and_blocks_with_null_fields() -> None:
    items: Any = {"input": [*ASK, *RESPONSES], "include": [], "background": None, "conversation": None}
    messages = ResponsesRequest.model_validate(items).chat_request(()).messages
    assert [message.role for message in messages] == ["user", "assistant", "assistant", "tool"]
    result: Any = {"type": "tool_result", "tool_use_id": "t", "content": None, "is_error": None, "cache_control": None}
    claude = {
        "model": NAME,
        "max_tokens": 1,
        "messages": [
            *ASK,
            {"role": "assistant", "content": BLOCKS},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": []},
        ],
        "container": None,
        "mcp_servers": [],
        "stop_sequences": [],
        "system": "",
    }
    asked = MessagesRequest.model_validate(claude).chat_request()
    assert [message.role for message in asked.messages] == ["user", "assistant", "tool", "assistant"]
    assert asked.messages[1].reasoning_content == "6 x 7"


def test_anthropic_reads_its_own_replies_again(server: RunningServer) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        ask: Any = {"model": NAME, "max_tokens": 12, "extra_body": {"temperature": 0}}
        whole = client.messages.create(messages=ASK, **ask)
        with client.messages.stream(messages=ASK, **ask) as stream:
            streamed = stream.get_final_message()
        again: Any = {"role": "user", "content": "And?"}
        for content in (whole.content, streamed.content, [block.model_dump() for block in whole.content]):
            said: Any = [*ASK, {"role": "assistant", "content": content}, again]
            assert client.messages.create(messages=said, **ask).content


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/gpt", "/v1/models/%2F", "/anthropic/v1/models/"])
def test_odd_paths_are_no_failures(server: RunningServer, path: str) -> None:
    assert httpx2.get(server.url + path).status_code in (307, 404)
