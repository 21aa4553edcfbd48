"""The text of a reply, parsed as it arrives: thoughts and calls are separated from the text."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Parser, Text


class ReplyParser:
    """Applies ``parsers`` to one reply. Each gets the text that the previous one leaves.

    num_calls: number of calls that have begun.

    With ``one_call`` calls after the first are dropped.
    """

    def __init__(self, parsers: Sequence[Parser], *, one_call: bool = False) -> None:
        self._parsers = parsers
        self._one_call = one_call
        self.num_calls = 0

    def push(self, text: str, *, ends: bool) -> list[Event]:
        """Return what ``text`` adds to the reply; ``ends``: nothing follows it."""
        events: list[Event] = [Text(text)] if text else []
        for parser in self._parsers:
            events = _through(parser, events, ends)
        return [event for event in events if self._is_kept(event)]

    def _is_kept(self, event: Event) -> bool:
        if isinstance(event, CallBegins):
            self.num_calls += 1
        return not (self._one_call and isinstance(event, CallBegins | CallArguments) and event.index)


def _through(parser: Parser, events: Sequence[Event], ends: bool) -> list[Event]:
    found: list[Event] = []
    for event in events:
        found += parser.push(event.text) if isinstance(event, Text) else [event]
    return found + parser.finish() if ends else found


def parsers_for(tools: ModuleType | None, reasoning: ModuleType | None, *, thinking: bool) -> list[Parser]:
    """Return new parsers for one reply."""
    found: list[Parser] = []
    if reasoning is not None:
        found.append(reasoning.parser(thinking=thinking))
    if tools is not None:
        found.append(tools.parser())
    return found
