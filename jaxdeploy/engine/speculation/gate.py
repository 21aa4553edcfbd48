"""Whether drafts pay: found out by taking turns with them and without."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

FEW = 8
"""Steps after which a way of going on has been seen often enough to compare it."""
WINDOW = 32
"""Steps that are remembered of it."""
PATIENCE = 50
"""A trial that lost time is not repeated before so many times that time have passed: so trials cost 2 % at most."""
HOPELESS = 2.0
"""A trial that is so much slower ends early,"""
EARLY = 4
"""after so many steps."""
HELD_UP = 3
"""A step counts as so many usual ones at most."""


@dataclass
class _Way:
    """How steps went: the seconds of each, and the tokens that each gave a sequence."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def note(self, seconds: float, tokens: float) -> None:
        self.seconds.append(seconds)
        self.tokens.append(tokens)

    def clear(self) -> None:
        self.seconds.clear()
        self.tokens.clear()

    @property
    def seen(self) -> int:
        return len(self.seconds)

    @property
    def spent(self) -> float:
        """Seconds of all steps, but for what held one of them up."""
        most = HELD_UP * median(self.seconds)
        return sum(min(seconds, most) for seconds in self.seconds)

    @property
    def cost(self) -> float:
        """Seconds for each token of a sequence."""
        return self.spent / sum(self.tokens)


@dataclass
class _Size:
    """What is known of batches of one size: both ways, and the seconds until the next trial of drafts."""

    plain: _Way = field(default_factory=_Way)
    drafted: _Way = field(default_factory=_Way)
    wait: float = 0.0


class Gate:
    """Open where steps with drafts have been faster than steps without; batches of each size by themselves."""

    def __init__(self) -> None:
        self._sizes: defaultdict[int, _Size] = defaultdict(_Size)

    def is_open(self, batch: int) -> bool:
        """Whether a step for so many sequences should have drafts."""
        size = self._sizes[_rounded(batch)]
        return size.plain.seen >= FEW and size.wait <= 0

    def note(self, batch: int, *, drafted: bool, seconds: float, tokens: int) -> None:
        """A step for so many sequences took ``seconds`` and gave them ``tokens`` in all."""
        size = self._sizes[_rounded(batch)]
        way = size.drafted if drafted else size.plain
        way.note(seconds, tokens / batch)
        if not drafted:
            size.wait -= seconds
        elif way.seen >= EARLY and size.plain.seen:
            self._judge(size)

    def _judge(self, size: _Size) -> None:
        """Close where drafts have lost time: for long where they have lost much."""
        way, slower = size.drafted, size.drafted.cost / size.plain.cost
        if slower > (1.0 if way.seen >= FEW else HOPELESS):
            lost = way.spent - size.plain.cost * sum(way.tokens)
            size.wait = PATIENCE * max(lost, size.plain.cost)
            way.clear()


def _rounded(batch: int) -> int:
    """The power of two from ``batch`` on: so steps are padded."""
    return 1 << (batch - 1).bit_length()
