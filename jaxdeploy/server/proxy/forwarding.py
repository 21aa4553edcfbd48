"""A request on its way: sent to one node after another until one has answered, and passed on as the answer comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2

from jaxdeploy.config import ProxyConfig
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.server.errors import NodeFailedError, NodeSilentError, NoNodeError, UnknownModelError
from jaxdeploy.server.proxy.asked import KEYS, OF_REPLIES, Asked, Headers, end_to_end
from jaxdeploy.server.proxy.framing import Events, Framing, Whole, framing_of
from jaxdeploy.server.proxy.metrics import ProxyMetrics
from jaxdeploy.server.proxy.nodes import Exchange, Node, Nodes
from jaxdeploy.server.proxy.reply import Client
from jaxdeploy.server.proxy.routing import Router

logger = logging.getLogger("jaxdeploy.server")

FULL = 429
REFUSALS = frozenset({FULL, 502, 503, 504})
"""Answers of a node that another one may not give."""
ROOM_SECONDS = 60.0
"""Seconds for which a request whose node died waits for room at the others: it had been taken."""
PAUSE = 0.25
"""Seconds between two tries for it."""


class RefusedError(Exception):
    """A node does not take the request; what it says is kept, in case nobody does."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body

    @property
    def rank(self) -> tuple[bool, float]:
        """The lowest is passed on: of a full node, and of these the one that has room first."""
        told = dict(self.headers).get("retry-after", "")
        return self.status != FULL, float(told) if told.isdecimal() else float("inf")


class UnreachableError(NodeFailedError):
    """A node never got the request."""


@dataclass
class Tries:
    """What became of a request so far."""

    refused: dict[Node, RefusedError] = field(default_factory=dict)
    unreachable: set[Node] = field(default_factory=set)
    failed: list[Node] = field(default_factory=list)
    """Nodes that had the request and failed."""
    last: NodeFailedError | None = None
    framing: Framing | None = None
    """Of what the client has been sent."""
    until: float = field(default_factory=lambda: time.monotonic() + ROOM_SECONDS)

    def left(self, nodes: Sequence[Node]) -> list[Node]:
        """Those that were not tried; else those that failed and are up nevertheless: a connection may just be old."""
        willing = [node for node in nodes if node not in self.refused and node not in self.unreachable]
        return [node for node in willing if node not in self.failed] or willing

    @property
    def may_wait(self) -> bool:
        """Whether it is owed an answer, and those who could give it are only full."""
        full = any(refusal.status == FULL for refusal in self.refused.values())
        return full and self.last is not None and time.monotonic() < self.until


