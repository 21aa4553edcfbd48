"""Grammars of requests, compiled in worker processes before the engine sees them.

llguidance is native code: some grammars overflow its stack, others never finish compiling. A grammar that a worker has
compiled within its limits compiles in the engine too.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from subprocess import Popen
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.process import SECONDS, TOO_MUCH, Answer, ask, start
from jaxdeploy.grammar.response_format import LARGEST
from jaxdeploy.server.errors import OverloadedError

QUICK = 0.1
"""CPU seconds for the first attempt; the second, with more, does not delay those of others. Real schemas take 0.005."""

MAX_WAITING = 64
"""Requests that wait for one worker."""

PATIENCE = 15.0
"""Seconds in which a worker must answer, however busy the machine is."""

KEPT = 64
"""Answers that are kept."""

MAX_ESCAPE_LENGTH = 12
"""Characters of JSON for one character of text."""


class WorkedGrammars:
    """Turns a ``response_format`` into a grammar. Belongs to one event loop."""

    def __init__(self) -> None:
        self._lanes = _Lane(QUICK), _Lane(SECONDS)
        self._known: OrderedDict[bytes, Answer] = OrderedDict()

    async def of(self, response_format: Mapping[str, Any]) -> str | None:
        """Return a grammar that compiles in bounded time; ``None`` if any text is valid.

        When the caller is cancelled, its compilation ends.

        Raises:
            RequestError: the format has no valid form, or takes too much time or memory to compile.
            OverloadedError: too many requests wait for their grammars.
        """
        job = _written(response_format)
        key = hashlib.sha256(job).digest()
        answer = self._known.pop(key, None) or await self._try(job)
        self._known[key] = answer
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        if "fault" in answer:
            raise RequestError(str(answer["fault"]))
        return answer["grammar"]

    def close(self) -> None:
        """End the workers."""
        for lane in self._lanes:
            lane.close()

    async def _try(self, job: bytes) -> Answer:
        for lane in self._lanes:
            answer = await lane.ask(job)
            if answer is not None:
                return answer
        return {"fault": TOO_MUCH}


class _Lane:
    """One worker process, the thread that talks to it, and the requests that wait for it in their order."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turns = _Turns()
        self._thread = ThreadPoolExecutor(1, "jaxdeploy-grammar")
        self._worker: Popen[bytes] | None = None
        """Changed by the thread alone."""

    async def ask(self, job: bytes) -> Answer | None:
        """Return the worker's answer; ``None`` if it died of the job or was too slow. Raises ``OverloadedError``."""
        async with self._turns.one(len(job)):
            return await self._ask(job)

    def close(self) -> None:
        """End the worker."""
        self._kill()
        self._thread.submit(self._reap)
        self._thread.shutdown()

    async def _ask(self, job: bytes) -> Answer | None:
        asking = asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, job)
        try:
            return await asyncio.wait_for(asking, PATIENCE)
        except TimeoutError:
            self._kill()
            return None
        except asyncio.CancelledError:
            self._kill()
            raise

    def _kill(self) -> None:
        """Have the thread's read return."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _exchange(self, job: bytes) -> Answer | None:
        if self._worker is None:
            self._worker = start(self._seconds)
        try:
            return ask(self._worker, job)
        except (OSError, EOFError):
            self._reap()
            return None

    def _reap(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()


class _Turns:
    """Runs one job after another, the smallest first, so that a few large ones do not delay many small ones."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0

    @asynccontextmanager
    async def one(self, size: int) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises ``OverloadedError`` if too many requests wait."""
        if self._busy:
            await self._wait(size)
        self._busy = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, size: int) -> None:
        if len(self._waiting) >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} grammars wait to be compiled; try again later", 1)
        turn = asyncio.get_running_loop().create_future()
        self._count += 1
        entry = size, self._count, turn
        heapq.heappush(self._waiting, entry)
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            else:
                self._next()  # the turn had come already
            raise

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            heapq.heappop(self._waiting)[-1].set_result(None)


def _written(response_format: Mapping[str, Any]) -> bytes:
    """Return the format as JSON. Raises ``RequestError`` as soon as the text exceeds its limit."""
    parts: list[str] = []
    room = MAX_ESCAPE_LENGTH * LARGEST
    for part in json.JSONEncoder().iterencode(response_format):
        parts.append(part)
        room -= len(part)
        if room < 0:
            raise RequestError(f"response_format is larger than {LARGEST} characters; simplify it")
    return "".join(parts).encode()
