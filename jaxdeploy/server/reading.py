"""A reply on its way to the client: thoughts and calls are taken out of its text."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Parser, Text


class Reading:
    """Puts one reply through ``parsers``, each reading what the one before took for text.

    ``calls`` are those that have begun; ``one_call``: there are no others after the first.
    """

    def __init__(self, parsers: Sequence[Parser], *, one_call: bool = False) -> None:
        self._parsers = parsers
        self._one_call = one_call
        self.calls = 0

    def push(self, text: str, *, ends: bool) -> list[Event]:
        """What ``text`` adds to the reply; ``ends``: nothing follows it."""
        events: list[Event] = [Text(text)] if text else []
        for parser in self._parsers:
            events = _through(parser, events, ends)
        return [event for event in events if self._counts(event)]

    def _counts(self, event: Event) -> bool:
        if isinstance(event, CallBegins):
            self.calls += 1
        return not (self._one_call and isinstance(event, CallBegins | CallArguments) and event.index)


def _through(parser: Parser, events: Sequence[Event], ends: bool) -> list[Event]:
    found: list[Event] = []
    for event in events:
        found += parser.push(event.text) if isinstance(event, Text) else [event]
    return found + parser.finish() if ends else found


def parsers_for(tools: ModuleType | None, reasoning: ModuleType | None, *, thinking: bool) -> list[Parser]:
    """New parsers for one reply."""
    found: list[Parser] = []
    if reasoning is not None:
        found.append(reasoning.parser(thinking=thinking))
    if tools is not None:
        found.append(tools.parser())
    return found
