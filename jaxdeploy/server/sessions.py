"""Conversations that the server remembers for its clients, by number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jaxdeploy.errors import JaxdeployError

SessionKey: TypeAlias = tuple[str, int]
"""The owner of a session (``RequestContext.owner``), and its number."""

KEPT = 4096
"""Conversations; the one that was quiet longest goes first."""


class SessionBusyError(JaxdeployError):
    """A reply runs for this session already."""

    http_status = 409


@dataclass
class Conversation:
    """What was said, how many tokens that is, and the request whose reply runs."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    request_id: str | None = None


class Sessions:
    """All conversations of a server. For one thread."""

    def __init__(self) -> None:
        self._conversations: OrderedDict[SessionKey, Conversation] = OrderedDict()

    def running(self, session: SessionKey) -> str | None:
        """The request whose reply runs for a session."""
        conversation = self._conversations.get(session)
        return None if conversation is None else conversation.request_id

    def forget(self, session: SessionKey) -> None:
        """Drop what was said."""
        self._conversations.pop(session, None)

    @contextmanager
    def turn(self, session: SessionKey, request_id: str) -> Iterator[Conversation]:
        """Within it the conversation belongs to ``request_id``. Raises ``SessionBusyError``."""
        conversation = self._conversations.setdefault(session, Conversation())
        if conversation.request_id is not None:
            raise SessionBusyError(f"session_id={session[1]} has a reply that runs; wait for its end, or cancel it")
        conversation.request_id = request_id
        self._conversations.move_to_end(session)
        while len(self._conversations) > KEPT:
            self._conversations.popitem(last=False)
        try:
            yield conversation
        finally:
            conversation.request_id = None
