"""``/v1/responses`` through OpenAI's own client: replies, events, tools, forms, what is kept and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel, TypeAdapter

from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.server.protocol.responses import Response, ResponsesRequest
from jaxdeploy.server.stored_responses import StoredResponse, StoredResponses, UnknownResponseError
from tests.served import NAME, SESSION_LEN, RunningServer, running, until, with_tools

ASK = "What is 6 times 7?"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_output_tokens": 40}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": CITY, "strict": True},
    {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": False},
]


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


@pytest.fixture
def tool_client(engine: AsyncEngine) -> Iterator[openai.OpenAI]:
    """Of the same model with a template that shows tools, and thoughts."""
    made = engine.generator
    usual = made.template
    made.template = with_tools(usual)
    with running(engine, options={"tool_call_parser": "hermes", "reasoning_parser": "think"}) as server:
        with client_of(server) as client:
            yield client
        assert until(server.idle)
    made.template = usual


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"input": ASK, **GREEDY, **options})


def say(client: openai.OpenAI, *messages: tuple[str, str]) -> Any:
    """The chat route's reply."""
    given: Any = [{"role": role, "content": content} for role, content in messages]
    return client.chat.completions.create(model=NAME, messages=given, temperature=0, max_tokens=40)


def unnamed(items: list[Any]) -> list[dict[str, Any]]:
    """Output without its ids."""
    return [item.model_dump(exclude={"id", "call_id"}) for item in items]


def test_a_reply_is_that_of_the_chat_route(client: openai.OpenAI) -> None:
    reply = ask(client, instructions="Be brief.", metadata={"for": "me"}, user="u", tools=TOOLS, tool_choice="none")
    same = say(client, ("system", "Be brief."), ("user", ASK))
    (message,) = reply.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert reply.output_text == same.choices[0].message.content
    assert (reply.status, reply.object, reply.error, reply.incomplete_details) == ("completed", "response", None, None)
    assert reply.completed_at >= reply.created_at
    assert reply.usage.input_tokens == same.usage.prompt_tokens
    assert reply.usage.output_tokens == same.usage.completion_tokens
    assert reply.usage.total_tokens == same.usage.total_tokens
    assert reply.usage.output_tokens_details.reasoning_tokens == 0
    assert (reply.instructions, reply.metadata, reply.user) == ("Be brief.", {"for": "me"}, "u")
    assert (reply.temperature, reply.top_p, reply.max_output_tokens, reply.truncation) == (0, 1, 40, "disabled")
    assert (reply.tool_choice, [tool.name for tool in reply.tools]) == ("none", ["weather", "clock"])
    assert ask(client, instructions="Be brief.").usage.input_tokens_details.cached_tokens > 0


