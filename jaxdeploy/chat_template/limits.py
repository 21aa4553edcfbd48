"""How much one rendering of a chat template may compute and store."""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, ValuesView
from itertools import chain
from typing import Any

LARGEST = 2**24
"""Bytes of one value, in addition to 16 for each byte of the messages."""
STEPS = 250_000
"""Operations, in addition to one for each byte of the messages. An operation on a large value counts once per KiB."""
SECONDS = 4.0
"""Default CPU time of the rendering thread."""
BETWEEN_CLOCKS = 1024

_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)
_ATOMS = frozenset({str, bytes, int, bool})


class LimitError(Exception):
    """A template needs more than a rendering may use."""


class Meter:
    """The use of one rendering.

    Containers cannot change inside the sandbox, so the size of each is computed once. A container that is reachable
    on several ways counts every time: its text, its comparison and its hash would visit it every time, too.
    """

    def __init__(self, given: Any, seconds: float = SECONDS) -> None:
        self._sizes: dict[int, tuple[Any, int]] = {}
        bytes_given = self.size(given)
        self.largest = LARGEST + 16 * bytes_given
        self._steps = STEPS + bytes_given
        self._next_clock = self._steps
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds

    def spend(self, operations: int = 1) -> None:
        """Count ``operations``. Raises ``LimitError``."""
        self._steps -= operations
        if self._steps <= self._next_clock:
            self._look_at_clock()

    def allow(self, size: int) -> None:
        """Raise ``LimitError`` unless a value may have ``size`` bytes."""
        if size > self.largest:
            raise LimitError(f"it builds a value of more than {self.largest >> 20} MiB")

    def made(self, value: Any) -> Any:
        """Return ``value``, a new one, after counting it. Raises ``LimitError``."""
        size = value.__sizeof__() if type(value) is str else self.size(value)
        if size > self.largest:
            self.allow(size)
        self._steps -= 1 + (size >> 10)
        if self._steps <= self._next_clock:
            self._look_at_clock()
        return value

    def size(self, value: Any) -> int:
        """Return the bytes of ``value`` and of all values that it contains."""
        if isinstance(value, str | bytes | int):
            return value.__sizeof__()
        return self._contained(value) if isinstance(value, _CONTAINERS) else 64

    def _contained(self, value: Any) -> int:
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        size = 64
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            if type(item) in _ATOMS:
                size += 8 + item.__sizeof__()
            elif type(item) in _CONTAINERS:
                size += 8 + self._contained(item)
            elif item is None:
                size += 8 + 64
            else:
                size += 8 + self.size(item)
        self._sizes[id(value)] = (value, size)  # the reference keeps the id from being used again
        return size

    def _look_at_clock(self) -> None:
        self._next_clock = self._steps - BETWEEN_CLOCKS
        if self._steps < 0:
            raise LimitError("it takes too many steps")
        if time.thread_time() > self._deadline:
            raise LimitError(f"it takes more than {self._seconds:g} s")
