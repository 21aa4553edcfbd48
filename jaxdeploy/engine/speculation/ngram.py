"""SpeculationCounts by looking back: where a sequence has been before, it may go on as it did then.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), on prompt and reply: of all places where the
last tokens occur, the one where most of what comes before agrees as well, of equal ones the last.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from jaxdeploy.engine.scheduling.sequence import Sequence

LEAST = 2
"""Tokens that must agree."""
MOST = 32
"""Tokens that are compared."""
PLACES = 16
"""Places that are looked at, the last ones."""


class NgramProposer:
    """Finds guesses in the sequences themselves; there is no model."""

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """See ``Proposer``."""
        return {sequence: self._index_of(sequence).look_up(sequence.token_ids, most) for sequence, most in room.items()}

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
    """Where the shortest runs that count occur in a sequence, but for the one that it ends with."""

    def __init__(self) -> None:
        self._places: defaultdict[tuple[int, ...], deque[int]] = defaultdict(partial(deque, maxlen=PLACES))
        """Tokens → the places behind them."""
        self._read = LEAST

    def look_up(self, token_ids: list[int], most: int) -> tuple[int, ...]:
        """What came behind the last tokens before, as often as it takes for ``most`` tokens."""
        for end in range(self._read, len(token_ids)):
            self._places[tuple(token_ids[end - LEAST : end])].append(end)
        self._read = max(len(token_ids), LEAST)
        places = self._places.get(tuple(token_ids[-LEAST:]))
        if not places:
            return ()
        best = max(places, key=lambda place: (_agreeing(token_ids, place), place))
        return _repeated(token_ids[best : best + most], most)


def _agreeing(token_ids: list[int], place: int) -> int:
    """How many tokens before ``place`` are the last ones of all."""
    end = len(token_ids)
    most = min(MOST, place)
    return next((count for count in range(most) if token_ids[place - 1 - count] != token_ids[end - 1 - count]), most)


def _repeated(tokens: list[int], count: int) -> tuple[int, ...]:
    """``count`` of ``tokens``, over and over: where they end, the sequence itself ended, so they come again."""
    return tuple(tokens[index % len(tokens)] for index in range(count))
