"""Which node gets a request, among those that could answer it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.nodes import Node
from jaxdeploy.server.recent import Recent

REMEMBERED = 32768
"""Beginnings of prompts, and sessions, whose nodes are known; what was not asked for longest goes first."""
PIECE = 256
"""Characters: prompts begin alike if so many are the same, and more alike for each further piece."""
MAX_PREFIX = 8192
"""Characters of a prompt that are looked at."""
BUSIER, SLACK = 2.0, 4
"""A node is much busier than another if it has more than so many times its requests, and so many more."""
BEGINNING = ("model", "tools", "system", "messages", "input", "prompt", "input_ids")
"""Fields of a request that its prompt begins with, in this order."""


class Router:
    """Chooses by ``strategy``, one of ``STRATEGIES``; requests of a session go where its first one went."""

    def __init__(self, strategy: str) -> None:
        self._choose = STRATEGIES[strategy]()
        self._sessions: Recent[str, str] = Recent(REMEMBERED)

    def choose(self, asked: Asked, nodes: Sequence[Node]) -> Node:
        """One of ``nodes``, of which there is at least one."""
        node = self.home(asked, nodes) or self._choose(asked, nodes)
        if asked.session is not None:
            self._sessions.put(asked.session, node.url)
        return node

    def home(self, asked: Asked, nodes: Sequence[Node]) -> Node | None:
        """The one of ``nodes`` that has the request's session."""
        url = None if asked.session is None else self._sessions.get(asked.session)
        return next((node for node in nodes if node.url == url), None)


Choice = Callable[[Asked, Sequence[Node]], Node]


def least_loaded(asked: Asked, nodes: Sequence[Node]) -> Node:
    """The one with the fewest requests; of several, that which waited longest for one."""
    return min(nodes, key=lambda node: (node.in_flight, node.last_sent))


def quickest(asked: Asked, nodes: Sequence[Node]) -> Node:
    """The one where a reply should begin first: its latency, times the requests there would be.

    A node that has not answered yet counts as the quickest of the others, so that it is tried.
    """
    known = [node.latency for node in nodes if node.latency is not None]
    new = min(known, default=1.0)

    def expected(node: Node) -> float:
        return (new if node.latency is None else node.latency) * (node.in_flight + 1)

    return min(nodes, key=lambda node: (expected(node), node.last_sent))


def any_of(asked: Asked, nodes: Sequence[Node]) -> Node:
    """Whichever."""
    return random.choice(nodes)


class AlikePrompts:
    """The node that had the prompt with the longest common beginning, and so has its KV blocks."""

    def __init__(self) -> None:
        self._had: Recent[bytes, set[str]] = Recent(REMEMBERED)

    def __call__(self, asked: Asked, nodes: Sequence[Node]) -> Node:
        """The least loaded of those that had it; the least loaded of all if that is much busier."""
        keys = list(prefix_keys(asked.fields))
        least = least_loaded(asked, nodes)
        chosen = self._that_had(keys, asked, nodes) or least
        if chosen.in_flight > max(BUSIER * least.in_flight, least.in_flight + SLACK):
            chosen = least
        for key in keys:
            self._had.put(key, {*(self._had.get(key) or ()), chosen.url})
        return chosen

    def _that_had(self, keys: Sequence[bytes], asked: Asked, nodes: Sequence[Node]) -> Node | None:
        for key in reversed(keys):
            had = self._had.get(key) or set()
            if found := [node for node in nodes if node.url in had]:
                return least_loaded(asked, found)
        return None


STRATEGIES: dict[str, Callable[[], Choice]] = {
    "least_loaded": lambda: least_loaded,
    "latency": lambda: quickest,
    "prefix": AlikePrompts,
    "random": lambda: any_of,
}


def prefix_keys(fields: dict[str, Any]) -> Iterator[bytes]:
    """A digest of the prompt's first piece, of its first two pieces, and so on."""
    text = _beginning([fields.get(name) for name in BEGINNING])
    digest = hashlib.blake2b(digest_size=12)
    for at in range(0, len(text) - PIECE + 1, PIECE):
        digest.update(text[at : at + PIECE].encode())
        yield digest.digest()


def _beginning(value: Any) -> str:
    """The first ``MAX_PREFIX`` characters of ``value`` as JSON; the rest is not made."""
    text = ""
    with suppress(RecursionError):  # a body may be nested as deeply as its parser allows
        for part in json.JSONEncoder().iterencode(value):
            text += part[: MAX_PREFIX - len(text)]
            if len(text) >= MAX_PREFIX:
                break
    return text
