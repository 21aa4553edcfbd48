"""The parts of a proxy, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from jaxdeploy.config import ProxyConfig
from jaxdeploy.server.errors import NodeConflictError
from jaxdeploy.server.proxy.fetching import client
from jaxdeploy.server.proxy.forwarding import Forwarder
from jaxdeploy.server.proxy.heartbeat import Heartbeats
from jaxdeploy.server.proxy.metrics import ProxyMetrics
from jaxdeploy.server.proxy.nodes import Node, Nodes
from jaxdeploy.server.proxy.routing import Router

CONNECT_SECONDS = 5.0
"""Seconds that a node has to accept a connection."""
KEEP_SECONDS = 2.0
"""Seconds for which a connection that is not used is kept: less than servers keep theirs."""


class Proxy:
    """Nodes, the heartbeats that watch them, and the forwarder that sends requests there."""

    def __init__(self, config: ProxyConfig) -> None:
        self.nodes = Nodes()
        for url in _addresses(config):
            self.nodes.add(url, config.node_api_key, fixed=True)
        self.metrics = ProxyMetrics()
        self._http = client(
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # an exchange has its own limit
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS),
        )
        # A new connection each time: a server that is about to end still answers on the old ones.
        self._looking = client(
            timeout=config.heartbeat_timeout, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        )
        self.heartbeats = Heartbeats(self._looking, config, self.nodes, self.metrics)
        router = Router(config.routing_strategy)
        self.forwarder = Forwarder(self.nodes, router, self._http, config, self.metrics)

    async def register(self, url: str, key: str | None) -> Node:
        """The node at ``url``, looked at once. It is added unless it is known.

        A known node gets a new key only if the server there accepts it: else anyone who registers could cut it off.

        Raises:
            RequestError: ``url`` is not the address of a server.
            TooManyNodesError: no more nodes are taken.
            NodeConflictError: the node is known with another key, and does not accept this one.
        """
        known = self.nodes.get(url)
        if known is not None and key is not None and key != known.key:
            if not await self.heartbeats.accepts(known.url, key):
                raise NodeConflictError(f"url={known.url!r} is known with another key; remove it before you add it")
            known.key = key
        node = self.nodes.add(url, key)
        await self.heartbeats.watch(node)
        return node

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
