"""Responses that the server keeps, so that clients can go on with them by their ids."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from jaxdeploy.errors import JaxdeployError
from jaxdeploy.server.protocol.response import Response
from jaxdeploy.server.protocol.responses import Item

KEPT = 1024
"""Responses; the one that was not asked for longest goes first."""

LARGEST = 256 * 1024**2
"""Characters of all of them with their conversations."""


class UnknownResponseError(JaxdeployError):
    """No response of that id is kept."""

    http_status = 404


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation of which it is the end: all items but the instructions.

    Only requests of its ``owner`` (``RequestContext.owner``) find it.
    """

    response: Response
    items: tuple[Item, ...]
    owner: str = ""

    @property
    def size(self) -> int:
        """Characters, as JSON."""
        return sum(len(part.model_dump_json()) for part in (self.response, *self.items))


class StoredResponses:
    """All responses that a server keeps. For one thread."""

    def __init__(self, most: int = KEPT, largest: int = LARGEST) -> None:
        self._most, self._largest = most, largest
        self._size = 0
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def keep(self, stored: StoredResponse) -> None:
        """Keep one until there are too many."""
        size = stored.size
        self._stored[stored.response.id] = stored, size
        self._size += size
        while len(self._stored) > self._most or self._size > self._largest:
            self._drop(next(iter(self._stored)))

    def find(self, response_id: str, owner: str = "") -> StoredResponse:
        """One of ``owner``'s by its id. Raises ``UnknownResponseError``."""
        if response_id not in self._stored or self._stored[response_id][0].owner != owner:
            raise UnknownResponseError(
                f"response {response_id!r:.80} is not kept here; the last {self._most} complete ones are, "
                "unless asked for with store=false: send the whole conversation as input"
            )
        self._stored.move_to_end(response_id)
        return self._stored[response_id][0]

    def forget(self, response_id: str, owner: str = "") -> None:
        """Drop one of ``owner``'s. Raises ``UnknownResponseError``."""
        self.find(response_id, owner)
        self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        _, size = self._stored.pop(response_id)
        self._size -= size
