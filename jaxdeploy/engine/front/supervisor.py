"""An engine whose process is restarted when it dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jaxdeploy.engine.checks import RequestLimits, check_name
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.engine.front.remote import STEP_TIMEOUT, RemoteEngine
from jaxdeploy.engine.scheduling.adapters import check_adapter
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.messages import FinishReason, Request, StepOutput

logger = logging.getLogger("jaxdeploy")

MAX_DEATHS = 3
"""Consecutive deaths after which the engine is not restarted."""
SETTLED = 20.0
"""Seconds of service after which a death is counted as the first one again."""


@dataclass(slots=True)
class _Held:
    """A request that has not ended.

    deadline: time of ``time.monotonic`` at which it is aborted.
    sent: whether the present process has it.
    started: whether an output was delivered.
    suspect: whether a process died while it had the request.
    """

    request: Request
    deadline: float | None
    sent: bool = False
    started: bool = False
    suspect: bool = False


class Supervisor:
    """Runs the engine that ``build`` makes in a process (``RemoteEngine``), and restarts it. One thread calls it.

    When the process dies:

    - requests with outputs end with ``EngineDiedError``;
    - requests without outputs are sent to the next process. One that was in two processes that died is not sent to a
      third: it may be the cause;
    - new requests wait, and adapters that were loaded at run time are loaded again.

    After ``MAX_DEATHS`` consecutive deaths, each within ``SETTLED`` seconds of service, ``step`` raises
    ``EngineDiedError``. A failure while the first process is built is raised by the constructor.
    """

    def __init__(self, build: Callable[[], EngineLike]) -> None:
        self._build = build
        self._engine = RemoteEngine(build)
        self._limits = self._engine.limits
        self._held: dict[str, _Held] = {}
        self._ended: list[StepOutput] = []
        """Outputs of requests that end here and not in the process."""
        self._adapters: dict[str, str | Path | None] = {}
        """Changes since the start: name → folder, or ``None`` if the adapter was unloaded."""
        self._changes: list[tuple[str, Future[None]]] | None = None
        """The same changes while a new process makes them."""
        self._fault = ""
        """Why the engine is being restarted; empty while it serves."""
        self._end: EngineDiedError | None = None
        """Why the engine is not restarted any more."""
        self._deaths = 0
        self._restarts = 0
        self._serves_since: float | None = time.monotonic()
        self._before = EngineStats()
        """Counts of earlier processes."""
        self._stats = self._engine.stats

    @property
    def limits(self) -> RequestLimits:
        """Return the limits of the engine."""
        return self._limits

    @property
    def has_work(self) -> bool:
        """Return whether outputs, answers or a restart are expected."""
        return bool(self._held or self._ended or self._fault or self._end or self._engine.has_work)

    @property
    def stats(self) -> EngineStats:
        """Return the sums over all processes. ``fault`` is set during a restart."""
        if not self._fault:
            self._look()
        now = self._stats
        if self._fault:
            waiting = sum(not held.started for held in self._held.values())
            now = EngineStats(waiting=waiting, blocks=now.blocks, host_blocks=now.host_blocks, adapters=now.adapters)
        return replace(now.plus(self._before), fault=self._fault, restarts=self._restarts)

    def add(self, request: Request) -> None:
        """Queue a request. Raises like ``Engine.add``."""
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        held = _Held(request, deadline)
        if self._fault:
            check_name(request, request.request_id in self._held)
            self._limits.check(request)
            if request.adapter is not None:
                check_adapter(request.adapter, self._stats.adapters)
        else:
            self._send(held)
        self._held[request.request_id] = held

    def abort(self, request_id: str) -> None:
        """Drop a request; one that has ended, or never was, is no error."""
        held = self._held.pop(request_id, None)
        self._ended = [output for output in self._ended if output.request_id != request_id]
        if held is not None and held.sent:
            with suppress(EngineDiedError):  # ``step`` handles it
                self._engine.abort(request_id)

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """Have a LoRA adapter read. Raises like ``RemoteEngine``'s; ``EngineDiedError`` during a restart."""
        return self._change(name, folder)

    def unload_adapter(self, name: str) -> Future[None]:
        """Refuse requests for an adapter. Raises like ``RemoteEngine``'s; ``EngineDiedError`` during a restart."""
        return self._change(name, None)

    def wake(self) -> None:
        """Have a ``step`` that waits return. Any thread may call it."""
        self._engine.wake()

    def step(self) -> list[StepOutput]:
        """Return the outputs since the last call, after a wait as in ``RemoteEngine.step``.

        Raises ``EngineDiedError`` when the engine is not restarted any more.
        """
        outputs = self._restart_further() if self._fault else self._outputs()
        outputs += self._ended
        self._ended = []
        if self._end is not None and not outputs:
            raise self._end
        return outputs

    def close(self) -> None:
        """End the process, and with it give the device memory back."""
        self._engine.close()

    def _outputs(self) -> list[StepOutput]:
        """Return the engine's outputs; none when it has died."""
        try:
            outputs = self._engine.step()
        except Exception as error:  # RemoteEngine is of no use afterwards, whatever went wrong
            self._lose(error)
            return []
        for output in outputs:
            held = self._held.get(output.request_id)
            if held is not None:
                held.started = True
            if output.finish_reason is not None:
                self._held.pop(output.request_id, None)
        return outputs

    def _look(self) -> None:
        try:
            self._stats = self._engine.stats
        except Exception as error:
            self._lose(error)

    def _send(self, held: _Held) -> None:
        """Give a request to the process. Raises ``RequestError``; a process that is dead gets nothing."""
        with suppress(EngineDiedError):  # ``step`` handles it
            self._engine.add(held.request)
            held.sent = True

    def _change(self, name: str, folder: str | Path | None) -> Future[None]:
        if self._fault:
            answer: Future[None] = Future()
            answer.set_exception(EngineDiedError(f"the engine is being restarted ({self._fault}); try again later"))
            return answer
        answer = self._told(name, folder)
        answer.add_done_callback(partial(self._note_change, name, folder))
        return answer

    def _told(self, name: str, folder: str | Path | None) -> Future[None]:
        return self._engine.unload_adapter(name) if folder is None else self._engine.load_adapter(name, folder)

    def _note_change(self, name: str, folder: str | Path | None, answer: Future[None]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self._adapters[name] = folder

    def _lose(self, error: Exception) -> None:
        """The process is dead: end the requests that must not be sent again, and start another process."""
        now = time.monotonic()
        served = 0.0 if self._serves_since is None else now - self._serves_since
        self._deaths = 1 if served >= SETTLED else self._deaths + 1
        if not self._fault:
            self._before = self._stats.plus(self._before)
        self._fault, self._serves_since, self._changes = str(error) or type(error).__name__, None, None
        logger.error("the engine failed: %s", self._fault)
        self._engine.close()
        for held in list(self._held.values()):
            self._release(held)
        if self._deaths >= MAX_DEATHS:
            self._give_up(f"it failed {self._deaths} times in a row; the last time: {self._fault}")
            return
        try:
            self._engine = RemoteEngine(self._build, wait=False)
        except OSError as fault:
            self._give_up(f"its process cannot be started ({fault}) after: {self._fault}")

    def _release(self, held: _Held) -> None:
        """End a request that the dead process had, unless another process may have it."""
        if held.started:
            message = f"the engine failed while the request ran ({self._fault}); send it again"
        elif held.sent and held.suspect:
            message = f"the engine failed twice while it had the request ({self._fault}); it may be the cause"
        else:
            held.suspect, held.sent = held.suspect or held.sent, False
            return
        self._finish(held, FinishReason.ERROR, EngineDiedError(message))

    def _give_up(self, reason: str) -> None:
        self._end = EngineDiedError(f"the engine is not restarted: {reason}")

    def _finish(self, held: _Held, reason: FinishReason, error: JaxdeployError | None = None) -> None:
        del self._held[held.request.request_id]
        self._ended.append(StepOutput(held.request.request_id, (), reason, error=error))

    def _restart_further(self) -> list[StepOutput]:
        """Wait for the new process; when it is ready, load the adapters and send the requests."""
        try:
            if self._end is None and self._engine.ready(STEP_TIMEOUT) and self._has_adapters():
                self._serve_again()
        except Exception as error:
            self._lose(error)
        for held in list(self._held.values()):
            self._expire(held)
        return []

    def _has_adapters(self) -> bool:
        """Return whether the new process has made the changes since the start. A change that fails is logged."""
        if self._changes is None:
            self._changes = [(name, self._told(name, folder)) for name, folder in self._adapters.items()]
        if not all(change.done() for _, change in self._changes):
            self._engine.step()
            return False
        for name, change in self._changes:
            if (error := change.exception()) is not None:
                logger.error("adapter %r is lost: %s", name, error)
        return True

    def _serve_again(self) -> None:
        self._stats = self._engine.stats
        self._restarts += 1
        self._fault, self._serves_since = "", time.monotonic()
        logger.warning("the engine serves again; %d requests waited", len(self._held))
        for held in list(self._held.values()):
            self._send_again(held)

    def _send_again(self, held: _Held) -> None:
        if held.deadline is not None:
            held.request = replace(held.request, timeout=max(held.deadline - time.monotonic(), 1e-3))
        try:
            self._send(held)
        except JaxdeployError as error:  # its adapter is lost
            self._finish(held, FinishReason.ERROR, error)

    def _expire(self, held: _Held) -> None:
        """Abort a request whose time is over before a process has it."""
        if not held.sent and held.deadline is not None and held.deadline <= time.monotonic():
            self._finish(held, FinishReason.ABORT)
