"""Forwards a request: to one node after another until one has answered, and the reply to the client as it comes."""

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
from jaxdeploy.server.errors import (
    BadAnswerError,
    NodeFailedError,
    NodeSilentError,
    NoNodeError,
    NotTheApiError,
    UnknownModelError,
    UnreachableError,
)
from jaxdeploy.server.proxy.answer import FULL, REFUSALS, Refusal, error_answer, stream_headers, whole_answer
from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.fetching import IDENTITY, check_head, fetch, read_json
from jaxdeploy.server.proxy.framing import Events, Framing, Whole, framing_of
from jaxdeploy.server.proxy.metrics import ProxyMetrics
from jaxdeploy.server.proxy.nodes import Exchange, Node, Nodes, clipped
from jaxdeploy.server.proxy.reply import Client
from jaxdeploy.server.proxy.routing import Router
from jaxdeploy.server.proxy.suspects import Suspects

logger = logging.getLogger("jaxdeploy.server")

ROOM_SECONDS = 60.0
"""Seconds for which a request whose node died waits for room at the others: it had been taken."""
PAUSE = 0.25
"""Seconds between two tries for it."""


MAX_NAMED = 10
"""Models that an error message lists."""
MAX_ABORTED = 64 * 1024
"""Bytes of a node's answer to ``/abort_request``."""
MIN_DEATHS = 2
"""Nodes that have to die with a request before it is refused when it is sent again."""


