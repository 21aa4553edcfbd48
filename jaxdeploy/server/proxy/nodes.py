"""The servers behind the proxy: what they serve, how they stand, and which requests are with them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.server.errors import NodeFailedError

logger = logging.getLogger("jaxdeploy.server")

NEWEST = 0.2
"""Weight of the newest figure in a node's latency."""
HALF_LIFE = 60.0
"""Seconds in which a latency that is not measured again halves: a node that was slow once gets another chance."""


class Exchange:
    """One request at one node."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self.begun = False
        """Whether the client has a part of this reply."""
        self.moved = time.monotonic()
        """When it was sent, or brought something last."""
        self._limit = limit
        self._given_up = False

    def give_up(self) -> None:
        """Have the task that waits for it fail with ``NodeFailedError``."""
        if not self._given_up:
            self._given_up = True
            self._limit.reschedule(0)


class Node:
    """One server at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: dict[str, dict[str, Any]] = {}
        """Name → what ``/v1/models`` says of it."""
        self.why_down: str | None = "it has not been looked at yet"
        """Why it gets no requests; ``None`` while it is up."""
        self.removed = False
        self.exchanges: set[Exchange] = set()
        self.last_sent = 0.0
        self.seen: float | None = None
        """When it was found well last."""
        self.look_now = asyncio.Event()
        self._latency: float | None = None
        self._measured = 0.0

    @property
    def up(self) -> bool:
        """Whether it gets requests."""
        return self.why_down is None and not self.removed

    @property
    def in_flight(self) -> int:
        """Requests that are with it."""
        return len(self.exchanges)

    @property
    def latency(self) -> float | None:
        """Seconds until replies began, a moving average; ``None`` as long as there was none."""
        if self._latency is None:
            return None
        return float(self._latency * 0.5 ** ((time.monotonic() - self._measured) / HALF_LIFE))

    @property
    def heartbeat_age(self) -> float | None:
        """Seconds since it was found well; ``None`` if it never was."""
        return None if self.seen is None else time.monotonic() - self.seen

    def note_latency(self, seconds: float) -> None:
        """A reply began after so long."""
        known = self.latency
        self._latency = seconds if known is None else known + NEWEST * (seconds - known)
        self._measured = time.monotonic()

    def found_well(self, models: dict[str, dict[str, Any]]) -> None:
        """It answers, and serves these."""
        if self.why_down is not None:
            logger.info("node %s is up with %s", self.url, ", ".join(models))
        self.models, self.why_down, self.seen = models, None, time.monotonic()

    def found_down(self, why: str) -> None:
        """It gets no requests until it is found well; those that it has may still be answered."""
        if self.why_down is None:
            logger.warning("node %s is down: %s", self.url, why)
        self.why_down = why

    def give_up_silent(self, patience: float) -> None:
        """Give up on replies if it has not been well for so many seconds: all that have not begun or are as silent."""
        now, age = time.monotonic(), self.heartbeat_age
        if age is not None and age <= patience:
            return
        for exchange in self.exchanges:
            if not exchange.begun or now - exchange.moved > patience:
                exchange.give_up()

    @asynccontextmanager
    async def exchange(self) -> AsyncIterator[Exchange]:
        """The time in which a request is with this node. Raises ``NodeFailedError`` when it is given up."""
        self.last_sent = time.monotonic()
        try:
            async with asyncio.timeout(None) as limit:
                made = Exchange(limit)
                self.exchanges.add(made)
                try:
                    yield made
                finally:
                    self.exchanges.discard(made)
        except TimeoutError:
            if not limit.expired():
                raise
            raise NodeFailedError(f"the node has died ({self.why_down}); send the request again") from None


class Nodes:
    """All nodes by their address, in the order in which they came. For one event loop."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, url: str) -> Node | None:
        """The node at ``url``, if it is one."""
        return self._nodes.get(checked_url(url))

    def add(self, url: str) -> Node:
        """The node at ``url``, a new one unless it is known. Raises ``RequestError``."""
        url = checked_url(url)
        if url not in self._nodes:
            self._nodes[url] = Node(url)
        return self._nodes[url]

    def remove(self, url: str) -> bool:
        """Send no more requests to ``url``; those that it has are finished. Whether it was a node."""
        node = self._nodes.pop(checked_url(url), None)
        if node is None:
            return False
        node.removed = True
        return True

    @property
    def up(self) -> list[Node]:
        """Those that get requests."""
        return [node for node in self if node.up]

    def models(self) -> dict[str, dict[str, Any]]:
        """What is served now: name → what the first node that serves it says of it."""
        found: dict[str, dict[str, Any]] = {}
        for node in self.up:
            found |= {name: card for name, card in node.models.items() if name not in found}
        return found

    def serving(self, model: str | None) -> list[Node]:
        """The nodes that are up and serve ``model``; without a name, the first one that is served."""
        name = model or next((name for node in self.up for name in node.models), None)
        return [node for node in self.up if name in node.models]

    def may_know(self, model: str | None) -> bool:
        """Whether a node that is down serves ``model``, as far as can be told."""
        return not self.up or any(model in node.models for node in self)


def checked_url(url: str) -> str:
    """``url`` without what may follow the host and its path. Raises ``RequestError`` for what is no address."""
    from httpx2 import URL, InvalidURL

    try:
        parsed = URL(url)
    except InvalidURL as error:
        raise RequestError(f"url={url!r:.200} is no address ({error}); give one like http://127.0.0.1:23333") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise RequestError(f"url={url!r:.200} is no address of a server; give one like http://127.0.0.1:23333")
    return str(parsed).rstrip("/").removesuffix("/v1")
