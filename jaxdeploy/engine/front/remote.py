"""An engine in a process of its own: nothing that the caller's threads do keeps its steps waiting."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxdeploy.engine.checks import RequestLimits, check_name
from jaxdeploy.engine.front import child, process
from jaxdeploy.engine.front.child import Report
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.engine.scheduling.adapters import check_adapter
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.messages import Request, StepOutput

logger = logging.getLogger("jaxdeploy")

STEP_TIMEOUT = 0.5
"""Seconds that ``step`` waits for outputs, unless it is woken."""
EXIT_TIMEOUT = 10.0
"""Seconds that the process has to end by itself."""


class RemoteEngine:
    """An engine that ``build`` makes in a separate process. One thread calls it.

    ``build`` must pickle. Only that process uses the devices: on a GPU the caller's process must not use JAX. With
    ``wait`` false the constructor returns at once; ``ready`` then reports when the engine is built.

    Raises whatever ``build`` raises.
    """

    def __init__(self, build: Callable[[], EngineLike], *, wait: bool = True) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        # ``build`` is sent as bytes: the process imports its modules (JAX) after it has begun to watch its owner.
        self._process = process.start(child.main, theirs, pickle.dumps(build), logger.getEffectiveLevel())
        theirs.close()
        self._woken, self._waker = spawn.Pipe(duplex=False)
        os.set_blocking(self._waker.fileno(), False)
        self._waking = threading.Lock()
        """Held while the waker is written to or closed: its descriptor may soon belong to another file."""
        self._waiting = select.poll()
        for readable in (self._connection, self._woken):
            self._waiting.register(readable, select.POLLIN)
        self._unfinished: set[str] = set()
        """Ids of requests that have not ended."""
        self._aborted: dict[str, int] = {}
        """Id → aborts that the process has not confirmed. Until then its outputs belong to an earlier request."""
        self._count = 0
        self._asked: dict[int, Future[None]] = {}
        """Calls that are not answered yet, by their numbers."""
        self._arrived: list[StepOutput] = []
        self._limits: RequestLimits | None = None
        self._stats = EngineStats()
        self._end: Exception | None = None
        """Why nothing more will arrive."""
        if wait:
            self._wait_until_ready()

    def ready(self, patience: float = 0.0) -> bool:
        """Whether the engine is built. Waits ``patience`` seconds for it, or until another thread calls ``wake``.

        Raises whatever ``build`` raises, or ``EngineDiedError``.
        """
        self._wait(patience)
        while self._limits is None and self._connection.poll():
            if (message := self._receive()) is not None:
                self._limits, self._stats = message
        return self._limits is not None

    @property
    def limits(self) -> RequestLimits:
        """What it takes."""
        assert self._limits is not None, "asked before ``ready``"
        return self._limits

    @property
    def stats(self) -> EngineStats:
        """State and counters as last reported. Requests that are not in the report count as waiting."""
        self._drain(0)
        unknown = len(self._unfinished) - self._stats.running
        return replace(self._stats, waiting=max(self._stats.waiting, unknown))

    @property
    def has_work(self) -> bool:
        """Whether outputs or answers are to come."""
        return bool(self._unfinished or self._asked)

    def add(self, request: Request) -> None:
        """Queue a request. Raises like ``Engine.add``."""
        if request.request_id in self._unfinished:
            check_name(request, True)
        self.limits.check(request)
        if request.adapter is not None:
            check_adapter(request.adapter, self._stats.adapters)
        self._send("add", request)
        self._unfinished.add(request.request_id)

    def abort(self, request_id: str) -> None:
        """Drop a request; one that has ended, or never was, is no error. Its id may be used again at once."""
        if request_id in self._unfinished:
            self._unfinished.remove(request_id)
            self._arrived = [output for output in self._arrived if output.request_id != request_id]
            self._aborted[request_id] = self._aborted.get(request_id, 0) + 1
            self._send("abort", request_id)

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """Have a LoRA adapter read; ``step`` takes the answer. Raises like ``Engine.load_adapter``, in the future."""
        return self._call("load_adapter", name, folder)

    def unload_adapter(self, name: str) -> Future[None]:
        """Refuse requests for an adapter; ``step`` takes the answer. Raises ``UnknownAdapterError``, in the future."""
        return self._call("unload_adapter", name)

    def wake(self) -> None:
        """Have a ``step`` that waits return. Any thread may call it."""
        with self._waking, suppress(OSError):  # it has been told often enough, or is closed
            os.write(self._waker.fileno(), b"!")

    def step(self) -> list[StepOutput]:
        """What has come since the last call; if nothing has, what comes until somebody calls ``wake``.

        Outputs that arrived before the process ended are returned first; the next call raises ``EngineDiedError``.
        """
        self._drain(0 if self._arrived else STEP_TIMEOUT)
        outputs, self._arrived = self._arrived, []
        return [output for output in outputs if self._is_current(output)]

    def close(self) -> None:
        """End the process, and with it give the device memory back."""
        if self._limits is not None and self._end is None and self._process.is_alive():
            with suppress(EngineDiedError):
                self._send("close", None)
                self._process.join(EXIT_TIMEOUT)
        process.kill(self._process)
        self._fail_calls(EngineDiedError("the engine was closed before it had answered"))
        with self._waking:
            for end in (self._connection, self._woken, self._waker):
                end.close()

    def _wait_until_ready(self) -> None:
        try:
            while not self.ready(STEP_TIMEOUT):
                pass
        except BaseException:  # Ctrl-C too: no process is left
            self.close()
            raise

    def _wait(self, patience: float) -> None:
        """Wait until something arrives or ``wake`` is called, at most ``patience`` seconds."""
        if patience and any(ready == self._woken.fileno() for ready, _ in self._waiting.poll(1000 * patience)):
            os.read(self._woken.fileno(), 4096)

    def _drain(self, patience: float) -> None:
        """Take the messages that have arrived. Wait up to ``patience`` seconds for one, or for ``wake``."""
        self._wait(patience)
        try:
            while self._end is None and self._connection.poll():
                if (message := self._receive()) is not None:
                    self._take(message)
        except Exception as error:  # the process has ended, or it reports a failure
            self._end = error
        if self._end is not None and not self._arrived:
            raise self._end

    def _take(self, report: Report) -> None:
        for request_id in report.aborted:
            self._confirm(request_id)
        self._arrived += (output for output in report.outputs if output.request_id not in self._aborted)
        self._stats = report.stats
        for number, error in report.answers:
            _settle(self._asked.pop(number), error)

    def _confirm(self, request_id: str) -> None:
        """Count an abort that the process has made. What it sends from now on belongs to a later request."""
        self._aborted[request_id] -= 1
        if not self._aborted[request_id]:
            del self._aborted[request_id]

    def _is_current(self, output: StepOutput) -> bool:
        """Return whether the request of an output has not ended; it ends with its last output."""
        if output.request_id not in self._unfinished:
            return False
        if output.finish_reason is not None:
            self._unfinished.remove(output.request_id)
        return True

    def _call(self, method: str, *arguments: Any) -> Future[None]:
        """Have a method of the engine called that answers later."""
        self._count += 1
        answer = self._asked[self._count] = Future[None]()
        self._send("call", (self._count, method, arguments))
        return answer

    def _fail_calls(self, error: Exception) -> None:
        while self._asked:
            _settle(self._asked.popitem()[1], error)

    def _send(self, what: str, about: Any) -> None:
        try:
            self._connection.send((what, about))
        except OSError:
            raise self._died() from None

    def _receive(self) -> Any:
        """The next message, or ``None`` for a log record, which goes to the handlers here.

        Raises the error that the process reports, or ``EngineDiedError`` if it has ended.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, Exception):
            self._fail_calls(EngineDiedError(f"the engine failed: {message}"))
            raise message
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
            return None
        return message

    def _died(self) -> JaxdeployError:
        self._process.join(EXIT_TIMEOUT)
        if self._process.exitcode == process.UNGUARDED:
            return process.UnguardedScriptError()
        error = EngineDiedError(f"the engine's process ended with exit code {self._process.exitcode}")
        self._fail_calls(error)
        return error


def _settle(answer: Future[None], error: Exception | None) -> None:
    """Complete ``answer``, unless the caller has cancelled it."""
    if not answer.set_running_or_notify_cancel():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)
