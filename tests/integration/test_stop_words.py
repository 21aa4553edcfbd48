"""2,000 requests with stop words, over every text route, through a proxy with two servers: none is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from tests.integration.cluster import Cluster

pytestmark = pytest.mark.slow

REQUESTS, AT_A_TIME = 2000, 16
QUESTION = "How do I start a chat?"
MESSAGES = [{"role": "user", "content": QUESTION}]
LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
OPENAI = {**LIMITS, "stop": "chat"}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**OPENAI, "messages": MESSAGES},
    "/v1/completions": {**OPENAI, "prompt": QUESTION},
    "/v1/messages": {**LIMITS, "messages": MESSAGES, "model": "jaxdeploy-demo", "stop_sequences": ["chat"]},
    "/v1/chat/interactive": {"prompt": QUESTION, "temperature": 0, "request_output_len": 40, "stop": "chat"},
    "/generate": {**OPENAI, "prompt": QUESTION},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("logs"), stack)


async def answers(cluster: Cluster) -> list[tuple[str, int, str]]:
    """Route, status and body of every answer."""
    room = asyncio.Semaphore(AT_A_TIME)
    kinds = itertools.islice(itertools.cycle(itertools.product(ROUTES.items(), (False, True))), REQUESTS)
    async with httpx2.AsyncClient(base_url=cluster.url, headers=cluster.headers, timeout=240) as http:

        async def ask(path: str, body: dict[str, Any]) -> tuple[str, int, str]:
            async with room:
                response = await http.post(path, json=body)
                return path, response.status_code, response.text

        return await asyncio.gather(*(ask(path, {**body, "stream": stream}) for (path, body), stream in kinds))


def test_none_is_lost_and_both_servers_live(cluster: Cluster) -> None:
    both = set(cluster.complete())
    for path, status, body in asyncio.run(answers(cluster)):
        assert status == 200, (path, body)
        assert '"error"' not in body, (path, body)
    assert cluster.comes_to(both)
    assert not any(cluster.moved(url) for url in both)
    assert all(server.poll() is None for server in cluster.servers.values())
