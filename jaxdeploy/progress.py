"""Reports of how far a long task is: a bar on a terminal, or lines in the log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

logger = logging.getLogger("jaxdeploy")

T = TypeVar("T")

INTERVAL = 5.0
"""Seconds between two lines of the log."""
MIB = 2**20


@contextmanager
def progress(
    doing: str, done: str, total: int, unit: Literal["B", "program"], *, bar: bool
) -> Iterator[Callable[[int], object]]:
    """Return a function to call with each amount that is done.

    Args:
        doing: the task, e.g. "loading weights": the label of the bar.
        done: the past of it, e.g. "loaded weights": how lines of the log begin.
        total: the whole amount.
        unit: of ``total``; bytes are shown as MiB.
        bar: show a bar on stderr, and log nothing.
    """
    if bar:
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system, which a killed process leaves
        scaled = unit == "B"
        with tqdm(total=total, desc=doing, unit=unit, unit_scale=scaled, unit_divisor=1024, leave=scaled) as shown:
            yield shown.update
        return
    lines = _Lines(done, total, unit)
    yield lines.update
    lines.write()


def counted(items: Sequence[T], doing: str, done: str, *, bar: bool) -> Iterable[T]:
    """Yield ``items``, with a report each time that one of them is done."""
    with progress(doing, done, len(items), "program", bar=bar) as update:
        for item in items:
            yield item
            update(1)


class _Lines:
    """Lines of the log, at least ``INTERVAL`` seconds apart."""

    def __init__(self, done: str, total: int, unit: str) -> None:
        self._done, self._total, self._unit = done, total, unit
        self._count = 0
        self._begun = self._written = time.monotonic()

    def update(self, count: int) -> None:
        """Add ``count``."""
        self._count += count
        if time.monotonic() - self._written >= INTERVAL and self._count < self._total:
            self.write()

    def write(self) -> None:
        """Log how much is done, and in what time."""
        self._written = time.monotonic()
        seconds = self._written - self._begun
        if self._unit == "B":
            logger.info("%s: %.0f of %.0f MiB, %.0f s", self._done, self._count / MIB, self._total / MIB, seconds)
        else:
            logger.info("%s: %d of %d %ss, %.0f s", self._done, self._count, self._total, self._unit, seconds)
