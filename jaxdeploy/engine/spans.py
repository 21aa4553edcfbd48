"""Names and times of the parts of a step, for a profiler's trace and a listener."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


class Spans:
    """Times parts of a step. ``listener`` is called with the name of each part and its seconds on the host."""

    def __init__(self) -> None:
        self.listener: Callable[[str, float], None] | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside as ``name``."""
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(name):
            yield
        if self.listener is not None:
            self.listener(name, time.perf_counter() - start)
