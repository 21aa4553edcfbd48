"""Drafts by looking back: where the last tokens of a sequence have occurred before, it may go on as it did then.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), on prompt and reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from jaxdeploy.engine.sequence import Sequence

SIZES = (4, 3, 2)
"""Tokens that must agree, the longest first."""


class NgramProposer:
    """Finds drafts in the sequences themselves; there is no model."""

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """See ``Proposer``."""
        return {sequence: self._index_of(sequence).drafts(sequence.token_ids, most) for sequence, most in room.items()}

    def warm_up(self, progress: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Nothing is compiled."""

    def close(self) -> None:
        """Nothing is on the device."""

    def _index_of(self, sequence: Sequence) -> _Index:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = _Index()
        return index


class _Index:
    """Where each run of tokens of a sequence was last seen, but for the one that it ends with."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        """Tokens → the place behind them."""
        self._read = 0

    def drafts(self, token_ids: list[int], most: int) -> tuple[int, ...]:
        """What came behind the last tokens before; it may run on into what it has itself guessed."""
        for end in range(max(self._read, 1), len(token_ids)):
            for size in SIZES:
                if size <= end:
                    self._behind[tuple(token_ids[end - size : end])] = end
        self._read = len(token_ids)
        for size in SIZES:
            place = self._behind.get(tuple(token_ids[-size:])) if size <= len(token_ids) else None
            if place is not None:
                return _repeated(token_ids[place : place + most], most)
        return ()


def _repeated(tokens: list[int], count: int) -> tuple[int, ...]:
    """``count`` of ``tokens``, over and over: where they end, the sequence itself ended, so they come again."""
    return tuple(tokens[index % len(tokens)] for index in range(count))
