"""Thoughts between ``<think>`` and ``</think>`` at the beginning of a reply: DeepSeek-R1, Qwen3 and others."""

from __future__ import annotations

from enum import Enum, auto

from jaxdeploy.server.parsers.events import Event, Parser, Text, Thought
from jaxdeploy.server.parsers.marks import forming

SIGN = END = "</think>"
BEGIN = "<think>"


class _State(Enum):
    UNDECIDED = auto()
    THINKING = auto()
    SPEAKING = auto()


class Think:
    """``thinking``: the reply begins with a thought whose first mark the prompt has brought already.

    White space around the marks is dropped.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._held = ""
        self._state = _State.THINKING if thinking else _State.UNDECIDED
        self._skips_space = thinking

    def push(self, text: str) -> list[Event]:
        """See ``Parser``."""
        self._held += text
        events: list[Event] = []
        if self._state is _State.UNDECIDED:
            self._decide()
        if self._state is _State.THINKING:
            self._think(events)
        if self._state is _State.SPEAKING:
            self._speak(events)
        return events

    def finish(self) -> list[Event]:
        """See ``Parser``."""
        rest, self._held = self._held, ""
        if self._state is _State.THINKING:
            return [Thought(rest.rstrip())] if rest.strip() else []
        return [Text(rest)] if rest else []

    def _decide(self) -> None:
        rest = self._held.lstrip()
        if rest.startswith(BEGIN):
            self._held, self._skips_space, self._state = rest.removeprefix(BEGIN), True, _State.THINKING
        elif not BEGIN.startswith(rest):
            self._state = _State.SPEAKING

    def _think(self, events: list[Event]) -> None:
        self._strip()
        thought, mark, rest = self._held.partition(END)
        certain = thought if mark else thought[: len(thought) - forming(thought, [END])]
        said = certain.rstrip()
        if said:
            events.append(Thought(said))
            self._skips_space = False
        if mark:
            self._held, self._skips_space, self._state = rest, True, _State.SPEAKING
        else:
            self._held = self._held[len(said) :]

    def _speak(self, events: list[Event]) -> None:
        self._strip()
        if self._held:
            events.append(Text(self._held))
            self._held, self._skips_space = "", False

    def _strip(self) -> None:
        if self._skips_space:
            self._held = self._held.lstrip()


def parser(*, thinking: bool = False) -> Parser:
    """For one reply."""
    return Think(thinking=thinking)
