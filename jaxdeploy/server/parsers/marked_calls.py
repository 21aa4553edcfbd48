"""Calls that stand between marks, the text of a reply around them."""

from __future__ import annotations

from jaxdeploy.server.parsers.call_object import CallObject
from jaxdeploy.server.parsers.events import Event, Text
from jaxdeploy.server.parsers.marks import first_of, forming


class MarkedCalls:
    """Reads ``text begin {call} end begin {call} end``; an object that is no call is text, marks included.

    White space before a call, and after the first one, is dropped.
    """

    def __init__(self, begin: str, end: str) -> None:
        self._begin, self._end = begin, end
        self._held = ""
        self._space = ""
        self._count = 0
        self._after_call = False
        self._call: CallObject | None = None

    def push(self, text: str) -> list[Event]:
        """See ``Parser``."""
        self._held += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See ``Parser``."""
        events: list[Event] = []
        if self._call is not None and not self._call.began:
            events += self._text(self._begin + self._call.raw)
        events += self._text(self._held)
        if self._space:
            events.append(Text(self._space))
        self._held = self._space = ""
        return events

    def _step(self, events: list[Event]) -> bool:
        """Read some of the held text; whether there is more to read."""
        if self._call is not None:
            return self._read_call(self._call, events)
        found = first_of(self._held, [self._begin, self._end])
        if found is None:
            certain = len(self._held) - forming(self._held, [self._begin, self._end])
            events += self._text(self._held[:certain])
            self._held = self._held[certain:]
            return False
        at, mark = found
        events += self._text(self._held[:at])
        self._held = self._held[at + len(mark) :]
        if mark == self._begin:
            self._call = CallObject(self._count)
        return True

    def _read_call(self, call: CallObject, events: list[Event]) -> bool:
        if not call.raw:
            self._held = self._held.lstrip()
            if self._held and self._held[0] != "{":
                self._call = None
                events += self._text(self._begin)
                return True
        self._held = call.push(self._held)
        events += call.events()
        if not call.done:
            return False
        if call.began:
            self._count += 1
            self._space, self._after_call = "", True
        else:
            events += self._text(self._begin + call.raw)
        self._call = None
        return True

    def _text(self, text: str) -> list[Event]:
        """``text`` for the user, white space at its end held back until something follows."""
        whole = self._space + text
        if self._after_call:
            whole = whole.lstrip()
        said = whole.rstrip()
        self._space = whole[len(said) :]
        if not said:
            return []
        self._after_call = False
        return [Text(said)]
