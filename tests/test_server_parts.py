"""Parts of the server that a client sees only on a bad day."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from jaxdeploy.cli import command_parser
from jaxdeploy.cli.flags import read_settings
from jaxdeploy.cli.serve import ServeOptions
from jaxdeploy.config import EngineConfig, ProxyConfig, ServerConfig
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import FinishReason, SpeculationCounts, TextOutput
from jaxdeploy.server.logs import JsonFormat, TextFormat, name_request, set_up_logging
from jaxdeploy.server.metrics import Metrics
from jaxdeploy.server.protocol.stream_event import StreamEvent
from jaxdeploy.server.protocol.usage import Usage
from jaxdeploy.server.request_log import RequestLog
from jaxdeploy.server.sessions import KEPT, SessionBusyError, Sessions
from jaxdeploy.server.streaming import NAMED_PING, event_stream, line_stream, named_event_stream
from jaxdeploy.server.watchdog import Watchdog


class Chunk(BaseModel):
    number: int


async def chunks(*numbers: int, pause: float = 0.0, fault: Exception | None = None) -> AsyncGenerator[Chunk]:
    for number in numbers:
        await asyncio.sleep(pause)
        yield Chunk(number=number)
    if fault is not None:
        raise fault


def body_of(response: StreamingResponse) -> str:
    return asyncio.run(sent_by(response))


async def sent_by(response: StreamingResponse) -> str:
    sent: list[bytes] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def stays() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    await response({"type": "http"}, stays, send)
    return b"".join(sent).decode()


def test_events_end_with_done() -> None:
    assert body_of(event_stream(chunks(1, 2))) == 'data: {"number":1}\n\ndata: {"number":2}\n\ndata: [DONE]\n\n'


def test_silence_is_filled_with_pings() -> None:
    body = body_of(event_stream(chunks(1, pause=0.2), ping_seconds=0.05))
    assert body.startswith(": ping\n\n: ping\n\n")
    assert body.endswith('data: {"number":1}\n\ndata: [DONE]\n\n')


def test_a_failure_on_the_way_is_the_last_event() -> None:
    body = body_of(event_stream(chunks(1, fault=RequestError("n=1 was wrong; mend it"))))
    *_, last = body.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "n=1 was wrong; mend it"
    hidden = body_of(event_stream(chunks(1, fault=OSError("/secret/path"))))
    assert "/secret/path" not in hidden
    assert "the server failed" in hidden


def test_events_with_names() -> None:
    async def events() -> AsyncGenerator[StreamEvent]:
        await asyncio.sleep(0.1)
        yield StreamEvent.of("message_start", index=3)
        raise RequestError("x")

    body = body_of(named_event_stream(events(), ping=NAMED_PING, ping_seconds=0.04))
    names = [line.removeprefix("event: ") for line in body.splitlines() if line.startswith("event: ")]
    assert names[0] == "ping"
    assert names[-2:] == ["message_start", "error"]
    assert 'data: {"type":"message_start","index":3}' in body
    assert body_of(named_event_stream(events(), ping_seconds=0.04)).startswith(": ping\n\n")


def test_lines_fail_before_the_first_one_or_after() -> None:
    async def first_line() -> None:
        await line_stream(chunks(fault=RequestError("x")))

    with pytest.raises(RequestError):
        asyncio.run(first_line())

    async def lines() -> list[str]:
        response = await line_stream(chunks(1, 2, fault=RequestError("x; y")))
        return (await sent_by(response)).splitlines()

    *good, bad = asyncio.run(lines())
    assert [json.loads(line) for line in good] == [{"number": 1}, {"number": 2}]
    assert json.loads(bad)["error"]["message"] == "x; y"


def test_an_engine_that_has_work_and_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watchdog = Watchdog()
    assert watchdog.stalled_for(EngineStats(running=1, steps=5)) == 0
    now = 30.0
    assert watchdog.stalled_for(EngineStats(running=1, steps=5)) == 30
    assert watchdog.stalled_for(EngineStats(steps=5)) == 0, "it has nothing to do"
    now = 90.0
    assert watchdog.stalled_for(EngineStats(waiting=1, steps=6)) == 0
    now = 100.0
    assert watchdog.stalled_for(EngineStats(waiting=1, steps=6)) == 10
    assert watchdog.stalled_for(EngineStats(steps=7)) == 0
    now = 500.0
    assert watchdog.stalled_for(EngineStats(waiting=1, steps=7)) == 0, (
        "it was idle, and its work may have come just now"
    )
    now = 570.0
    assert watchdog.stalled_for(EngineStats(waiting=1, steps=7)) == 70


def test_the_conversations_of_longest_ago_are_forgotten() -> None:
    sessions = Sessions()
    for session_id in range(KEPT + 1):
        with sessions.turn(("", session_id), "r") as conversation:
            conversation.tokens = session_id + 1
    with sessions.turn(("", 0), "r") as conversation:
        assert conversation.tokens == 0
        assert sessions.running(("", 0)) == "r"
        assert sessions.running(("another key", 0)) is None
        with pytest.raises(SessionBusyError, match="session_id=0 has a reply that runs"), sessions.turn(("", 0), "s"):
            pass
    with sessions.turn(("", KEPT), "r") as conversation:
        assert conversation.tokens == KEPT + 1


def test_lines_of_the_log() -> None:
    record = logging.LogRecord("jaxdeploy.server", logging.INFO, "", 1, "GET %s", ("/x",), None)
    record.request_id, record.status = "abc", 200
    assert TextFormat().format(record).endswith("INFO GET /x request_id=abc status=200")
    line = json.loads(JsonFormat().format(record))
    assert (line["message"], line["status"], line["level"]) == ("GET /x", 200, "INFO")
    with pytest.raises(ConfigError, match="log_level='LOUD'"):
        set_up_logging("LOUD", "text")


def test_lines_that_a_request_logs_have_its_id(caplog: pytest.LogCaptureFixture) -> None:
    """A fault in a route is logged by a handler that does not know the request."""

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        logging.getLogger("jaxdeploy").error("a request failed")

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nothing is received or sent")

    caplog.handler.addFilter(name_request)
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"x-request-id", b"abc")]}
    asyncio.run(RequestLog(failing)(scope, nothing, nothing))
    caplog.handler.removeFilter(name_request)
    assert [vars(record)["request_id"] for record in caplog.records if record.message == "a request failed"] == ["abc"]


CONFIGS = Path(__file__).parents[1] / "configs/serve"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_ready_configs(path: Path) -> None:
    args = command_parser("serve").read(["api_server", "--config", str(path)])
    _, *given = read_settings(args, ServeOptions, ServerConfig, ProxyConfig, EngineConfig)
    for cls, values in zip((ServerConfig, ProxyConfig, EngineConfig), given, strict=True):
        cls(**values)


def test_the_dashboard_shows_what_there_is() -> None:
    shown = set(re.findall(r"jaxdeploy:(\w+)", (CONFIGS / "grafana.json").read_text()))

    async def text() -> str:
        metrics = Metrics("m")
        reply, output = Reply(), TextOutput("r", "a", (1, 2), (), FinishReason.STOP)
        reply.add(output)
        metrics.note(reply, output)
        metrics.take(EngineStats(prompt_tokens=5))
        return metrics.text()

    offered = set(re.findall(r"^jaxdeploy:(\w+)", asyncio.run(text()), re.MULTILINE))
    assert shown - offered == set()


def test_how_speculative_decoding_went() -> None:
    counts = SpeculationCounts(rounds=4, drafts=12, accepted=6)
    details = Usage.of(5, 11, 0, counts).completion_tokens_details
    assert details is not None
    assert details.model_dump() == {
        "accepted_prediction_tokens": 6,
        "rejected_prediction_tokens": 6,
        "acceptance_rate": 0.5,
        "mean_accepted_length": 2.5,
    }
    assert Usage.of(5, 11, 0).completion_tokens_details is None

    async def scraped() -> str:
        metrics = Metrics("m")
        metrics.take(EngineStats(speculation=counts))
        metrics.take(EngineStats(speculation=counts.plus(3, 3)))
        return metrics.text()

    text = asyncio.run(scraped())
    for name, value in (
        ("num_drafts_total", 5),
        ("num_draft_tokens_total", 15),
        ("num_accepted_tokens_total", 9),
        ("acceptance_rate", 0.6),
        ("mean_accepted_length", 2.8),
    ):
        assert f'jaxdeploy:spec_decode_{name}{{model_name="m"}} {float(value)}' in text
