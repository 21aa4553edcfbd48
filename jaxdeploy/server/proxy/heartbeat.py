"""Asks each node at intervals for its health and its models, and gives up the requests of a silent one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx2

from jaxdeploy.config import ProxyConfig
from jaxdeploy.server.proxy.cards import read_cards
from jaxdeploy.server.proxy.fetching import IDENTITY, fetch, read_json
from jaxdeploy.server.proxy.metrics import ProxyMetrics
from jaxdeploy.server.proxy.nodes import Node, Nodes

HEALTHY = (200, 404)
"""Statuses of ``/health`` of a healthy node; 404: a server of OpenAI's API without this route."""
MAX_HEALTH = 64 * 1024
MAX_MODELS = 1024**2
"""Bytes of an answer to ``/health`` and ``/v1/models``."""
RECENT_SECONDS = 60.0
RARER = 5
"""Intervals between two looks at a node that was not well for ``RECENT_SECONDS``."""


class UnwellError(Exception):
    """A node answers, and cannot be used."""


class Heartbeats:
    """One task for each node, from the moment it is watched until it is removed and has no requests left."""

    def __init__(self, client: httpx2.AsyncClient, config: ProxyConfig, nodes: Nodes, metrics: ProxyMetrics) -> None:
        self._client = client
        self._nodes = nodes
        self._metrics = metrics
        self._interval = config.heartbeat_interval
        self._patience = config.heartbeat_timeout
        self._tasks: dict[Node, asyncio.Task[None]] = {}

    async def watch(self, node: Node) -> None:
        """Look at ``node`` now, and from now on."""
        if node not in self._tasks:
            self._tasks[node] = asyncio.create_task(self._watch(node))
            self._tasks[node].add_done_callback(lambda _: self._tasks.pop(node))
        await self._look(node)

    async def accepts(self, url: str, key: str) -> bool:
        """Whether the server at ``url`` is well and takes ``key``."""
        try:
            async with asyncio.timeout(self._patience):
                await self._models(Node(url, key))
        except Exception:  # whatever is wrong with it, the answer is no
            return False
        return True

    async def close(self) -> None:
        """Stop all tasks."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, node: Node) -> None:
        while not node.removed or node.exchanges:
            try:
                async with asyncio.timeout(self._pause(node)):
                    await node.look_now.wait()
            except TimeoutError:
                pass
            node.look_now.clear()
            await self._look(node)
            if node.expired:
                self._nodes.remove(node.url)
        if self._nodes.get(node.url) is None:
            self._metrics.forget(node.url)

    def _pause(self, node: Node) -> float:
        recent = time.monotonic() - max(node.seen or 0.0, node.registered) < RECENT_SECONDS
        return self._interval if recent else self._interval * RARER

    async def _look(self, node: Node) -> None:
        try:
            async with asyncio.timeout(self._patience):
                node.found_well(await self._models(node))
        except TimeoutError:
            node.found_down(f"it has not answered for {self._patience:g} s")
        except Exception as error:  # whatever it is, the next look may find it well
            node.found_down(str(error) or type(error).__name__)
        if not node.up:
            node.give_up_silent(self._patience)

    async def _models(self, node: Node) -> dict[str, dict[str, Any]]:
        """What ``node`` serves. Raises ``UnwellError``, ``BadAnswerError``, ``httpx2.TransportError``."""
        status, body = await self._get(node, "/health", MAX_HEALTH)
        if status not in HEALTHY:
            raise UnwellError(f"/health answers {status}{_message(body)}")
        status, body = await self._get(node, "/v1/models", MAX_MODELS)
        if status == 401:
            raise UnwellError("it asks for a key; register it with its api_key, or name it with --nodes --node-api-key")
        if status != 200:
            raise UnwellError(f"/v1/models answers {status} and no list of models")
        return read_cards(body)

    async def _get(self, node: Node, path: str, most: int) -> tuple[int, bytes]:
        request = self._client.build_request("GET", node.url + path, headers=node.headers | IDENTITY)
        return await fetch(self._client, request, most)


def _message(body: bytes) -> str:
    try:
        return f": {read_json(body)['error']['message']}"
    except (ValueError, TypeError, KeyError):
        return ""
