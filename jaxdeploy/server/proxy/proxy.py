"""The parts of a proxy, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from jaxdeploy.config import ProxyConfig
from jaxdeploy.server.proxy.forwarding import Forwarder
from jaxdeploy.server.proxy.heartbeat import Heartbeats
from jaxdeploy.server.proxy.metrics import ProxyMetrics
from jaxdeploy.server.proxy.nodes import Nodes
from jaxdeploy.server.proxy.routing import Router

CONNECT_SECONDS = 5.0
"""Seconds that a node has to accept a connection."""
KEEP_SECONDS = 2.0
"""Seconds for which a connection that is not used is kept: less than servers keep theirs."""


class Proxy:
    """Nodes, who looks after them, and who sends requests there. ``keep_keys``: with the keys that clients bring."""

    def __init__(self, config: ProxyConfig, *, keep_keys: bool) -> None:
        self.nodes = Nodes()
        for url in _addresses(config):
            self.nodes.add(url)
        self.metrics = ProxyMetrics()
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS, read=config.read_timeout),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS),
            trust_env=False,
        )
        # A new connection each time: a server that is about to end still answers on the old ones.
        self._looking = httpx2.AsyncClient(
            timeout=config.heartbeat_timeout,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            headers={"Authorization": f"Bearer {config.node_api_key}"} if config.node_api_key else {},
            trust_env=False,
        )
        self.heartbeats = Heartbeats(self._looking, config)
        router = Router(config.routing_strategy)
        self.forwarder = Forwarder(self.nodes, router, self._http, config, self.metrics, keep_keys=keep_keys)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The time in which nodes are looked after; it begins when all were looked at once."""
        await asyncio.gather(*(self.heartbeats.watch(node) for node in self.nodes))
        try:
            yield
        finally:
            await self.heartbeats.close()
            await self._http.aclose()
            await self._looking.aclose()


def _addresses(config: ProxyConfig) -> list[str]:
    """Those of the nodes to begin with, which may also stand between commas."""
    return [url.strip() for given in config.nodes or () for url in given.split(",") if url.strip()]
