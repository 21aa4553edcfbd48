"""Looking after nodes: whether they answer, what they serve, and when to give up what is with them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from jaxdeploy.config import ProxyConfig
from jaxdeploy.server.proxy.nodes import Node

HEALTHY = (200, 404)
"""What ``/health`` answers where all is well; 404: a server of OpenAI's API that has no such route."""


class UnwellError(Exception):
    """A node answers, and not as it should."""


class Heartbeats:
    """One task for each node, from the moment it is watched until it is removed and has no requests left."""

    def __init__(self, client: httpx2.AsyncClient, config: ProxyConfig) -> None:
        self._client = client
        self._interval = config.heartbeat_interval
        self._patience = config.heartbeat_timeout
        self._tasks: dict[Node, asyncio.Task[None]] = {}

    async def watch(self, node: Node) -> None:
        """Look at ``node`` now, and from now on."""
        if node not in self._tasks:
            self._tasks[node] = asyncio.create_task(self._watch(node))
            self._tasks[node].add_done_callback(lambda _: self._tasks.pop(node))
        await self._look(node)

    async def close(self) -> None:
        """Look at nothing any more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, node: Node) -> None:
        while not node.removed or node.exchanges:
            try:
                async with asyncio.timeout(self._interval):
                    await node.look_now.wait()
            except TimeoutError:
                pass
            node.look_now.clear()
            await self._look(node)

    async def _look(self, node: Node) -> None:
        try:
            async with asyncio.timeout(self._patience):
                node.found_well(await self._models(node.url))
        except TimeoutError:
            node.found_down(f"it has not answered for {self._patience:g} s")
        except Exception as error:  # whatever it is, the next look may find it well
            node.found_down(str(error) or type(error).__name__)
        if not node.up:
            node.give_up_silent(self._patience)

    async def _models(self, url: str) -> dict[str, dict[str, Any]]:
        """What the server at ``url`` serves."""
        health = await self._client.get(f"{url}/health")
        if health.status_code not in HEALTHY:
            raise UnwellError(f"/health answers {health.status_code}{_message(health)}")
        listed = await self._client.get(f"{url}/v1/models")
        if listed.status_code == 401:
            raise UnwellError("it asks for a key; start the proxy with --node-api-key KEY")
        try:
            return {card["id"]: card for card in listed.json()["data"]}
        except (ValueError, TypeError, KeyError):
            raise UnwellError(f"/v1/models answers {listed.status_code} and no list of models") from None


def _message(response: httpx2.Response) -> str:
    try:
        return f": {response.json()['error']['message']}"
    except (ValueError, TypeError, KeyError):
        return ""
