"""Stop words on every text route, while the engine's process is ahead of the server: no request is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_server_process import answers, free_port
from tests.served import until

REQUESTS = int(os.environ.get("STOP_WORD_REQUESTS", "2000"))
CLIENTS = 12
QUESTIONS = ("What is 6 times 7?", "How do I start a chat?", "What does --tp do?", "Tell me what you can do.")
LENGTH = 40
DELAYED = """
import time
from jaxdeploy.cli import program
from jaxdeploy.engine.front.generator import Generator

step = Generator.step

def late(self):
    time.sleep(0.03)
    return step(self)

Generator.step = late
program()
"""
"""The program whose engine thread is slow, so that outputs of several steps wait for it."""


@dataclass(frozen=True)
class Route:
    """A text route.

    ask: fields of a request for a question.
    stop: the field for stop words.
    text: the text of a whole reply.
    piece: the text of an event of a stream.
    last: whether an event is the last.
    """

    path: str
    ask: Callable[[str], dict[str, Any]]
    stop: str | None
    text: Callable[[Any], str]
    piece: Callable[[Any], str]
    last: Callable[[Any], bool]


def said(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def ended(event: Any) -> bool:
    return bool(event == "[DONE]")


def output_text(reply: Any) -> str:
    return "".join(part["text"] for item in reply["output"] for part in item["content"])


ROUTES = (
    Route(
        "/v1/chat/completions",
        lambda question: {"messages": said(question), "max_tokens": LENGTH},
        "stop",
        lambda reply: reply["choices"][0]["message"]["content"],
        lambda event: event["choices"][0]["delta"].get("content") or "",
        ended,
    ),
    Route(
        "/v1/completions",
        lambda question: {"prompt": question, "max_tokens": LENGTH},
        "stop",
        lambda reply: reply["choices"][0]["text"],
        lambda event: event["choices"][0]["text"],
        ended,
    ),
    Route(
        "/v1/messages",
        lambda question: {"messages": said(question), "max_tokens": LENGTH},
        "stop_sequences",
        lambda reply: "".join(block["text"] for block in reply["content"]),
        lambda event: event["delta"].get("text", "") if event["type"] == "content_block_delta" else "",
        lambda event: event["type"] == "message_stop",
    ),
    Route(
        "/v1/responses",
        lambda question: {"input": question, "max_output_tokens": LENGTH},
        None,
        output_text,
        lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
        lambda event: event["type"] in ("response.completed", "response.incomplete"),
    ),
    Route(
        "/generate",
        lambda question: {"prompt": question, "max_tokens": LENGTH},
        "stop",
        lambda reply: reply["text"],
        lambda event: event["text"],
        ended,
    ),
    Route(
        "/v1/chat/interactive",
        lambda question: {"prompt": question, "request_output_len": LENGTH},
        "stop",
        lambda reply: reply["text"],
        lambda event: event["text"],
        lambda event: event["finish_reason"] is not None,
    ),
)


@contextmanager
def running(log: Path, program: str, *flags: str) -> Iterator[str]:
    """A program of ``jaxdeploy serve`` with a slow engine thread; its address. It must be alive at the end."""
    port = free_port()
    command = [sys.executable, "-c", DELAYED, "serve", program, "--server-name", "127.0.0.1"]
    command += ["--server-port", str(port), *flags]
    with log.open("wb") as lines, subprocess.Popen(command, stderr=lines) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            assert until(lambda: listens(port) or process.poll() is not None, 400, pause=0.2), "it did not start"
            yield url
            assert process.poll() is None, log.read_text()
            assert answers(url), "/health is red"
        finally:
            process.kill()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def events(lines: AsyncIterator[str]) -> AsyncIterator[Any]:
    """The events of a stream, whatever its framing."""
    async for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            yield data
        elif data.startswith("{"):
            yield json.loads(data)


async def reply(http: httpx2.AsyncClient, route: Route, body: Mapping[str, Any], *, stream: bool) -> str:
    """The text of a whole reply. Raises if it is not complete."""
    asked = {**body, "model": MODEL, "temperature": 0}
    if not stream:
        answer = await http.post(route.path, json=asked)
        assert answer.status_code == 200, answer.text
        return route.text(answer.json())
    text, last = "", False
    async with http.stream("POST", route.path, json={**asked, "stream": True}) as answer:
        assert answer.status_code == 200
        async for event in events(answer.aiter_lines()):
            last = last or route.last(event)
            text += "" if event == "[DONE]" else route.piece(event)
    assert last, f"a stream of {route.path} has no end"
    return text


MODEL = "jaxdeploy-demo"


def stop_word(text: str, mixed: random.Random) -> str:
    """Some characters from the middle of a reply, rarely those of one token."""
    begin = mixed.randrange(1, max(2, len(text) - 4))
    return text[begin : begin + mixed.randrange(2, 5)]


async def ask_all(url: str, count: int) -> int:
    """Send ``count`` requests with different stop words and return how many replies were right."""
    async with httpx2.AsyncClient(base_url=url, timeout=300) as http:
        pairs = [(route, question) for route in ROUTES for question in QUESTIONS]
        whole = {
            (route.path, question): await reply(http, route, route.ask(question), stream=False)
            for route, question in pairs
        }
        numbers = iter(range(count))
        right = 0

        async def client() -> None:
            nonlocal right
            for number in numbers:
                mixed = random.Random(number)
                route, question = pairs[number % len(pairs)]
                text, body = whole[route.path, question], route.ask(question)
                if route.stop is not None:
                    word = stop_word(text, mixed)
                    body[route.stop], text = [word], text[: text.index(word)]
                assert await reply(http, route, body, stream=mixed.random() < 0.5) == text
                right += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return right


SMALL = ("--max-batch-size", "8", "--session-len", "256", "--no-warmup")


@pytest.mark.slow
def test_no_request_is_lost(tmp_path: Path) -> None:
    with running(tmp_path / "log", "api_server", *SMALL) as url:
        assert asyncio.run(ask_all(url, REQUESTS)) == REQUESTS


@pytest.mark.slow
def test_no_request_is_lost_behind_a_proxy(tmp_path: Path) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(running(tmp_path / "proxy", "proxy"))
        for name in ("one", "two"):
            stack.enter_context(running(tmp_path / name, "api_server", *SMALL, "--proxy-url", proxy))
        # A node registers after it has begun to listen.
        assert until(lambda: len(httpx2.get(f"{proxy}/nodes/status").json()) == 2, 60, pause=0.2)
        assert asyncio.run(ask_all(proxy, REQUESTS)) == REQUESTS
