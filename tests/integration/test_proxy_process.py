"""Two servers behind a proxy, as processes and under load, one of which dies, hangs, or is told to end."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from tests.integration.cluster import RUNNING, Cluster

STREAMS, WHOLES = 30, 6


@dataclass
class Stream:
    """A reply as its client saw it; ``begun`` tells whether it had a token when the server was struck."""

    text: str = ""
    error: str | None = None
    done: bool = False
    begun: bool = False
    late: list[str] = field(default_factory=list)
    """What came after an error."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("logs"), stack)


def ready(cluster: Cluster) -> tuple[str, str]:
    """The addresses of two servers that have compiled what the requests need."""
    return cluster.complete(lambda: asyncio.run(load(cluster, lambda: None)))


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[str]:
    """What the model says, undisturbed."""
    ready(cluster)
    streams, _ = asyncio.run(load(cluster, lambda: None))
    assert all(seen.done for seen in streams), streams
    return [seen.text for seen in streams]


def request(number: int, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {number % 9 + 1} times {number % 7 + 2}?"}]
    return {"messages": messages, "temperature": 0, "max_tokens": 300, "ignore_eos": True, "stream": stream}


async def follow(http: httpx2.AsyncClient, number: int, seen: Stream) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=request(number, stream=True)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if seen.error is not None and line:
                seen.late.append(line)
            elif line == "data: [DONE]":
                seen.done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                seen.error = event["error"]["message"] if "error" in event else None
                if seen.error is None:
                    seen.text += event["choices"][0]["delta"].get("content") or ""


async def whole(http: httpx2.AsyncClient, number: int) -> str:
    response = await http.post("/v1/chat/completions", json=request(number, stream=False))
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


async def load(cluster: Cluster, strike: Callable[[], None]) -> tuple[list[Stream], list[str]]:
    """All requests at once; ``strike`` comes when each server streams and many streams have not begun."""
    streams = [Stream() for _ in range(STREAMS)]
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=cluster.url, headers=cluster.headers, timeout=240, limits=limits) as http:
        following = [follow(http, number, seen) for number, seen in enumerate(streams)]
        waiting = asyncio.gather(*following, *(whole(http, number) for number in range(WHOLES)))
        while sum(bool(seen.text) and not seen.done for seen in streams) <= RUNNING and not waiting.done():
            await asyncio.sleep(0.005)
        strike()
        for seen in streams:
            seen.begun = bool(seen.text)
        _, texts = (found := await asyncio.wait_for(waiting, 240))[:STREAMS], found[STREAMS:]
    return streams, [text for text in texts if text is not None]


def none_is_lost(streams: Sequence[Stream], texts: Sequence[str], expected: Sequence[str]) -> int:
    """Every reply is whole, or had begun and ended with an error; how many these are."""
    assert list(texts) == list(expected[:WHOLES])
    for seen, text in zip(streams, expected, strict=True):
        assert seen.done != (seen.error is not None), "each ends in one way"
        assert seen.text == text if seen.done else seen.text and text.startswith(seen.text)
        assert not seen.late
    broken = [seen for seen in streams if seen.error is not None]
    assert sum(not seen.begun for seen in streams) > RUNNING, "many had not begun"
    return len(broken)


@pytest.mark.slow
def test_a_server_that_dies_loses_no_request_before_its_first_token(cluster: Cluster, expected: list[str]) -> None:
    dead, other = ready(cluster)
    struck = cluster.servers.pop(dead)
    assert 0 < none_is_lost(*asyncio.run(load(cluster, struck.kill)), expected) <= RUNNING
    assert cluster.moved(dead) > RUNNING
    assert cluster.comes_to({other})


@pytest.mark.slow
def test_neither_does_one_that_hangs(cluster: Cluster, expected: list[str]) -> None:
    hung, other = ready(cluster)
    struck = cluster.servers[hung]
    broken = none_is_lost(*asyncio.run(load(cluster, lambda: struck.send_signal(signal.SIGSTOP))), expected)
    assert 0 < broken <= RUNNING
    assert cluster.moved(hung) > RUNNING
    assert cluster.comes_to({other})
    struck.send_signal(signal.SIGCONT)
    assert cluster.comes_to({hung, other}), "it is taken back"


@pytest.mark.slow
def test_one_that_is_told_to_end_loses_nothing(cluster: Cluster, expected: list[str]) -> None:
    ended, other = ready(cluster)
    struck = cluster.servers.pop(ended)
    assert none_is_lost(*asyncio.run(load(cluster, struck.terminate)), expected) == 0
    assert struck.wait(60) == -signal.SIGTERM
    assert cluster.comes_to({other})
    assert ended not in cluster.status(), "it took its leave"
    cluster.proxy.terminate()
    assert cluster.proxy.wait(60) == -signal.SIGTERM
