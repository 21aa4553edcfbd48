"""Drafts from the sequence itself: what followed its last tokens when they occurred before.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding) on prompt and reply. Of all places where the last
tokens occur, it takes the one with the longest match, and of equal ones the latest.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from jaxdeploy.engine.scheduling.sequence import Sequence

MIN_MATCH = 2
"""Last tokens that must occur earlier."""
MAX_MATCH = 32
"""Maximum tokens that are compared."""
MAX_PLACES = 16
"""Places of the same tokens that are compared, the latest ones."""


class NgramProposer:
    """Finds drafts in the sequences themselves, without a model."""

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """See ``Proposer``."""
        return {
            sequence: self._index_of(sequence).look_up(sequence.token_ids, count) for sequence, count in room.items()
        }

    def warm_up(self, progress: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Nothing is compiled."""

    def clear_blocks(self, blocks: list[int]) -> None:
        """Nothing is on the device."""

    def close(self) -> None:
        """Nothing is on the device."""

    def _index_of(self, sequence: Sequence) -> _Index:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = _Index()
        return index


class _Index:
    """The places of every run of ``MIN_MATCH`` tokens in a sequence, except the run at its end."""

    def __init__(self) -> None:
        self._places: defaultdict[tuple[int, ...], deque[int]] = defaultdict(partial(deque, maxlen=MAX_PLACES))
        """Tokens → the positions after them."""
        self._read = MIN_MATCH

    def look_up(self, token_ids: list[int], count: int) -> tuple[int, ...]:
        """Return ``count`` tokens that followed the last ones earlier, or none. Fewer are repeated."""
        for end in range(self._read, len(token_ids)):
            self._places[tuple(token_ids[end - MIN_MATCH : end])].append(end)
        self._read = max(len(token_ids), MIN_MATCH)
        places = self._places.get(tuple(token_ids[-MIN_MATCH:]))
        if not places:
            return ()
        best = max(places, key=lambda place: (_match_length(token_ids, place), place))
        return _repeated(token_ids[best : best + count], count)


def _match_length(token_ids: list[int], place: int) -> int:
    """Return how many tokens before ``place`` equal the last tokens of the sequence."""
    end = len(token_ids)
    longest = min(MAX_MATCH, place)
    for length in range(longest):
        if token_ids[place - 1 - length] != token_ids[end - 1 - length]:
            return length
    return longest


def _repeated(tokens: list[int], count: int) -> tuple[int, ...]:
    """Return ``count`` tokens: ``tokens``, which end where the sequence ends, are repeated."""
    return tuple(tokens[index % len(tokens)] for index in range(count))