def test_events_of_a_stream(client: openai.OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert types == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * len(deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert len(deltas) > 1
    assert "".join(deltas) == events[-4].text == whole.output_text
    assert events[0].response.output == []
    assert events[2].item.content == []
    final = events[-1].response
    assert events[-2].item == final.output[0]
    assert (final.id, final.status) == (events[0].response.id, "completed")
    assert unnamed(final.output) == unnamed(whole.output)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert client.responses.retrieve(final.id) == final


def test_events_are_what_the_client_documents(tool_client: openai.OpenAI) -> None:
    """The client itself takes whatever comes; its types are the format's reference."""
    thoughtful = {"format": {"type": "grammar", "grammar": 'start: "<think>a</think>b"'}}
    called = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "metadata": {"a": "b"}}
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    city = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    for options in ({"text": thoughtful}, called, {"text": city}, {"max_output_tokens": 1}):
        asked = {"input": ASK, **GREEDY, **options, "stream": True}
        lines = httpx2.post(f"{tool_client.base_url}responses", json=asked, timeout=60).text.splitlines()
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert [event["type"] for event in events] == names
        for event in events:
            if options.get("text") == thoughtful and "response" in event:
                event["response"]["text"] = None  # a form that OpenAI does not have
            assert known.validate_python(event).type == event["type"]


def test_every_documented_field_is_known() -> None:
    assert set(ResponseCreateParamsBase.__annotations__) - set(ResponsesRequest.model_fields) == set()


def test_the_stream_of_the_client(client: openai.OpenAI) -> None:
    with client.responses.stream(input=ASK, **GREEDY) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert texts[-1] == stream.get_final_response().output_text == ask(client).output_text


def test_a_reply_that_is_cut(client: openai.OpenAI) -> None:
    cut = ask(client, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (cut.output[0].status, cut.usage.output_tokens, cut.completed_at) == ("incomplete", 2, None)
    last = list(ask(client, max_output_tokens=2, stream=True))[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == cut.output_text


def test_input_is_a_text_or_items(client: openai.OpenAI) -> None:
    part = {"type": "input_text", "text": ASK}
    usual = ask(client)
    for items in ([{"role": "user", "content": ASK}], [{"type": "message", "role": "user", "content": [part]}]):
        assert ask(client, input=items).output_text == usual.output_text
    history: Any = [{"role": "user", "content": ASK}, *usual.output, {"role": "user", "content": "And 2 times 3?"}]
    same = say(client, ("user", ASK), ("assistant", usual.output_text), ("user", "And 2 times 3?"))
    reply = ask(client, input=history)
    assert (reply.output_text, reply.usage.input_tokens) == (same.choices[0].message.content, same.usage.prompt_tokens)


def test_a_conversation_goes_on_by_ids(client: openai.OpenAI) -> None:
    first = ask(client, instructions="Be brief.")
    second = ask(client, input="And 2 times 3?", previous_response_id=first.id)
    said = [("user", ASK), ("assistant", first.output_text), ("user", "And 2 times 3?")]
    same = say(client, *said)
    assert second.output_text == same.choices[0].message.content
    assert second.usage.input_tokens == same.usage.prompt_tokens, "instructions are not carried over"
    assert second.previous_response_id == first.id
    client.responses.delete(first.id)
    third = ask(client, input="Thanks!", previous_response_id=second.id)
    same = say(client, *said, ("assistant", second.output_text), ("user", "Thanks!"))
    assert third.output_text == same.choices[0].message.content


def test_what_is_kept(client: openai.OpenAI, server: RunningServer) -> None:
    kept, lost = ask(client), ask(client, store=False)
    assert client.responses.retrieve(kept.id) == kept
    url = f"{server.url}/v1/responses/{kept.id}"
    assert "stream='true' is not there" in httpx2.get(url, params={"stream": "true"}).json()["error"]["message"]
    assert "colour is no field" in httpx2.get(url, params={"colour": "red"}).json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match=r"include\[\] is no field"):
        client.responses.retrieve(kept.id, include=["reasoning.encrypted_content"])
    assert httpx2.delete(url).json() == {"id": kept.id, "object": "response", "deleted": True}
    for response_id in (kept.id, lost.id, "resp_x"):
        with pytest.raises(openai.NotFoundError, match=f"response '{response_id}' is not kept here"):
            client.responses.retrieve(response_id)
        with pytest.raises(openai.NotFoundError, match="is not kept here"):
            client.responses.delete(response_id)
        with pytest.raises(openai.NotFoundError, match="send the whole conversation as input"):
            ask(client, previous_response_id=response_id)


def test_as_many_are_kept_as_there_is_room() -> None:
    def stored(name: str) -> StoredResponse:
        unset = {name: None for name, field in Response.model_fields.items() if field.is_required()}
        some = {"metadata": {}, "text": {}, "tools": [], "parallel_tool_calls": True, "store": True}
        numbers = {"created_at": 1, "temperature": 0, "top_p": 1}
        return StoredResponse(Response.model_validate({**unset, **some, **numbers, "id": name, "model": NAME}), ())

    few = StoredResponses(most=2)
    for name in "ab":
        few.keep(stored(name))
    few.find("a")
    few.keep(stored("c"))
    with pytest.raises(UnknownResponseError):
        few.find("b")
    assert few.find("a").response.id == "a"
    small = StoredResponses(largest=stored("a").size)
    for name in "ab":
        small.keep(stored(name))
    assert len(small) == 1


def test_a_text_of_a_given_form(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: Literal["Paris", "Rome"]
        days: Literal[1, 2]

    options: Any = {**GREEDY, "max_output_tokens": 220}
    parsed = client.responses.parse(input=ASK, text_format=City, **options)
    assert isinstance(parsed.output_parsed, City)
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"
    assert ask(client, input=[{"role": "user", "content": ASK}, *parsed.output, {"role": "user", "content": "Why?"}])
    with client.responses.stream(input=ASK, text_format=City, **options) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    yes_or_no: Any = {"format": {"type": "choice", "choice": ["yes", "no"]}}
    assert ask(client, text=yes_or_no).output_text in ("yes", "no")
    assert ask(client, text={"format": {"type": "text"}}).output_text == ask(client).output_text


@pytest.mark.parametrize("choice", [{"type": "function", "name": "weather"}, "required"])
def test_calls(tool_client: openai.OpenAI, choice: Any) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 120}
    reply = ask(tool_client, **options)
    (call,) = reply.output
    assert (call.type, call.status, call.call_id[:5], reply.status) == (
        "function_call",
        "completed",
        "call_",
        "completed",
    )
    assert call.name in ("weather", "clock")
    if choice != "required":
        assert call.name == "weather"
        assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert (reply.output_text, reply.parallel_tool_calls) == ("", False)

    events = list(ask(tool_client, **options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert [event.type for event in events] == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *["response.function_call_arguments.delta"] * len(deltas),
        *("response.function_call_arguments.done", "response.output_item.done", "response.completed"),
    ]
    assert events[2].item.arguments == ""
    assert "".join(deltas) == events[-3].arguments == call.arguments

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    after = ask(tool_client, input=[result], previous_response_id=reply.id, tools=TOOLS)
    sent_again = ask(tool_client, input=[{"role": "user", "content": ASK}, call, result], tools=TOOLS)
    assert unnamed(after.output) == unnamed(sent_again.output)
    assert after.usage.input_tokens == sent_again.usage.input_tokens


def test_only_allowed_tools_are_called(tool_client: openai.OpenAI) -> None:
    clock = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    reply = ask(tool_client, tools=TOOLS, tool_choice=clock, max_output_tokens=120)
    assert {item.name for item in reply.output} == {"clock"}
    assert len(reply.tools) == 2
    moon = {**clock, "tools": [{"type": "function", "name": "moon"}]}
    with pytest.raises(openai.BadRequestError, match="'moon' names no function of tools"):
        ask(tool_client, tools=TOOLS, tool_choice=moon)
    with pytest.raises(openai.BadRequestError, match="names no function of tools"):
        ask(tool_client, tools=TOOLS, tool_choice={"type": "function", "name": "moon"})


def test_thoughts_are_items_of_their_own(tool_client: openai.OpenAI) -> None:
    thoughtful: Any = {"format": {"type": "grammar", "grammar": 'start: "<think>" /[ab]{3}/ "</think>\\n42"'}}
    reply = ask(tool_client, text=thoughtful)
    thought, message = reply.output
    assert (thought.type, thought.summary, message.type) == ("reasoning", [], "message")
    assert re.fullmatch("[ab]{3}", thought.content[0].text)
    assert reply.output_text == "42"
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens
    events = list(ask(tool_client, text=thoughtful, stream=True))
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == thought.content[0].text
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1]
    again = ask(tool_client, input=[{"role": "user", "content": ASK}, *reply.output, {"role": "user", "content": "?"}])
    assert again.status in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"truncation": "auto"}, "truncation='auto' is not there; leave items out of input"),
        ({"background": True}, "background=True is not there"),
        ({"conversation": "conv_1"}, "previous_response_id goes on"),
        ({"include": ["reasoning.encrypted_content"]}, "include="),
        ({"top_logprobs": 2}, "top_logprobs=2 is not there; /v1/chat/completions has them"),
        ({"reasoning": {"effort": "high"}}, "effort='high' is not there; give what the chat template knows"),
        ({"text": {"verbosity": "low"}}, "verbosity='low' is not there"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is missing"),
        ({"text": {"format": {"type": "xml"}}}, "type='xml' is unknown"),
        ({"n": 2}, "n=2 is not there; a response is one reply"),
        ({"max_tokens": 2}, "max_tokens is no field"),
        ({"temperature": 3}, "temperature=3 is wrong"),
        ({"metadata": {"x": "y" * 513}}, "metadata"),
        ({"stream_options": {"include_obfuscation": True}}, "include_obfuscation=True is not there"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type='web_search' is wrong"),
        ({"tools": TOOLS}, "--tool-call-parser"),
        ({"input": []}, r"input=\[\] is wrong"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            r"input\[0\]=.* is wrong: it is no message",
        ),
        ({"input": ["x"]}, r"input\[0\]='x' is wrong: it is no message"),
        ({"input": [{"role": "robot", "content": "x"}]}, r"^input\[0\].role='robot' is wrong"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "encrypted_content='x'"),
        ({"input": [{"role": "user", "content": "x"}] * 4096, "instructions": "x"}, "input makes 4097 messages"),
        ({"input": [{"role": "user", "content": "x", "a b": 1}]}, r"^input\[0\].a b is no field"),
        ({"input": "word " * SESSION_LEN}, f"session_len={SESSION_LEN}"),
    ],
)
def test_wrong_requests_say_what_is_wrong(server: RunningServer, options: dict[str, Any], says: str) -> None:
    response = httpx2.post(f"{server.url}/v1/responses", json={"input": ASK, **GREEDY, **options}, timeout=60)
    error = response.json()["error"]
    assert response.status_code == 400
    assert re.search(says, error["message"]), error["message"]


@pytest.mark.parametrize("nothing", ["", [], {}, None])
def test_a_refused_field_without_a_value_is_left_out(nothing: Any) -> None:
    """``n`` is refused here and a number in a chat."""
    chat = ResponsesRequest.model_validate({"input": ASK, "n": nothing, "truncation": nothing}).chat_request([])
    assert chat.n is None


def test_unknown_models(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        ask(client, model="gpt-5")


def test_a_stream_that_fails_says_so(client: openai.OpenAI, server: RunningServer) -> None:
    stream = iter(ask(client, stream=True, max_output_tokens=200, extra_body={"ignore_eos": True}))
    begun = next(stream).response
    assert until(lambda: server.served.num_replies == 1)
    httpx2.post(f"{server.url}/abort_request", json={"request_id": begun.id})
    events: list[Any] = []
    with pytest.raises(openai.APIError, match="was aborted"):
        events.extend(stream)
    failed = events[-1]
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert "was aborted" in failed.response.error.message
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, server: RunningServer) -> None:
    before = len(server.served.responses)
    stream = ask(client, stream=True, max_output_tokens=200, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert until(lambda: server.served.num_replies == 1)
    stream.close()
    assert until(server.idle, 5)
    assert len(server.served.responses) == before
