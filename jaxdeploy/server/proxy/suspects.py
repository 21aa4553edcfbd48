"""Requests that a node died with, recognised by their content when a client sends them again."""

from __future__ import annotations

import time

from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.recent import Recent

MEMORY_SECONDS = 60.0
"""Seconds for which a request is suspect after the last node that died with it."""
MAX_BODIES = 4096
"""Requests that are remembered; the oldest is forgotten first."""


class Suspects:
    """Digest of a request → the nodes that died while they ran it, and when the last one did.

    A suspect that gets a whole reply is cleared: another request killed its node.
    """

    def __init__(self) -> None:
        self._known: Recent[bytes, tuple[frozenset[str], float]] = Recent(MAX_BODIES)

    def note(self, asked: Asked, url: str) -> None:
        """Record that the node at ``url`` died while it ran ``asked``."""
        self._known.put(asked.digest, (self._nodes(asked) | {url}, time.monotonic()))

    def clear(self, asked: Asked) -> None:
        """Clear ``asked``: a node has answered it."""
        if self._known:
            self._known.forget(asked.digest)

    def deaths(self, asked: Asked) -> int:
        """Return how many nodes died with ``asked``, or with the same request sent before."""
        return len(self._nodes(asked)) if self._known else 0

    def _nodes(self, asked: Asked) -> frozenset[str]:
        nodes, when = self._known.get(asked.digest) or (frozenset(), 0.0)
        return nodes if time.monotonic() - when < MEMORY_SECONDS else frozenset()
