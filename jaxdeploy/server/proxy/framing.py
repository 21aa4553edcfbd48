"""Replies in the units in which they may be passed on, so that one that breaks off can be replaced, or end well."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

from jaxdeploy.server.errors import NodeFailedError
from jaxdeploy.server.streaming import PING, error_event, error_line, named_error_event

MOST_HELD = 64 * 1024**2
"""Bytes that are held back; of a larger reply the beginning is passed on before its end is there."""

_EVENT_END = re.compile(rb"\r?\n\r?\n")
PREAMBLE = frozenset(
    {
        *("message_start", "content_block_start"),
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    }
)
"""Types of events that come before what was asked for."""


class Framing(Protocol):
    """``opened`` once something came that a client cannot be sent twice: the first token, or the whole."""

    opened: bool

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on now that ``chunk`` came. Raises ``NodeFailedError`` where it says so itself."""

    def end(self) -> bytes:
        """What is left when all has come."""

    def error(self, error: Exception) -> bytes | None:
        """How the reply ends when the rest cannot come; ``None``: it cannot be told."""


def framing_of(media_type: str) -> Framing:
    """The one for replies of a type."""
    kind = media_type.partition(";")[0].strip().lower()
    known: dict[str, type[Framing]] = {"text/event-stream": Events, "application/x-ndjson": Lines}
    return known.get(kind, Whole)()


class Whole:
    """One piece, passed on when its end has come."""

    def __init__(self) -> None:
        self.opened = False
        self._held = bytearray()

    def feed(self, chunk: bytes) -> bytes:
        """Nothing, as long as the reply is not too large."""
        self._held += chunk
        self.opened = self.opened or len(self._held) > MOST_HELD
        return self.end() if self.opened else b""

    def end(self) -> bytes:
        """All that is held."""
        held, self._held = bytes(self._held), bytearray()
        return held

    def error(self, error: Exception) -> bytes | None:
        """There is no way but to break off."""
        return None


class Lines:
    """Lines of JSON."""

    def __init__(self) -> None:
        self.opened = False
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Whole lines."""
        whole, end, self._rest = (self._rest + chunk).rpartition(b"\n")
        self.opened = self.opened or bool(end)
        return whole + end

    def end(self) -> bytes:
        """A line without an end."""
        return self._rest

    def error(self, error: Exception) -> bytes | None:
        """The last line."""
        return error_line(error).encode()


class Events:
    """Server-sent events; those before the first token are held, pings pass."""

    def __init__(self) -> None:
        self.opened = False
        self._held = b""
        self._rest = b""
        self._named = False

    def feed(self, chunk: bytes) -> bytes:
        """Whole events, from the first that has something on."""
        events = self._whole_events(chunk)
        if self.opened:
            return b"".join(events)
        passed = b""
        for event in events:
            self._named = self._named or event.startswith(b"event:")
            data = None if self.opened else _data(event)
            if self.opened or not _is_preamble(data) or len(self._held) > MOST_HELD:
                self.opened = True
                passed += self._held + event
                self._held = b""
            elif data is None or data.get("type") == "ping":
                passed += PING.encode()  # whatever its form, none may come before the events that are held
            else:
                self._held += event
        return passed

    def end(self) -> bytes:
        """What was held to the end."""
        return self._held + self._rest

    def error(self, error: Exception) -> bytes | None:
        """The last event."""
        return (named_error_event if self._named else error_event)(error).encode()

    def _whole_events(self, chunk: bytes) -> list[bytes]:
        have, begun = self._rest + chunk, 0
        events = []
        for found in _EVENT_END.finditer(have):
            events.append(have[begun : found.end()])
            begun = found.end()
        self._rest = have[begun:]
        if len(self._rest) > MOST_HELD:
            raise NodeFailedError(f"an event of the node has more than {MOST_HELD} bytes; ask for less")
        return events


def _data(event: bytes) -> Any:
    """The JSON of an event, ``None`` for a comment, ``[DONE]`` as it is."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    try:
        return json.loads(b"\n".join(lines))
    except ValueError:
        return b"\n".join(lines)


def _is_preamble(data: Any) -> bool:
    """Whether nothing of what was asked for is in it. Raises ``NodeFailedError`` for a failure of the node's."""
    if not isinstance(data, dict):
        return data is None
    error = data.get("error")
    if isinstance(error, dict) and error.get("type") in ("server_error", "api_error"):
        raise NodeFailedError(f"the node failed: {error.get('message')}")
    if data.get("type") in PREAMBLE or data.get("type") == "ping":
        return True
    choices = data.get("choices")
    return isinstance(choices, list) and bool(choices) and all(_says_nothing(choice) for choice in choices)


def _says_nothing(choice: Any) -> bool:
    """A choice of OpenAI's that tells no more than who will speak."""
    if not isinstance(choice, dict) or choice.get("finish_reason") or choice.get("text"):
        return False
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return choice.get("text") == ""
    return not any(value for name, value in delta.items() if name != "role")
