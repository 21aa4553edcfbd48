"""Names for the parts of a step: seen in a profiler's trace, and told to whoever listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


class Spans:
    """``listener`` hears the name of each part and the seconds that it took on the host."""

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
