"""Detects an engine that has work and makes no progress."""

from __future__ import annotations

import time

from jaxdeploy.engine.stats import EngineStats


class Watchdog:
    """Measures how long an engine with work has run no step. It may be called at any interval."""

    def __init__(self) -> None:
        self._steps = -1
        self._busy = False
        self._since = 0.0

    def stalled_for(self, stats: EngineStats) -> float:
        """Return the seconds since the first call that found the engine with work and at its present step.

        Work that arrived after the last call counts from this call: the time of its arrival is unknown.
        """
        now = time.monotonic()
        busy = bool(stats.running or stats.waiting) and not stats.fault
        if stats.steps != self._steps or not (busy and self._busy):
            self._since = now
        self._steps = stats.steps
        self._busy = busy
        return now - self._since
