"""Hundreds of clients at once, many of whom leave in the middle: nothing is left, and nobody gets another's words."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_server_process import started
from tests.served import until

CLIENTS = 200
SECONDS = 180
LEAVING = 0.4
"""Share of the requests whose client leaves before their end."""

QUESTIONS = [f"What is {a} times {b}?" for a in range(2, 8) for b in range(3, 7)]


def request(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24, "stream": True}


async def answer(client: httpx2.AsyncClient, question: str, leaves_after: int | None = None) -> str | None:
    """The whole reply; ``None`` if the client left after so many events, or was turned away."""
    async with client.stream("POST", "/v1/chat/completions", json=request(question)) as response:
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers["retry-after"]) * random.random())
            return None
        assert response.status_code == 200
        text, seen, done = "", 0, False
        async for line in response.aiter_lines():
            seen += line.startswith("data: ")
            if leaves_after is not None and seen > leaves_after:
                return None
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content") or ""
            done = done or line == "data: [DONE]"
        assert done
        return text


async def one_client(client: httpx2.AsyncClient, alone: dict[str, str], until_: float, mixed: random.Random) -> int:
    """Ask again and again; how many replies were complete, each checked."""
    complete = 0
    while time.monotonic() < until_:
        question = mixed.choice(QUESTIONS)
        leaves = mixed.randrange(20) if mixed.random() < LEAVING else None
        text = await answer(client, question, leaves)
        if text is not None:
            assert text == alone[question]
            complete += 1
    return complete


async def crowd(url: str, alone: dict[str, str], seconds: float) -> int:
    """All clients at once; how many replies were complete."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        end = time.monotonic() + seconds
        return sum(await asyncio.gather(*(one_client(client, alone, end, random.Random(n)) for n in range(CLIENTS))))


async def one_by_one(url: str) -> dict[str, str]:
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        found = {question: await answer(client, question) for question in QUESTIONS}
    return {question: text for question, text in found.items() if text is not None}


def measured(url: str) -> dict[str, float]:
    """The metrics by name."""
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in pairs}


def idle(url: str) -> bool:
    found = measured(url)
    return not (
        found["jaxdeploy:num_requests_running"]
        or found["jaxdeploy:num_requests_waiting"]
        or found["jaxdeploy:kv_cache_usage_perc"]
    )


@pytest.mark.slow
def test_nothing_is_left_of_a_crowd(tmp_path: Path) -> None:
    with started(tmp_path / "log", "--max-batch-size", "32", "--session-len", "256") as (running, url):
        alone = asyncio.run(one_by_one(url))
        assert len(alone) == len(QUESTIONS)
        asyncio.run(crowd(url, alone, 10))  # what a crowd needs once: connections, buffers
        assert until(lambda: idle(url))
        before = measured(url)
        complete = asyncio.run(crowd(url, alone, SECONDS))
        assert complete > CLIENTS
        assert until(lambda: idle(url))
        assert until(lambda: measured(url)["jaxdeploy:server_tasks"] <= before["jaxdeploy:server_tasks"])
        after = measured(url)
        assert after["process_resident_memory_bytes"] < 1.1 * before["process_resident_memory_bytes"]
        assert after["process_open_fds"] <= before["process_open_fds"]
        assert running.poll() is None
