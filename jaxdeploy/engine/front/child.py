"""The process of an engine: it handles its owner's commands, steps the engine and reports."""

from __future__ import annotations

import gc
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from jaxdeploy.engine.failure import failure
from jaxdeploy.engine.front import process
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.messages import FinishReason, Request, StepOutput

logger = logging.getLogger("jaxdeploy")

SWITCH_INTERVAL = 1e-4
"""Seconds after which the sending thread yields to the stepping one. Python's default of 5 ms is a whole step."""
ANSWER_INTERVAL = 0.01
"""Seconds between two checks whether a call has ended, while the engine is idle."""


class Report(NamedTuple):
    """What the process sends after a step.

    outputs: of requests that were added after the aborts in ``aborted``, or were not aborted.
    stats: the figures of the engine.
    answers: numbers and errors of calls that have ended.
    aborted: ids of requests that were aborted, once for each abort.
    """

    outputs: list[StepOutput]
    stats: EngineStats
    answers: list[tuple[int, Exception | None]]
    aborted: list[str]


class Calls:
    """Methods of ``engine`` that were called and have not answered."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._running: dict[int, Future[None]] = {}

    @property
    def patience(self) -> float | None:
        """Seconds after which to look again whether one has; ``None``: there is none."""
        return ANSWER_INTERVAL if self._running else None

    def begin(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Call a method. What it raises is its answer."""
        try:
            self._running[number] = getattr(self._engine, method)(*arguments)
        except Exception as error:  # the caller receives it; the engine continues
            self._running[number] = Future()
            self._running[number].set_exception(error)

    def answers(self) -> list[tuple[int, Exception | None]]:
        """Number and error of each that has since the last time."""
        done = [number for number, future in self._running.items() if future.done()]
        return [(number, _fault_of(self._running.pop(number))) for number in done]


def _fault_of(future: Future[None]) -> Exception | None:
    """What went wrong, as it can be sent."""
    error = future.exception()
    assert error is None or isinstance(error, Exception), "nobody leaves the process here"
    return None if error is None else _sendable(error)


class Commands:
    """Passes the owner's commands to ``engine``, and collects the results that its owner must know.

    refused: requests that the engine did not take, as outputs. The adapter of one may have been unloaded.
    aborted: ids of requests that were aborted.
    """

    def __init__(self, connection: Connection, engine: EngineLike, calls: Calls) -> None:
        self._connection = connection
        self._engine = engine
        self._calls = calls
        self.refused: list[StepOutput] = []
        self.aborted: list[str] = []

    def handle(self) -> bool:
        """Handle the commands since the last step, after a wait for one if the engine is idle.

        Return whether the engine continues.
        """
        self.refused, self.aborted = [], []
        timeout = 0 if self._engine.has_work else self._calls.patience
        while self._connection.poll(timeout):
            match self._connection.recv():
                case "add", request:
                    self._add(request)
                case "abort", request_id:
                    self._abort(request_id)
                case "call", call:
                    self._calls.begin(*call)
                case _:
                    return False
            timeout = 0
        return True

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Exception as error:  # only this request ends
            reason = failure(request.request_id, error)
            self.refused.append(StepOutput(request.request_id, (), FinishReason.ERROR, error=reason))

    def _abort(self, request_id: str) -> None:
        # The owner may use the id again: outputs that it gets after this belong to the new request.
        self.refused = [output for output in self.refused if output.request_id != request_id]
        self.aborted.append(request_id)
        try:
            self._engine.abort(request_id)
        except Exception:  # the other requests continue
            logger.exception("request %s could not be aborted", request_id)


def main(connection: Connection, build: bytes, log_level: int) -> None:
    """Run the process: build an engine, then handle commands, step and report."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    with _sender(connection) as send:
        process.log_through(send, log_level)
        try:
            engine: EngineLike = pickle.loads(build)()
            last_stats = engine.stats
            send((engine.limits, last_stats))
            gc.collect()
            gc.freeze()  # the objects of now stay; repeated collections would delay steps
            calls = Calls(engine)
            commands = Commands(connection, engine, calls)
            while commands.handle():
                outputs = [*commands.refused, *engine.step()]
                report = Report(outputs, engine.stats, calls.answers(), commands.aborted)
                if report != Report([], last_stats, [], []):
                    send(report)
                    last_stats = report.stats
            engine.close()
        except Exception as error:
            send(_sendable(error))


@contextmanager
def _sender(connection: Connection) -> Iterator[Callable[[Any], None]]:
    """Send from a thread. Otherwise the engine could wait for its reader while the reader waits for the engine."""
    messages: SimpleQueue[Any] = SimpleQueue()

    def deliver() -> None:
        with suppress(OSError):  # the owner has ended
            while (message := messages.get()) is not None:
                connection.send(message)

    thread = threading.Thread(target=deliver, name="jaxdeploy-sender")
    thread.start()
    yield messages.put
    messages.put(None)
    thread.join()


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of others does when it is pickled
        return EngineDiedError(f"the engine failed: {type(error).__name__}: {error}")
    return error
