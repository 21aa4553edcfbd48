"""Llama 3's calls: the whole reply is one or more objects ``{"name": ..., "parameters": {...}}`` with ``;`` between.

``<|python_tag|>`` may stand before them. A reply that begins otherwise is text.
"""

from __future__ import annotations

from jaxdeploy.server.parsers.call_object import CallObject
from jaxdeploy.server.parsers.events import Event, Parser, Text

SIGN = "<|python_tag|>"
"""In a chat template it tells of this form."""

BEGIN, BETWEEN, END = "", "; ", ""
ARGUMENTS = "parameters"
_SKIPPED = " \t\r\n;"


class Llama3Calls:
    """See the module."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False
        self._count = 0
        self._call: CallObject | None = None

    def push(self, text: str) -> list[Event]:
        """See ``Parser``."""
        self._held += text
        events: list[Event] = []
        while self._held and self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See ``Parser``."""
        raw = self._call.raw if self._call is not None and not self._call.began else ""
        rest = raw + ("" if self._count else self._held)
        self._held, self._call = "", None
        return [Text(rest)] if rest else []

    def _step(self, events: list[Event]) -> bool:
        """Read some of the held text; whether there is more to read."""
        if self._is_text:
            events.append(Text(self._held))
            self._held = ""
            return False
        if self._call is not None:
            return self._read_call(self._call, events)
        rest = self._held.lstrip(_SKIPPED)
        if not rest or (not self._count and SIGN.startswith(rest)):
            return False
        rest = rest.removeprefix(SIGN).lstrip(_SKIPPED)
        if rest.startswith("{"):
            self._held, self._call = rest, CallObject(self._count)
        elif rest:
            self._held, self._is_text = self._held.replace(SIGN, "", 1), True
        return bool(rest)

    def _read_call(self, call: CallObject, events: list[Event]) -> bool:
        self._held = call.push(self._held)
        events += call.events()
        if not call.done:
            return False
        self._call = None
        if call.began:
            self._count += 1
        else:
            self._held, self._is_text = call.raw + self._held, True
        return True


def parser() -> Parser:
    """For one reply."""
    return Llama3Calls()
