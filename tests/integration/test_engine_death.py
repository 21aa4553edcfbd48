"""The engine's process is killed under load: the server serves again, until the deaths come too fast."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_server_load import measured
from tests.integration.test_server_process import answers, started
from tests.served import until

KILLS = int(os.environ.get("ENGINE_KILLS", "10"))
SERVING = float(os.environ.get("ENGINE_KILLS_SERVING", "25"))
"""Seconds for which the server has served again before the next kill."""
CLIENTS = 12
TIMEOUT = 300.0
"""Seconds that a request may take, restart included."""


class Load:
    """Clients in a thread that ask again and again; ``outcomes`` counts how their requests ended."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._leaving = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wait until every request has ended."""
        self._leaving = True
        self._thread.join(2 * TIMEOUT)
        assert not self._thread.is_alive(), "a request hangs"

    async def _run(self) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=self._url, timeout=TIMEOUT, limits=limits) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(CLIENTS)))

    async def _client(self, http: httpx2.AsyncClient, number: int) -> None:
        mixed = random.Random(number)
        while not self._leaving:
            asked: dict[str, Any] = {
                "messages": [
                    {"role": "user", "content": f"What is {mixed.randrange(99)} times {mixed.randrange(99)}?"}
                ],
                "max_tokens": mixed.choice((4, 30, 80)),
                "ignore_eos": True,
            }
            try:
                outcome = await (self._stream(http, asked) if number % 2 else self._whole(http, asked))
            except httpx2.TimeoutException:
                outcome = "hung"
            except httpx2.TransportError as error:  # the server has ended
                outcome = f"cut off: {error!r}"
                await asyncio.sleep(0.2)
            self.outcomes[outcome] += 1

    async def _stream(self, http: httpx2.AsyncClient, asked: dict[str, Any]) -> str:
        begun = False
        async with http.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as reply:
            if reply.status_code != 200:
                return await self._refused(reply)
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return "complete"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "broken off" if begun else f"lost: {event['error']['message']}"
                    begun = begun or bool(event["choices"][0]["delta"].get("content"))
        return "cut off without an event"

    async def _whole(self, http: httpx2.AsyncClient, asked: dict[str, Any]) -> str:
        reply = await http.post("/v1/chat/completions", json=asked)
        return "complete" if reply.status_code == 200 else await self._refused(reply)

    async def _refused(self, reply: httpx2.Response) -> str:
        """A request that had started says so; a stream may be refused with its first token on the way."""
        await reply.aread()
        if reply.status_code == 503 and "failed while the request ran" in reply.text:
            return "broken off"
        return f"lost: {reply.status_code} {reply.text}"


def engine_of(server: subprocess.Popen[bytes]) -> int | None:
    """The pid of the engine's process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server.pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except (OSError, IndexError):
            continue
    return None


def kill_engine(server: subprocess.Popen[bytes]) -> None:
    pid = engine_of(server)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_ten_kills_under_load_and_three_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log, "--max-batch-size", "8", "--session-len", "256", "--no-warmup") as (running, url):
        load = Load(url)
        for number in range(KILLS):
            time.sleep(SERVING)
            before = load.outcomes["complete"]
            kill_engine(running)
            assert until(lambda: not answers(url), 10), "it has not noticed"
            health = httpx2.get(f"{url}/health", timeout=60)
            assert "is being restarted: the engine's process ended with exit code -9" in health.text
            assert until(lambda: answers(url), 600, pause=0.2), f"it does not serve after kill {number + 1}"
            enough = before + CLIENTS
            assert until(lambda enough=enough: load.outcomes["complete"] > enough, 300)  # type: ignore[misc]
        load.stop()
        assert {*load.outcomes} <= {"complete", "broken off"}, load.outcomes
        assert load.outcomes["broken off"] <= KILLS * CLIENTS
        assert measured(url)["jaxdeploy:engine_restarts_total"] == KILLS
        time.sleep(SERVING)
        load = Load(url)
        for _ in range(3):
            kill_engine(running)
            until(lambda: running.poll() is not None or engine_of(running) is not None, 30)
            until(lambda: running.poll() is not None or answers(url), 600, pause=0.2)
        assert running.wait(90) == 1
        load.stop()
        assert not any("hung" in outcome for outcome in load.outcomes), load.outcomes
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: the engine is not restarted: it failed 3 times in a row; the last time: ")
    assert last.endswith("the engine's process ended with exit code -9")
