"""Splits a reply into units that can be forwarded, so that one that breaks off can be replaced or end with an error."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Protocol

from jaxdeploy.server.errors import BadAnswerError, NodeFailedError
from jaxdeploy.server.proxy.nodes import clipped
from jaxdeploy.server.streaming import PING, error_event, error_line, named_error_event

MAX_HELD = 8 * 1024**2
"""Bytes that are held back. A larger reply is forwarded before it is complete; a larger event or line is an error."""

BLOCK = 4096
"""Bytes of a reply in one piece that count as progress."""

LAST_TYPES = frozenset({"message_stop", "response.completed", "response.incomplete", "response.failed"})
"""Types of the last event of a complete stream, unless that is ``[DONE]`` or an error."""

_CUT_SHORT = "the node broke off (its stream has no end); send the request again"
_EVENT_END = re.compile(rb"\n\r?\n")
PREAMBLE = frozenset(
    {
        *("message_start", "content_block_start"),
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        "response.failed",  # an error event follows, or the end
    }
)
"""Types of events that come before what was asked for."""


class Framing(Protocol):
    """``opened`` once something came that a client cannot be sent twice: the first token, or the whole."""

    opened: bool

    @property
    def units(self) -> int:
        """How many came in full: events, lines, or blocks of a reply in one piece."""

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on now that ``chunk`` came.

        Raises ``NodeFailedError`` if it reports a failure of the node, ``BadAnswerError`` if it is too large.
        """

    def end(self) -> bytes:
        """Return the rest when the connection ends. Raises ``NodeFailedError`` if the reply is not complete."""

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
        self._came = 0
        self._held = bytearray()

    @property
    def units(self) -> int:
        """Blocks that came."""
        return self._came // BLOCK

    def feed(self, chunk: bytes) -> bytes:
        """Nothing, as long as the reply is not too large."""
        self._held += chunk
        self._came += len(chunk)
        self.opened = self.opened or len(self._held) > MAX_HELD
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
        self.units = 0
        self._rest = bytearray()
        self._last = b""

    def feed(self, chunk: bytes) -> bytes:
        """Whole lines."""
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._rest += chunk
            _check_size(self._rest, "a line")
            return b""
        whole = bytes(self._rest) + chunk[:end]
        self._rest = bytearray(chunk[end:])
        self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        self.units += 1
        self.opened = True
        return whole

    def end(self) -> bytes:
        """Return a line without a line end. The reply is complete unless its last line has no finish reason."""
        last = _json_object(bytes(self._rest) or self._last)
        if last is None or last.get("finish_reason", "") is None:
            raise NodeFailedError(_CUT_SHORT)
        return bytes(self._rest)

    def error(self, error: Exception) -> bytes | None:
        """The last line."""
        return error_line(error).encode()


class Events:
    """Server-sent events; those before the first token are held, pings pass."""

    def __init__(self) -> None:
        self.opened = False
        self.units = 0
        self._held = bytearray()
        self._rest = bytearray()
        self._last = b""
        """The last whole event that is not a comment."""
        self._named = False

    def feed(self, chunk: bytes) -> bytes:
        """Whole events, from the first that has content."""
        passed = b""
        for event in self._whole_events(chunk):
            self._named = self._named or event.startswith(b"event:")
            data = None if self.opened else _data(event)
            if self.opened or not _is_preamble(data) or len(self._held) > MAX_HELD:
                self.opened = True
                passed += self._held + event
                self._held.clear()
            elif data is None or data.get("type") == "ping":
                passed += PING.encode()  # whatever its form, none may come before the events that are held
            else:
                self._held += event
        return passed

    def end(self) -> bytes:
        """Return the events that are held."""
        rest = bytes(self._rest)
        if not _is_last(self._last) and not _is_last(rest):
            raise NodeFailedError(_CUT_SHORT)
        return bytes(self._held) + rest

    def error(self, error: Exception) -> bytes | None:
        """The last event."""
        return (named_error_event if self._named else error_event)(error).encode()

    def _whole_events(self, chunk: bytes) -> list[bytes]:
        """The events that ``chunk`` completes, as one piece once the reply has begun."""
        seen = max(0, len(self._rest) - 2)  # an event's end may have begun in the chunk before
        self._rest += chunk
        ends = [found.end() for found in _EVENT_END.finditer(self._rest, seen)]
        _check_size(self._rest[ends[-1] :] if ends else self._rest, "an event")
        self.units += len(ends)
        for begin, end in itertools.pairwise([0, *ends]):
            if not self._rest.startswith(b":", begin):
                self._last = bytes(self._rest[begin:end])
        cuts = ends[-1:] if self.opened else ends
        events = [bytes(self._rest[begin:end]) for begin, end in itertools.pairwise([0, *cuts])]
        del self._rest[: cuts[-1] if cuts else 0]
        return events


def _check_size(rest: bytearray, what: str) -> None:
    if len(rest) > MAX_HELD:
        raise BadAnswerError(f"{what} of the node has more than {MAX_HELD} bytes; ask for less")


def _data(event: bytes) -> Any:
    """The JSON of an event, ``None`` for a comment, ``[DONE]`` as it is."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    try:
        return json.loads(b"\n".join(lines))
    except (ValueError, RecursionError):
        return b"\n".join(lines)


def _json_object(text: bytes) -> dict[str, Any] | None:
    """Return ``text`` as a JSON object, or ``None`` if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_last(event: bytes) -> bool:
    """Return whether ``event`` ends a complete stream."""
    data = _data(event)
    if isinstance(data, dict):
        return bool(data.get("error")) or str(data.get("type")) in {*LAST_TYPES, "error"}
    return bool(data == b"[DONE]")


def _is_preamble(data: Any) -> bool:
    """Whether nothing of what was asked for is in it. Raises ``NodeFailedError`` for a failure of the node's."""
    if not isinstance(data, dict):
        return data is None
    error = data.get("error")
    if isinstance(error, dict) and error.get("type") in ("server_error", "api_error"):
        raise NodeFailedError(f"the node failed: {clipped(str(error.get('message')))}")
    if str(data.get("type")) in {*PREAMBLE, "ping"}:
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
