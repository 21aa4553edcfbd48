"""The Python work of the server for a request and for a streamed token, counted in calls and in generators."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import jaxdeploy
from jaxdeploy.bundled import bundled_model
from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.config import ServerConfig
from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.engine.front.remote import RemoteEngine
from jaxdeploy.engine.front.supervisor import Supervisor
from jaxdeploy.messages import FinishReason, StepOutput
from jaxdeploy.server.app import create_app
from jaxdeploy.server.service import ModelService
from jaxdeploy.tokenizer import Tokenizer
from tests.fake_engine import BurstEngine

OURS = str(Path(jaxdeploy.__file__).parent)
MAX_CALLS = 200
MAX_GENERATORS = 3
MESSAGES = [{"role": "user", "content": "Hello there, what is new?"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hello there, what is new?"},
    "/v1/messages": {"messages": MESSAGES, "model": "demo", "max_tokens": 99},
    "/v1/responses": {"input": MESSAGES},
    "/v1/chat/interactive": {"prompt": MESSAGES},
    "/generate": {"prompt": "Hello there, what is new?"},
}


class EchoEngine(BurstEngine):
    """A reply is the prompt, one token each step; all replies end by length."""

    limits = RequestLimits(256, 2**16)

    def step(self) -> list[StepOutput]:
        outputs = []
        for name, tokens in list(self._left.items()):
            token = tokens.popleft()
            outputs.append(StepOutput(name, (token,), None if tokens else FinishReason.LENGTH))
            if not tokens:
                del self._left[name]
        return outputs


class Profile:
    """Counts calls of our functions in all threads that start after ``install``, while ``on``."""

    def __init__(self) -> None:
        self.on = False
        self.calls: Counter[str] = Counter()
        self.generators: set[str] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if not self.on or event != "call" or not code.co_filename.startswith(OURS):
            return
        name = f"{Path(code.co_filename).stem}.{code.co_qualname}"
        self.calls[name] += 1
        if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR) and code.co_name != "<genexpr>":
            self.generators.add(name)


@pytest.fixture(scope="module")
def profile() -> Iterator[Profile]:
    counted, before = Profile(), sys.getprofile()
    threading.setprofile(counted)
    yield counted
    threading.setprofile(before)


@pytest.fixture(scope="module")
def app(profile: Profile) -> Iterator[Any]:
    tokenizer = Tokenizer.load(bundled_model())
    template = ChatTemplate.resolve(None, tokenizer, "LlamaForCausalLM")
    engine = AsyncEngine(Generator(Supervisor(EchoEngine), tokenizer, template, {}, frozenset({2})))
    service = ModelService(engine, "demo", 8)
    yield create_app(service, ServerConfig())
    service.close()
    engine.close()


async def ask(app: Any, path: str, body: dict[str, Any], seen: Any = None) -> list[bytes]:
    """The bodies that the application sends for a request; ``seen`` is called before each."""
    content = json.dumps({**body, "stream": True}).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    bodies: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            if seen is not None:
                seen()
            bodies.append(message["body"])

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "root_path": "",
    }
    await app(scope, receive, send)
    return bodies


def test_calls_until_the_engine_sees_a_chat_request(
    app: Any, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all threads: middleware, protocol, template, tokenizer, engine thread, until the engine's process gets it."""
    send = RemoteEngine._send

    def sends(engine: RemoteEngine, what: str, about: Any) -> None:
        profile.on = profile.on and what != "add"
        send(engine, what, about)

    monkeypatch.setattr(RemoteEngine, "_send", sends)
    asyncio.run(ask(app, "/v1/chat/completions", {"messages": MESSAGES}))
    counts = [calls_of_a_chat_request(app, profile) for _ in range(3)]
    assert 50 < min(counts) <= MAX_CALLS, "more often than not the idle engine thread does not look for work meanwhile"


def calls_of_a_chat_request(app: Any, profile: Profile) -> int:
    async def counted() -> list[bytes]:
        profile.calls.clear()
        profile.on = True
        sys.setprofile(profile)
        return await ask(app, "/v1/chat/completions", {"messages": MESSAGES, "temperature": 0.7, "max_tokens": 9})

    try:
        bodies = asyncio.run(counted())
    finally:
        sys.setprofile(None)
    assert bodies[-2] == b"data: [DONE]\n\n"
    assert not profile.on, "the request reached the engine"
    return profile.calls.total()


@pytest.mark.parametrize("path", STREAMS)
def test_generators_that_a_streamed_token_passes(app: Any, profile: Profile, path: str) -> None:
    passed: list[set[str]] = []

    def seen() -> None:
        passed.append(set(profile.generators))
        profile.generators.clear()

    async def counted() -> list[bytes]:
        profile.generators.clear()
        profile.on = True
        sys.setprofile(profile)
        return await ask(app, path, STREAMS[path], seen)

    try:
        bodies = asyncio.run(counted())
    finally:
        sys.setprofile(None)
        profile.on = False
    assert len(bodies) > 8
    times = Counter(name for names in passed for name in names)
    for_each_token = {name for name, count in times.items() if count > 2}  # others begin and end the stream
    assert "async_engine.AsyncEngine.generate_all" in for_each_token
    assert len(for_each_token) <= MAX_GENERATORS, for_each_token
