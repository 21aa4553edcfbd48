"""What a parser makes of a reply, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Text:
    """Something said to the user."""

    text: str


@dataclass(frozen=True)
class Thought:
    """Something the model says to itself."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """The ``index``-th call of the reply, by the function's name."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the JSON text of that call's arguments."""

    index: int
    piece: str


Event: TypeAlias = Text | Thought | CallBegins | CallArguments


class Parser(Protocol):
    """An incremental state machine over the text of one reply. How the text is split into pieces changes nothing."""

    def push(self, text: str) -> list[Event]:
        """What is certain now that ``text`` has come."""
        ...

    def finish(self) -> list[Event]:
        """The rest, once no text follows."""
        ...
