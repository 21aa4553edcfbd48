"""Looking for marks in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def forming(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a mark begins with, the whole mark excluded."""
    lengths = (size for mark in marks for size in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:size]))
    return max(lengths, default=0)


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first mark stands in ``text``, and which it is."""
    found = [(text.index(mark), mark) for mark in marks if mark in text]
    return min(found, default=None)
