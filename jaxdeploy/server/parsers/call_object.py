"""Calls as JSON, read while they are being written."""

from __future__ import annotations

import json
from typing import Protocol

from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event

ARGUMENTS = ("arguments", "parameters")


class Call(Protocol):
    """A call that is being read: ``done`` when it is complete, ``began`` if it is a call. ``raw`` is what was read."""

    done: bool
    began: bool
    raw: str

    def push(self, text: str) -> str:
        """Read ``text`` up to the call's end; what stands behind it comes back."""
        ...

    def events(self) -> list[Event]:
        """What has become certain since the last call."""
        ...


class CallObject:
    """``{"name": ..., "arguments": {...}}``: arguments are passed on as they are written, once the name is known."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.done = self.began = False
        self.raw = ""
        self._nesting = _Nesting()
        self._is_value = False
        self._token = ""
        self._key: object = None
        self._name: str | None = None
        self._arguments = ""
        self._sent = 0

    def push(self, text: str) -> str:
        """See ``Call``."""
        for at, character in enumerate(text):
            if self.done:
                return text[at:]
            self.raw += character
            self._read(character)
        return ""

    def events(self) -> list[Event]:
        """See ``Call``."""
        if self._name is None:
            return []
        found: list[Event] = [] if self.began else [CallBegins(self.index, self._name)]
        self.began = True
        written = self._written()
        if len(written) > self._sent:
            found.append(CallArguments(self.index, written[self._sent :]))
            self._sent = len(written)
        return found

    def _written(self) -> str:
        """The arguments as far as they are certain. Some models write them as a JSON text within a text, or not."""
        if self._arguments.startswith("{"):
            return self._arguments.rstrip()
        if not self.done:
            return ""
        inner = _value(self._arguments)
        return inner if isinstance(inner, str) and inner.startswith("{") else "{}"

    def _read(self, character: str) -> None:
        depth, in_string = self._nesting.depth, self._nesting.in_string
        self._nesting.read(character)
        if depth == 1 and not in_string and character in ",:}":
            self._end_of_part(character)
        elif depth > 0 and (self._token or not character.isspace()):
            self._token += character
            if self._is_value and self._key in ARGUMENTS:
                self._arguments += character

    def _end_of_part(self, mark: str) -> None:
        """A key or a value of the object itself has ended."""
        token, self._token = self._token, ""
        if mark == ":":
            self._key, self._is_value = _value(token), True
            return
        if self._is_value and self._key == "name" and isinstance(name := _value(token), str):
            self._name = name
        self._is_value = False
        self.done = mark == "}"


class NamedArguments:
    """The arguments of a call whose ``name`` is known: an object ``{...}``."""

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.done = self.began = False
        self.raw = ""
        self._name = name
        self._nesting = _Nesting()
        self._sent = 0

    def push(self, text: str) -> str:
        """See ``Call``."""
        for at, character in enumerate(text):
            if self.done:
                return text[at:]
            self.raw += character
            self._nesting.read(character)
            self.done = self._nesting.depth == 0
        return ""

    def events(self) -> list[Event]:
        """See ``Call``."""
        found: list[Event] = [] if self.began else [CallBegins(self.index, self._name)]
        self.began = True
        if len(self.raw) > self._sent:
            found.append(CallArguments(self.index, self.raw[self._sent :]))
            self._sent = len(self.raw)
        return found


class _Nesting:
    """Where in a JSON text one is."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = self._escaped = False

    def read(self, character: str) -> None:
        """Go on by a character."""
        if self.in_string:
            self.in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        else:
            self.in_string = character == '"'
            self.depth += (character in "{[") - (character in "}]")


def _value(token: str) -> object:
    try:
        return json.loads(token)
    except (ValueError, RecursionError):
        return None