class RefusedError(Exception):
    """A node does not answer the request; its ``refusal`` is kept for the case that no other node does."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status)
        self.refusal = refusal


@dataclass
class Tries:
    """What became of a request so far."""

    refused: dict[Node, Refusal] = field(default_factory=dict)
    unreachable: set[Node] = field(default_factory=set)
    failed: list[Node] = field(default_factory=list)
    """Nodes that had the request, and died or failed with it."""
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
    """Sends requests to nodes that serve their model, as ``router`` chooses.

    A request is sent elsewhere as long as its client has nothing of a reply: when its node cannot be reached, breaks
    off, is given up, or is full. A node that breaks off may have died of the request, so at most ``max_attempts``
    nodes get it. ``Suspects`` applies the same limit to a client that sends it again.
    """

    def __init__(
        self, nodes: Nodes, router: Router, http: httpx2.AsyncClient, config: ProxyConfig, metrics: ProxyMetrics
    ) -> None:
        self._nodes = nodes
        self._router = router
        self._http = http
        self._config = config
        self._metrics = metrics
        self._suspects = Suspects()

    async def forward(self, asked: Asked, client: Client) -> None:
        """Answer ``client``.

        Raises, as long as nothing was sent, ``NodeFailedError``, ``NodeSilentError``, ``NoNodeError``,
        ``UnknownModelError``; after that the error is the end of the reply. A reply that cannot contain an error
        stays incomplete, and the server closes the connection.
        """
        if self._suspects.deaths(asked) >= max(MIN_DEATHS, self._config.max_attempts):
            raise NodeFailedError("several nodes have died while they ran this request; change it, or wait a minute")
        tries = Tries()
        try:
            while not await self._answered(asked, client, tries):
                pass
        except JaxdeployError as error:
            if not client.started:
                raise
            told = tries.framing.error(error) if tries.framing else None
            if told is not None:
                await client.write(told)
                await client.end()

    async def aborted(self, node: Node, asked: Asked) -> int:
        """How many replies ``node`` ended when it was told to; 0 if it cannot."""
        try:
            async with asyncio.timeout(self._config.heartbeat_timeout):
                _, body = await fetch(self._http, self._request(node, asked), MAX_ABORTED)
            return int(read_json(body)["aborted"])
        except (httpx2.HTTPError, BadAnswerError, TimeoutError, ValueError, TypeError, KeyError, OverflowError):
            return 0

    async def _answered(self, asked: Asked, client: Client, tries: Tries) -> bool:
        """One more try; whether it was the last."""
        node = self._next(asked, tries)
        if node is None and tries.may_wait and not self._dangerous(asked, tries):
            tries.refused.clear()
            await asyncio.sleep(PAUSE)
            return False
        if node is None:
            await self._unanswered(asked, client, tries)
            return True
        try:
            with _failures_of(node):
                await self._exchange(node, asked, client, tries)
        except RefusedError as error:
            self._note_refusal(node, asked, tries, error.refusal)
        except NodeFailedError as error:
            self._note_failure(node, asked, tries, error)
        except NodeSilentError as error:
            _log_fault(node, asked, error)
            raise
        else:
            self._suspects.clear(asked)
            return True
        return False

    def _next(self, asked: Asked, tries: Tries) -> Node | None:
        """Who is asked next; a session stays with its node as long as that is up."""
        if self._dangerous(asked, tries):
            return None
        serving = self._nodes.serving(asked.model)
        home = self._router.home(asked, serving)
        left = tries.left(serving if home is None else [home])
        return self._router.choose(asked, left) if left else None

    def _dangerous(self, asked: Asked, tries: Tries) -> bool:
        """Whether ``max_attempts`` nodes failed with the request."""
        failed = max(len(tries.failed), self._suspects.deaths(asked) if tries.failed else 0)
        return failed >= self._config.max_attempts

    async def _exchange(self, node: Node, asked: Asked, client: Client, tries: Tries) -> None:
        """Send the request to ``node``, and what it answers to ``client``. Raises ``RefusedError`` besides."""
        async with node.exchange() as exchange:
            exchange.expect(self._config.read_timeout)
            response = await self._http.send(self._request(node, asked), stream=True)
            try:
                check_head(response)
                self._metrics.note_status(node.url, response.status_code)
                if response.status_code == 200:
                    progress = _Progress(node, exchange, self._metrics, self._config.read_timeout)
                    await self._pass_on(response, client, tries, progress)
                else:
                    exchange.expect(min(self._config.heartbeat_timeout, self._config.read_timeout))
                    refusal = await error_answer(response)
                    if refusal.status in REFUSALS:
                        raise RefusedError(refusal)
                    _check_unbegun(client, refusal.status)
                    await client.whole(refusal.status, refusal.headers, refusal.body)
            finally:
                await response.aclose()
        node.note_success()

    async def _pass_on(self, response: httpx2.Response, client: Client, tries: Tries, progress: _Progress) -> None:
        headers = stream_headers(response)
        framing = framing_of(dict(headers)["content-type"])
        if not isinstance(framing, Events):
            _check_unbegun(client, 200)
        async for chunk in response.aiter_raw():
            ready = framing.feed(chunk)
            progress.note(framing)
            if ready:
                tries.framing = framing
                with progress.suspended():
                    await client.start(200, headers)
                    await client.write(ready)
        if isinstance(framing, Whole) and not framing.opened:
            progress.note_begun()
            await client.whole(200, headers, await whole_answer(framing.end()))
            return
        rest = framing.end()
        await client.start(200, headers)
        await client.write(rest)
        await client.end()

    def _request(self, node: Node, asked: Asked) -> httpx2.Request:
        headers = asked.headers | node.headers | IDENTITY | {b"x-request-id": asked.request_id.encode()}
        return self._http.build_request(
            asked.method, node.url + asked.target, headers=headers, content=asked.body or None
        )

    def _note_refusal(self, node: Node, asked: Asked, tries: Tries, refusal: Refusal) -> None:
        """Keep it for the client, and look whether the node has died."""
        tries.refused[node] = refusal
        self._metrics.note_moved(node.url, "full" if refusal.status == FULL else "refused")
        if refusal.status != FULL:
            node.look_now.set()
        if refusal.may_be_death:
            tries.failed.append(node)
            self._suspects.note(asked, node.url)

    def _note_failure(self, node: Node, asked: Asked, tries: Tries, error: NodeFailedError) -> None:
        """Look at the node, and remember not to send the request there. Raises ``error`` if a part of it is out."""
        _log_fault(node, asked, error)
        tries.last = error
        if isinstance(error, UnreachableError):
            node.look_now.set()
            tries.unreachable.add(node)
            self._metrics.note_moved(node.url, "unreachable")
            return
        if not isinstance(error, BadAnswerError):
            self._suspects.note(asked, node.url)
        node.look_now.set()
        if tries.framing is not None and tries.framing.opened:
            self._metrics.note_broken(node.url)
            raise error
        tries.failed.append(node)
        self._metrics.note_moved(node.url, "failed")

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
        names = [repr(name) for name in self._nodes.models()]
        there_are = ", ".join([*names[:MAX_NAMED], *(["..."] if len(names) > MAX_NAMED else [])])
        return UnknownModelError(f"{named} is not served here; ask for one of {there_are}")


def _log_fault(node: Node, asked: Asked, error: Exception) -> None:
    logger.warning("node %s: %s", node.url, error, extra={"request_id": asked.request_id})


def _check_unbegun(client: Client, status: int) -> None:
    """Raise ``NoNodeError`` if ``client`` has the beginning of a stream, and a node answers with something else."""
    if client.started:
        raise NoNodeError(f"the node that should go on answered {status} without a stream; send the request again")


@dataclass
class _Progress:
    """Notes when a reply begins and continues. The exchange fails after ``patience`` seconds without progress."""

    node: Node
    exchange: Exchange
    metrics: ProxyMetrics
    patience: float
    units: int = 0

    def note(self, framing: Framing) -> None:
        """A chunk came."""
        if framing.units > self.units:
            self.units = framing.units
            self.exchange.expect(self.patience)
        if framing.opened:
            self.note_begun()

    def note_begun(self) -> None:
        """A part of the reply came, the first one perhaps."""
        begun, self.exchange.begun = self.exchange.begun, True
        now = time.monotonic()
        if not begun:
            self.node.note_latency(now - self.exchange.moved)
            self.metrics.note_begun(self.node.url, now - self.exchange.moved)
        self.exchange.moved = now

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The time in which the client is written to: it may be slow, and the node cannot help it."""
        self.exchange.expect(None)
        yield
        self.exchange.expect(self.patience)


@contextmanager
def _failures_of(node: Node) -> Iterator[None]:
    """Turn whatever goes wrong on the way to ``node`` into a ``NodeFailedError`` or ``NodeSilentError``."""
    sent = time.monotonic()
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        why = f"it cannot be reached: {error or type(error).__name__}"
        node.found_down(why)
        raise UnreachableError(f"the node is down ({node.why_down}); try again later") from None
    except NotTheApiError as error:
        node.bar(str(error))
        raise
    except (NodeFailedError, NodeSilentError) as error:
        node.note_fault(str(error), sent)
        raise
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        why = clipped(str(error) or type(error).__name__)
        node.note_fault(why, sent)
        raise NodeFailedError(f"the node broke off ({why}); send the request again") from None