class Forwarder:
    """Sends requests to nodes that serve their model, as ``router`` chooses. ``keep_keys``: with the client's key.

    A request is sent elsewhere as long as its client has nothing of a reply: when its node cannot be reached, breaks
    off, is given up, or is full. ``max_attempts`` nodes may fail with it, lest one request take down all.
    """

    def __init__(
        self,
        nodes: Nodes,
        router: Router,
        http: httpx2.AsyncClient,
        config: ProxyConfig,
        metrics: ProxyMetrics,
        *,
        keep_keys: bool,
    ) -> None:
        self._nodes = nodes
        self._router = router
        self._http = http
        self._config = config
        self._metrics = metrics
        self._dropped = frozenset() if keep_keys else KEYS

    async def forward(self, asked: Asked, client: Client) -> None:
        """Answer ``client``.

        Raises, as long as nothing was sent, ``NodeFailedError``, ``NodeSilentError``, ``NoNodeError``,
        ``UnknownModelError``; after that the error is the end of the reply.
        """
        tries = Tries()
        try:
            while not await self._answered(asked, client, tries):
                pass
        except JaxdeployError as error:
            told = tries.framing.error(error) if client.started and tries.framing else None
            if told is None:
                raise
            await client.write(told)
            await client.end()

    async def aborted(self, node: Node, asked: Asked) -> int:
        """How many replies ``node`` ended when it was told to; 0 if it cannot."""
        try:
            async with asyncio.timeout(self._config.heartbeat_timeout):
                response = await self._http.send(self._request(node, asked))
            return int(response.json()["aborted"])
        except (httpx2.TransportError, TimeoutError, ValueError, TypeError, KeyError):
            return 0

    async def _answered(self, asked: Asked, client: Client, tries: Tries) -> bool:
        """One more try; whether it was the last."""
        node = self._next(asked, tries)
        if node is None and tries.may_wait:
            tries.refused.clear()
            await asyncio.sleep(PAUSE)
            return False
        if node is None:
            await self._unanswered(asked, client, tries)
            return True
        try:
            with _failures_of(node):
                await self._exchange(node, asked, client, tries)
        except RefusedError as refusal:
            tries.refused[node] = refusal
            self._metrics.note_moved(node.url, "full" if refusal.status == FULL else "refused")
            if refusal.status != FULL:
                node.look_now.set()
        except NodeFailedError as error:
            self._note_failure(node, asked, tries, error)
        else:
            return True
        return False

    def _next(self, asked: Asked, tries: Tries) -> Node | None:
        """Who is asked next; a session stays with its node as long as that is up."""
        if len(tries.failed) >= self._config.max_attempts:
            return None
        serving = self._nodes.serving(asked.model)
        home = self._router.home(asked, serving)
        left = tries.left(serving if home is None else [home])
        return self._router.choose(asked, left) if left else None

    async def _exchange(self, node: Node, asked: Asked, client: Client, tries: Tries) -> None:
        """Send the request to ``node``, and what it answers to ``client``. Raises ``RefusedError`` besides."""
        async with node.exchange() as exchange:
            response = await self._http.send(self._request(node, asked), stream=True)
            try:
                self._metrics.note_status(node.url, response.status_code)
                headers = end_to_end(response.headers.multi_items(), OF_REPLIES)
                if response.status_code in REFUSALS:
                    raise RefusedError(response.status_code, headers, await response.aread())
                await self._pass_on(response, headers, client, tries, _Begin(node, exchange, self._metrics))
            finally:
                await response.aclose()

    async def _pass_on(
        self, response: httpx2.Response, headers: Headers, client: Client, tries: Tries, begin: _Begin
    ) -> None:
        status, framing = response.status_code, framing_of(response.headers.get("content-type", ""))
        if client.started and not (status == 200 and isinstance(framing, Events)):
            raise NoNodeError(f"the node that should go on answered {status}; send the request again")
        async for chunk in response.aiter_bytes():
            ready = framing.feed(chunk)
            if framing.opened:
                begin.note()
            if ready:
                tries.framing = framing
                await client.start(status, headers)
                await client.write(ready)
        if isinstance(framing, Whole) and not framing.opened:
            begin.note()
            await client.whole(status, headers, framing.end())
            return
        await client.start(status, headers)
        await client.write(framing.end())
        await client.end()

    def _request(self, node: Node, asked: Asked) -> httpx2.Request:
        headers = [(name, value) for name, value in asked.headers if name not in self._dropped]
        if self._config.node_api_key:
            headers.append(("authorization", f"Bearer {self._config.node_api_key}"))
        headers += [("x-request-id", asked.request_id), ("accept-encoding", "identity")]
        return self._http.build_request(
            asked.method, node.url + asked.target, headers=headers, content=asked.body or None
        )

    def _note_failure(self, node: Node, asked: Asked, tries: Tries, error: NodeFailedError) -> None:
        """Look at the node, and remember not to send the request there. Raises ``error`` if a part of it is out."""
        logger.warning("node %s: %s", node.url, error, extra={"request_id": asked.request_id})
        node.look_now.set()
        if tries.framing is not None and tries.framing.opened:
            self._metrics.note_broken(node.url)
            raise error
        tries.last = error
        if isinstance(error, UnreachableError):
            tries.unreachable.add(node)
        else:
            tries.failed.append(node)
        self._metrics.note_moved(node.url, "unreachable" if isinstance(error, UnreachableError) else "failed")

    async def _unanswered(self, asked: Asked, client: Client, tries: Tries) -> None:
        """Pass on a refusal, or raise why there is no answer."""
        if not tries.refused:
            raise tries.last or self._nobody(asked.model)
        refusal = min(tries.refused.values(), key=lambda refusal: refusal.rank)
        if client.started:
            raise NoNodeError(f"the nodes that are left answered {refusal.status}; try again later")
        await client.whole(refusal.status, refusal.headers, refusal.body)

    def _nobody(self, model: str | None) -> JaxdeployError:
        named = "any model" if model is None else f"model={model!r:.80}"
        if self._nodes.may_know(model):
            return NoNodeError(f"no node that serves {named} is up; try again later")
        there_are = ", ".join(repr(name) for name in self._nodes.models())
        return UnknownModelError(f"{named} is not served here; ask for one of {there_are}")


@dataclass
class _Begin:
    """Takes note that a reply goes on, and of when it began."""

    node: Node
    exchange: Exchange
    metrics: ProxyMetrics

    def note(self) -> None:
        """Something came."""
        begun, self.exchange.begun = self.exchange.begun, True
        now = time.monotonic()
        if not begun:
            self.node.note_latency(now - self.exchange.moved)
            self.metrics.note_begun(self.node.url, now - self.exchange.moved)
        self.exchange.moved = now


@contextmanager
def _failures_of(node: Node) -> Iterator[None]:
    """What goes wrong on the way to ``node``, in our words."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        why = f"it cannot be reached: {error or type(error).__name__}"
        node.found_down(why)
        raise UnreachableError(f"the node is down ({why}); try again later") from None
    except httpx2.ReadTimeout:
        raise NodeSilentError("the node has sent nothing for too long; ask for less, or raise --read-timeout") from None
    except httpx2.TransportError as error:
        why = str(error) or type(error).__name__
        raise NodeFailedError(f"the node broke off ({why}); send the request again") from None
