"""Threads for work on texts. Long texts use separate threads, so that they do not delay short ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LONG = 2**16
"""Characters of a text that takes long."""
SHORT_THREADS, LONG_THREADS = 8, 2


class TextThreads:
    """The threads of one server."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, "jaxdeploy-text")
        self._long = ThreadPoolExecutor(LONG_THREADS, "jaxdeploy-long-text")

    def run(self, work: Callable[[], T], size: int = 0) -> asyncio.Future[T]:
        """Begin ``work`` on ``size`` characters, and return its future.

        Work is dropped if its caller is cancelled before it begins.
        """
        threads = self._long if size > LONG else self._short
        return asyncio.get_running_loop().run_in_executor(threads, work)

    def close(self) -> None:
        """End the threads."""
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)
