"""Measures whether drafts save time, by alternating between steps with and without them."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

MIN_SAMPLES = 8
"""Steps of a kind that must have been timed before it is compared."""
WINDOW = 32
"""Steps that are remembered of a kind."""
RETRY_FACTOR = 50
"""A trial that lost time is repeated after this many times the lost time, so trials cost at most 2 %."""
ABORT_RATIO = 2.0
"""A trial that is slower by this factor ends early."""
MIN_ABORT_SAMPLES = 4
"""Steps of a trial before it may end early."""
OUTLIER_CAP = 3
"""A step counts as at most this many median steps."""


@dataclass
class _Timings:
    """Seconds of the latest steps, and the tokens that each gave a sequence."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def record(self, seconds: float, tokens: float) -> None:
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
        """Seconds of all steps, with outliers cut off."""
        cap = OUTLIER_CAP * median(self.seconds)
        return sum(min(seconds, cap) for seconds in self.seconds)

    @property
    def cost(self) -> float:
        """Seconds per token of a sequence."""
        return self.spent / sum(self.tokens)


@dataclass
class _Size:
    """Timings of batches of one size, without drafts and with them, and the seconds until the next trial of drafts."""

    plain: _Timings = field(default_factory=_Timings)
    drafted: _Timings = field(default_factory=_Timings)
    wait: float = 0.0


class Gate:
    """Open for batch sizes with which steps with drafts were faster than steps without."""

    def __init__(self) -> None:
        self._sizes: defaultdict[int, _Size] = defaultdict(_Size)

    def is_open(self, batch: int) -> bool:
        """Whether a step for ``batch`` sequences should have drafts."""
        size = self._sizes[_rounded(batch)]
        return size.plain.seen >= MIN_SAMPLES and size.wait <= 0

    def record(self, batch: int, *, drafted: bool, seconds: float, tokens: int) -> None:
        """Record that a step for ``batch`` sequences took ``seconds`` and gave them ``tokens`` together."""
        size = self._sizes[_rounded(batch)]
        timings = size.drafted if drafted else size.plain
        timings.record(seconds, tokens / batch)
        if not drafted:
            size.wait -= seconds
        elif timings.seen >= MIN_ABORT_SAMPLES and size.plain.seen:
            self._judge(size)

    def _judge(self, size: _Size) -> None:
        """Close if drafts lost time, for a time in proportion to the loss."""
        drafted = size.drafted
        limit = 1.0 if drafted.seen >= MIN_SAMPLES else ABORT_RATIO
        if drafted.cost / size.plain.cost > limit:
            lost = drafted.spent - size.plain.cost * sum(drafted.tokens)
            size.wait = RETRY_FACTOR * max(lost, size.plain.cost)
            drafted.clear()


def _rounded(batch: int) -> int:
    """Return the smallest power of two that is at least ``batch``, to which steps are padded."""
    return 1 << (batch - 1).bit_length()
