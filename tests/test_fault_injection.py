"""An exception at each named point of a request's life costs that request and no other.

A neighbour streams while the victim is asked; afterwards everything that either held has come back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import httpx2
import pytest

from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.engine.front.engine import Engine
from tests.served import RunningServer, running, until, with_tools

VICTIM = "VICTIM"
"""Its tenant and one of its stop words; its prompt contains it too."""

ASK = [{"role": "user", "content": f"{VICTIM}, what is 6 times 7?"}]
CHAT: dict[str, Any] = {"messages": ASK, "user": VICTIM, "stop": [VICTIM], "temperature": 0, "max_tokens": 5}
EVENTS = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
SCORED = CHAT | {"logprobs": True, "top_logprobs": 2}
FORMED = CHAT | {"response_format": {"type": "regex_schema", "regex_schema": "[a-z]{2,4}"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALLING = CHAT | {"tools": [TOOL], "ignore_eos": True}
REQUIRED = CHAT | {"tools": [TOOL], "tool_choice": "required"}
ECHO = {"prompt": VICTIM, "user": VICTIM, "stop": [VICTIM], "echo": True, "logprobs": 1, "max_tokens": 1}
NEIGHBOUR = {"prompt": "The best thing about", "temperature": 0, "max_tokens": 16, "ignore_eos": True, "stream": True}


@dataclass(frozen=True)
class Point:
    """``where`` it fails, a function or method by its path, and the request that comes there.

    ``early``: the neighbour has passed it, so that the next call is the victim's. Else the arguments name the victim.
    ``harmless``: the reply is complete there, and the victim gets it.
    """

    name: str
    where: str
    body: dict[str, Any] = field(default_factory=lambda: CHAT)
    early: bool = False
    harmless: bool = False
    path: str = "/v1/chat/completions"


SERVER, ENGINE = "jaxdeploy.server", "jaxdeploy.engine"
POINTS = [
    Point("read the body", "starlette.requests:Request.body", early=True),
    Point("validate", "fastapi.dependencies.utils:request_body_to_args", early=True),
    Point("find the model", f"{SERVER}.service:ModelService.check_model", early=True),
    Point("find the adapter", f"{SERVER}.service:ModelService.adapter_of", early=True),
    Point("translate", f"{SERVER}.protocol.chat:ChatRequest.generation", early=True),
    Point("template", "jaxdeploy.chat_template:ChatTemplate.render"),
    Point("tokenise", "jaxdeploy.chat_template:ChatTemplate.encode_text"),
    Point("resolve defaults", f"{ENGINE}.front.generator:resolve", early=True),
    Point("build the grammar", f"{SERVER}.grammars:WorkedGrammars.of", FORMED, early=True),
    Point("build the grammar of calls", f"{SERVER}.conversation:call_grammar", REQUIRED, early=True),
    Point("check limits", f"{ENGINE}.checks:RequestLimits.check", early=True),
    Point("check room", f"{SERVER}.service:ModelService.check_room", early=True),
    Point("watch times", f"{SERVER}.conversation:ParsedReply", early=True),
    Point("note times", f"{SERVER}.metrics:Metrics.note"),
    Point("submit", f"{ENGINE}.front.generator:Generator.submit"),
    Point("make a detokenizer", "jaxdeploy.tokenizer:Tokenizer.detokenizer", early=True),
    Point("make a text stream", f"{ENGINE}.front.generator:TextStream", early=True),
    Point("add", f"{ENGINE}.front.engine:Engine.add"),
    Point("make a sequence", f"{ENGINE}.front.intake:Sequence"),
    Point("lay out settings", f"{ENGINE}.front.intake:settings_of"),
    Point("queue", f"{ENGINE}.scheduling.scheduler:Scheduler.add"),
    Point("compile the grammar", "jaxdeploy.grammar.matcher:Grammars.matcher", FORMED, early=True),
    Point(
        "prepare to read the prompt", f"{ENGINE}.front.prompt_collector:PromptCollector", ECHO, path="/v1/completions"
    ),
    Point("admit", f"{ENGINE}.scheduling.scheduler:Scheduler._admit"),
    Point("find prefixes", f"{ENGINE}.scheduling.prefix_cache:PrefixCache.find"),
    Point("schedule its prompt", f"{ENGINE}.scheduling.scheduler:Scheduler._chunk"),
    Point("note its blocks", f"{ENGINE}.scheduling.prefix_cache:PrefixCache.add"),
    Point("make room", f"{ENGINE}.scheduling.scheduler:Scheduler._make_room"),
    Point("schedule its decode", f"{ENGINE}.scheduling.scheduler:Scheduler._decode"),
    Point("build its row", f"{ENGINE}.device.packing:forbid", SCORED),
    Point("follow the grammar: mask", "jaxdeploy.grammar.matcher:Matcher.allow", FORMED, early=True),
    Point("follow the grammar: take", "jaxdeploy.grammar.matcher:Matcher.take", FORMED, early=True),
    Point(
        "read the prompt", f"{ENGINE}.front.prompt_collector:PromptCollector.add", ECHO, True, path="/v1/completions"
    ),
    Point(
        "put the reading together",
        f"{ENGINE}.front.prompt_collector:PromptCollector.result",
        ECHO,
        True,
        path="/v1/completions",
    ),
    Point("accept tokens", f"{ENGINE}.front.engine:Engine._accepted"),
    Point("append tokens", f"{ENGINE}.scheduling.sequence:Sequence.append"),
    Point("extract log-probabilities", f"{ENGINE}.front.outputs:_logprob", SCORED, early=True),
    Point("make the output", f"{ENGINE}.front.engine:step_output"),
    Point("leave the session", f"{ENGINE}.scheduling.sessions:Sessions.leave", harmless=True),
    Point("make the text", f"{ENGINE}.front.generator:Generator._text_output"),
    Point("detokenise", f"{ENGINE}.front.text_stream:TextStream.push"),
    Point("match stop words", f"{ENGINE}.front.text_stream:TextStream._take"),
    Point("finish the text", f"{ENGINE}.front.text_stream:TextStream.finish"),
    Point("count", "jaxdeploy.generation.reply:Reply.add", ECHO, path="/v1/completions"),
    Point("parse thoughts", f"{SERVER}.parsers.think:Think.push", early=True),
    Point("parse calls", f"{SERVER}.parsers.marked_calls:MarkedCalls.push", CALLING, early=True),
    Point("collect the reply", f"{SERVER}.conversation:ParsedReply.add", early=True),
    Point("put log-probabilities in words", f"{SERVER}.routes.chat:chat_logprobs", SCORED, early=True),
    Point("format an event", f"{SERVER}.routes.chat:_Job._chunk", EVENTS, early=True),
    Point("count usage", f"{SERVER}.protocol.usage:Usage.of", EVENTS, early=True),
    Point("count usage of a whole reply", f"{SERVER}.protocol.usage:Usage.of", early=True),
]


class BoomError(Exception):
    """What no code expects."""


class Armed:
    """Fails once at a point, for the victim. ``names`` are what its requests are called in the engine."""

    def __init__(self, point: Point, monkeypatch: pytest.MonkeyPatch, names: set[str]) -> None:
        module, _, path = point.where.partition(":")
        *outer, name = path.split(".")
        owner = import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        self.fired = False
        self._point, self._names, self._original = point, names, getattr(owner, name)
        static = isinstance(vars(owner)[name], classmethod | staticmethod)
        monkeypatch.setattr(owner, name, staticmethod(self._call) if static else self._function())

    def _function(self) -> Callable[..., Any]:
        return lambda *args, **named: self._call(*args, **named)

    def _call(self, *args: Any, **named: Any) -> Any:
        if not self.fired and (self._point.early or any(map(self._is_victims, (*args, *named.values())))):
            self.fired = True
            raise BoomError(self._point.name)
        return self._original(*args, **named)

    def _is_victims(self, value: Any) -> bool:
        if getattr(value, "request_id", None) in self._names or VICTIM in getattr(value, "_stop_words", ()):
            return True
        inner = getattr(value, "request", None) or getattr(value, "sequence", None) or getattr(value, "_sequence", None)
        if inner is not None:
            return self._is_victims(inner)
        if isinstance(value, dict):
            return any(VICTIM in getattr(key, "request_id", "") for key in value)
        return getattr(value, "tenant", None) == VICTIM or (isinstance(value, str | list) and VICTIM in str(value))


@pytest.fixture(scope="module")
def server(engine: AsyncEngine) -> Iterator[RunningServer]:
    usual = engine.generator.template
    engine.generator.template = with_tools(usual)
    with running(engine, options={"tool_call_parser": "hermes", "reasoning_parser": "think"}) as made:
        yield made
    engine.generator.template = usual


@pytest.fixture(scope="module")
def neighbours_text(server: RunningServer) -> str:
    """What it says undisturbed. The victims' requests run once too, so that their programs are compiled."""
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        for body in (CHAT, SCORED, FORMED, CALLING):
            assert client.post("/v1/chat/completions", json=body).status_code == 200, body
        assert client.post("/v1/completions", json=ECHO).status_code == 200
        return "".join(stream(client))


