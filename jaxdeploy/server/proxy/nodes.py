"""The servers that the proxy forwards to: their models, their state, and the requests that they run."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.server.errors import NodeFailedError, NodeSilentError, TooManyNodesError

logger = logging.getLogger("jaxdeploy.server")

NEWEST = 0.2
"""Weight of the newest figure in a node's latency."""
HALF_LIFE = 60.0
"""Seconds in which a latency that is not measured again halves: a node that was slow once gets another chance."""


FAULTS = 3
"""Consecutive requests that a node may fail with before it is barred for ``BARRED_SECONDS``."""
BARRED_SECONDS = 30.0
MAX_NODES = 256
"""Nodes that a proxy has at most."""
EXPIRY_SECONDS = 600.0
"""Seconds after which a node that was registered and is down is removed."""
UNSEEN_SECONDS = 60.0
"""The same for a node that was never up."""
MAX_URL_LENGTH = 512
"""Characters."""
MAX_REASON = 200
"""Characters of what a node says that are repeated."""


class Exchange:
    """One request at one node."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self.begun = False
        """Whether the client has a part of this reply."""
        self.sent = self.moved = time.monotonic()
        """When it was sent, and when it last made progress."""
        self.given_up = False
        self._limit = limit

    def give_up(self) -> None:
        """Have the task that waits for it fail with ``NodeFailedError``."""
        if not self.given_up:
            self.given_up = True
            self._limit.reschedule(0)

    def expect(self, seconds: float | None) -> None:
        """Have the task fail with ``NodeSilentError`` unless this is called again in time; ``None``: no limit."""
        if not self.given_up:
            self._limit.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)


class Node:
    """One server at ``url``, which is shown ``key`` and no other. ``fixed``: it was named when the proxy started."""

    def __init__(self, url: str, key: str | None = None, *, fixed: bool = False) -> None:
        self.url = url
        self.key = key
        self.fixed = fixed
        self.registered = time.monotonic()
        """When it was added, or registered again."""
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
        self._faults = 0
        self._last_fault = 0.0
        self._barred_until = 0.0

    @property
    def headers(self) -> dict[bytes, bytes]:
        """What shows the node its key."""
        return {b"authorization": b"Bearer " + self.key.encode()} if self.key else {}

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

    @property
    def expired(self) -> bool:
        """Whether it was registered, and has been down for so long that it is removed."""
        if self.fixed or self.up or self.exchanges:
            return False
        patience = UNSEEN_SECONDS if self.seen is None else EXPIRY_SECONDS
        return time.monotonic() - max(self.registered, self.seen or 0.0) > patience

    def note_latency(self, seconds: float) -> None:
        """A reply began after so long."""
        known = self.latency
        self._latency = seconds if known is None else known + NEWEST * (seconds - known)
        self._measured = time.monotonic()

    def found_well(self, models: dict[str, dict[str, Any]]) -> None:
        """It answers, and serves these models. A node that is barred stays down for the rest of its time."""
        self.models, self.seen = models, time.monotonic()
        if self.seen < self._barred_until:
            return
        if self.why_down is not None:
            logger.info("node %s is up with %s", self.url, ", ".join(models)[:MAX_REASON])
            self._faults = 0
        self.why_down = None

    def found_down(self, why: str) -> None:
        """It gets no requests until it is found well; those that it has may still be answered."""
        if time.monotonic() < self._barred_until:
            return
        if self.why_down is None:
            logger.warning("node %s is down: %s", self.url, clipped(why))
        self.why_down = clipped(why)

    def bar(self, why: str) -> None:
        """It breaks the rules of HTTP or of the API: no requests for ``BARRED_SECONDS``."""
        self.found_down(why)
        self._barred_until = time.monotonic() + BARRED_SECONDS

    def note_fault(self, why: str, sent: float) -> None:
        """It failed with a request that was ``sent`` then. Requests that fail together count once."""
        if sent < self._last_fault:
            return
        self._last_fault = time.monotonic()
        self._faults += 1
        if self._faults >= FAULTS:
            self._faults = 0
            self.bar(f"{FAULTS} requests in a row failed there, the last one because {clipped(why)}")

    def note_success(self) -> None:
        """It answered a request in full."""
        self._faults = 0

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
        """The time in which a request is with this node.

        Raises ``NodeFailedError`` when it is given up, ``NodeSilentError`` when it makes no progress in time.
        """
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
            if not made.given_up:
                message = "the node has sent nothing for too long; ask for less, or raise --read-timeout"
                raise NodeSilentError(message) from None
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

    def add(self, url: str, key: str | None = None, *, fixed: bool = False) -> Node:
        """The node at ``url``. A known one keeps its key; a new one gets ``key``.

        Raises:
            RequestError: ``url`` is not the address of a server.
            TooManyNodesError: there are ``MAX_NODES`` already.
        """
        url = checked_url(url)
        if url not in self._nodes:
            if len(self._nodes) >= MAX_NODES:
                raise TooManyNodesError(f"the proxy has {MAX_NODES} nodes, no more are taken; remove one first")
            self._nodes[url] = Node(url, key, fixed=fixed)
        node = self._nodes[url]
        node.registered = time.monotonic()
        return node

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
    """``url`` in one spelling, without ``/v1``. Raises ``RequestError`` unless it is scheme, host, port and path."""
    from httpx2 import URL, InvalidURL

    try:
        parsed = URL(url)
    except InvalidURL as error:
        raise RequestError(f"url={url!r:.200} is no address ({error}); give one like http://127.0.0.1:23333") from None
    usable = len(url) <= MAX_URL_LENGTH and _URL.fullmatch(str(parsed)) is not None and (parsed.port or 1) < 65536
    if not usable or parsed.userinfo or not parsed.host:
        raise RequestError(f"url={url!r:.200} is no address of a server; give one like http://127.0.0.1:23333")
    return str(parsed).rstrip("/").removesuffix("/v1")


_URL = re.compile(r"https?://[\w.:\[\]-]+(/[\w-][\w.-]*)*/?", re.ASCII)


def clipped(text: str) -> str:
    """``text`` on one line, at most ``MAX_REASON`` characters, and such that UTF-8 can hold it."""
    printable = "".join(mark if mark.isprintable() else " " for mark in text[: MAX_REASON + 1])
    return printable if len(printable) <= MAX_REASON else printable[: MAX_REASON - 1] + "…"
