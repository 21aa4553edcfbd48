"""Bodies that are refused before they are parsed, and those that only look alike."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from jaxdeploy.server import body_limit
from jaxdeploy.server.body_limit import DEEPEST, MAX_OBJECTS, MAX_VALUES, BodyLimit
from jaxdeploy.server.protocol.bounded import MAX_KEYS
from jaxdeploy.server.protocol.chat import ChatRequest
from jaxdeploy.server.protocol.completions import CompletionRequest

MAX_BODY = 64 * 1024**2
SAID: dict[str, Any] = {"role": "user", "content": "a"}


async def length(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with the length of the body."""
    message = await receive()
    await PlainTextResponse(str(len(message["body"])))(scope, receive, send)


def answered(limit: BodyLimit, *pieces: bytes, kind: bytes = b"application/json") -> tuple[int, str]:
    """Status and text; a body without pieces never ends."""
    told: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if told:
        told[-1]["more_body"] = False
    said: list[Message] = []

    async def receive() -> Message:
        if not told:
            await asyncio.sleep(60)
        return told.pop(0)

    async def send(message: Message) -> None:
        said.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", kind)]}
    asyncio.run(limit(scope, receive, send))
    return said[0]["status"], said[1]["body"].decode()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"[" * DEEPEST + b"]" * DEEPEST, 200, ""),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), 400, "more than 200 deep"),
        (b'{"a":' * (DEEPEST + 1), 400, "more than 200 deep"),
        (json.dumps("[{,\\\"" * 2**18).encode(), 200, ""),
        (json.dumps(["\\", "[" * 2**10, '"', "," * (MAX_VALUES + 1)]).encode(), 200, ""),
        (json.dumps('\\"' + "[" * 2**10)[:-1].encode(), 200, ""),
        (b"[" + b"1," * (MAX_VALUES + 1), 413, "more than 1048576 values"),
        (b"[]" * (MAX_VALUES + 1), 413, "more than 1048576 values"),
        (b'""' * 4 * MAX_VALUES + b"{" * 201, 413, "more than 1048576 values"),
        (b"{}" * (MAX_OBJECTS + 1), 413, "more than 65536 objects"),
        (("[" * (DEEPEST + 1)).encode("utf-16"), 400, "more than 200 deep"),
        (b" " * (MAX_BODY + 1), 413, "larger than"),
    ],
)  # fmt: skip
def test_what_a_body_may_hold(body: bytes, status: int, says: str) -> None:
    found, text = answered(BodyLimit(length, MAX_BODY), body[:100], body[100:])
    assert (found, says in text) == (status, True), text


def test_bodies_of_other_types_are_not_looked_into() -> None:
    assert answered(BodyLimit(length, MAX_BODY), b"[" * 1000, kind=b"multipart/form-data") == (200, "1000")


def test_all_bodies_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "MAX_HELD", 0.5)
    limit = BodyLimit(length, 100)
    assert answered(limit, b"1" * 51)[0] == 429
    assert answered(limit, b"1" * 49) == (200, "49")
    assert answered(limit, b"1" * 49) == (200, "49"), "what was held is free again"


def test_a_body_must_arrive_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "SECONDS", 0.01)
    assert answered(BodyLimit(length, 100))[0] == 408


@pytest.mark.parametrize(
    ("kind", "fields", "most"),
    [
        (CompletionRequest, {"prompt": ["a", *[1.5] * 1000]}, 4),
        (ChatRequest, {"messages": [{"x": 1}] * 1000}, 9),
        (ChatRequest, {"messages": [{**SAID, "content": [{"x": 1}] * 1000}]}, 9),
        (ChatRequest, {"messages": [SAID], **{f"k{n}": 1 for n in range(MAX_KEYS + 1)}}, 1),
        (ChatRequest, {"messages": [SAID], "metadata": {f"k{n}": 1 for n in range(MAX_KEYS + 1)}}, 1),
        (ChatRequest, {"messages": [SAID], "logit_bias": {f"k{n}": "a" for n in range(MAX_KEYS + 1)}}, 1),
    ],
)
def test_errors_of_a_body_are_few(kind: type[ChatRequest], fields: dict[str, Any], most: int) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    assert caught.value.error_count() <= most
