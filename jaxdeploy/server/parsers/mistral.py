"""Mistral's calls: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``.

Later models write ``[TOOL_CALLS]name[ARGS]{...}`` for each.
"""

from __future__ import annotations

from jaxdeploy.server.parsers.call_object import Call, CallObject, NamedArguments
from jaxdeploy.server.parsers.events import Event, Parser, Text
from jaxdeploy.server.parsers.marks import forming

SIGN = "[TOOL_CALLS]"
"""In a chat template it tells of this form."""

BEGIN, BETWEEN, END = "[TOOL_CALLS][", ", ", "]"
ARGUMENTS = "arguments"
_SKIPPED = " \t\r\n,]["


class MistralCalls:
    """See the module."""

    def __init__(self) -> None:
        self._held = ""
        self._calling = False
        self._count = 0
        self._call: Call | None = None

    def push(self, text: str) -> list[Event]:
        """See ``Parser``."""
        self._held += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See ``Parser``."""
        rest = self._call.raw if self._call is not None and not self._call.began else ""
        rest += self._held.strip(_SKIPPED) if self._calling else self._held
        self._held, self._call = "", None
        return [Text(rest)] if rest else []

    def _step(self, events: list[Event]) -> bool:
        """Read some of the held text; whether there is more to read."""
        if self._call is not None:
            return self._read_call(self._call, events)
        if self._calling:
            return self._next_call()
        before, mark, after = self._held.partition(SIGN)
        certain = before if mark else before[: len(before) - forming(before, [SIGN])]
        if certain:
            events.append(Text(certain))
        self._calling = bool(mark)
        self._held = after if mark else before[len(certain) :]
        return self._calling

    def _next_call(self) -> bool:
        rest = self._held.lstrip(_SKIPPED)
        if SIGN[1:].startswith(rest):
            return False
        rest = rest.removeprefix(SIGN[1:]).lstrip(_SKIPPED)
        if rest.startswith("{"):
            self._held, self._call = rest, CallObject(self._count)
            return True
        name, brace, arguments = rest.partition("{")
        if not brace:
            return False
        self._call = NamedArguments(self._count, name.strip().removesuffix("[ARGS]").strip())
        self._held = brace + arguments
        return True

    def _read_call(self, call: Call, events: list[Event]) -> bool:
        self._held = call.push(self._held)
        events += call.events()
        if not call.done:
            return False
        self._call = None
        self._count += call.began
        return True


def parser() -> Parser:
    """For one reply."""
    return MistralCalls()