@pytest.fixture
def names(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the victim's requests are called, as they come."""
    found: set[str] = set()
    submit = engine._submit

    def noting(item: Any, stream: Any) -> None:
        if item.tenant == VICTIM:
            found.add(item.request_id)
        submit(item, stream)

    monkeypatch.setattr(engine, "_submit", noting)
    return found


def stream(client: httpx2.Client) -> Iterator[str]:
    """The neighbour's text as it comes."""
    with client.stream("POST", "/v1/completions", json=NEIGHBOUR) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield from (choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"])


def failed(reply: httpx2.Response) -> bool:
    return reply.status_code >= 400 or '"error":{"message"' in reply.text


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_fault_costs_its_request_alone(
    point: Point,
    server: RunningServer,
    neighbours_text: str,
    names: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "jaxdeploy")
    with httpx2.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as apart:
        neighbour = stream(client)
        text = next(neighbour)
        armed = Armed(point, monkeypatch, names)
        rest = apart.submit(lambda: "".join(neighbour))
        reply = client.post(point.path, json=point.body)
        assert text + rest.result() == neighbours_text
        assert armed.fired, reply.text
        assert failed(reply) != point.harmless, reply.text
        assert until(server.idle)
        assert until(lambda: point.name in caplog.text), "the log names the point"
        assert client.get("/health").status_code == 200
    check_nothing_is_lost(server)


def check_nothing_is_lost(server: RunningServer) -> None:
    generator = server.served.engine.generator
    engine = generator.engine
    assert isinstance(engine, Engine)
    held = (
        generator._streams,
        engine._intake.sequences,
        engine._collectors._collectors,
        engine._intake.compiling,
        engine._failed,
    )
    assert not any((*held, server.served.engine._streams, server.served._running))
    assert engine.scheduler._running.free_slots == 8
    engine.scheduler.blocks.check()
    engine.scheduler.prefixes.check()


@pytest.mark.parametrize(
    "where",
    [
        f"{ENGINE}.device.runner:ModelRunner.write_tokens",
        f"{ENGINE}.front.engine:choose_bucket",
        f"{ENGINE}.front.engine:pack",
        f"{ENGINE}.device.runner:ModelRunner.run",
    ],
)
def test_a_fault_of_a_whole_step_costs_its_requests_and_not_the_engine(
    where: str, server: RunningServer, neighbours_text: str, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was not launched, so the device has all that it had."""
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        armed = Armed(Point("a step", where, early=True), monkeypatch, names)
        reply = client.post("/v1/completions", json=NEIGHBOUR | {"stream": False})
        assert armed.fired, reply.text
        assert reply.status_code == 500
        assert until(server.idle)
        assert "".join(stream(client)) == neighbours_text, "nobody finds what was not computed"
        assert client.get("/health").status_code == 200
    check_nothing_is_lost(server)
