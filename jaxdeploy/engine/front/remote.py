"""An engine in a process of its own: nothing that the caller's threads do keeps its steps waiting."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import select
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jaxdeploy.engine.checks import RequestLimits, check_name
from jaxdeploy.engine.failure import failure
from jaxdeploy.engine.front import process
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.scheduling.adapters import check_adapter
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.messages import FinishReason, Request, StepOutput

logger = logging.getLogger("jaxdeploy")

PATIENCE = 0.5
"""Seconds that ``step`` waits for outputs, unless it is woken."""
SWITCH_INTERVAL = 1e-4
"""Seconds after which the thread that sends has to let the one that steps go on; Python's own 5 ms are a whole step."""
ANSWER_PAUSE = 0.01
"""Seconds between two looks for the answer to a call, while there is nothing else to do."""
LAST_WORDS = 10.0
"""Seconds that the process has to end by itself."""


class EngineDiedError(JaxdeployError):
    """The engine's process has ended; the message has the reason."""

    exit_code = 1
    http_status = 503


class RemoteEngine:
    """Stands for an engine that ``build`` makes in a process of its own. One thread calls it.

    ``build`` must pickle. Only that process touches the devices: on a GPU the caller's must not use JAX. With ``wait``
    false the constructor returns at once; ``ready`` then reports when the engine is built.

    Raises whatever ``build`` raises.
    """

    def __init__(self, build: Callable[[], EngineLike], *, wait: bool = True) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        # ``build`` travels as bytes: what it imports (JAX) is imported when the process already watches its owner.
        self._process = process.start(_serve, theirs, pickle.dumps(build), logger.getEffectiveLevel())
        theirs.close()
        self._woken, self._waker = spawn.Pipe(duplex=False)
        os.set_blocking(self._waker.fileno(), False)
        self._waking = threading.Lock()
        """Held while the waker is written to or closed: its descriptor may soon belong to another file."""
        self._waiting = select.poll()
        for readable in (self._connection, self._woken):
            self._waiting.register(readable, select.POLLIN)
        self._names: dict[str, str] = {}
        """What a request is called there → its name here: names may be used again, numbers are not."""
        self._numbers: dict[str, str] = {}
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
        """How it stands, as far as it has said. Requests that it has not mentioned count as waiting."""
        self._drain(0)
        unknown = len(self._numbers) - self._stats.running
        return replace(self._stats, waiting=max(self._stats.waiting, unknown))

    @property
    def has_work(self) -> bool:
        """Whether outputs or answers are to come."""
        return bool(self._numbers or self._asked)

    def add(self, request: Request) -> None:
        """Queue a request. Raises like ``Engine.add``."""
        check_name(request, request.request_id in self._numbers)
        self.limits.check(request)
        if request.adapter is not None:
            check_adapter(request.adapter, self._stats.adapters)
        self._count += 1
        number = f"{request.request_id}#{self._count}"
        self._send("add", replace(request, request_id=number))
        self._numbers[request.request_id] = number
        self._names[number] = request.request_id

    def abort(self, request_id: str) -> None:
        """Drop a request; one that has ended, or never was, is no error."""
        number = self._numbers.pop(request_id, None)
        if number is not None:
            del self._names[number]
            self._send("abort", number)

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
        self._drain(0 if self._arrived else PATIENCE)
        outputs, self._arrived = self._arrived, []
        return [self._named(output) for output in outputs if output.request_id in self._names]

    def close(self) -> None:
        """End the process, and with it give the device memory back."""
        if self._limits is not None and self._end is None and self._process.is_alive():
            with suppress(EngineDiedError):
                self._send("close", None)
                self._process.join(LAST_WORDS)
        process.kill(self._process)
        self._fail_calls(EngineDiedError("the engine was closed before it had answered"))
        with self._waking:
            for end in (self._connection, self._woken, self._waker):
                end.close()

    def _wait_until_ready(self) -> None:
        try:
            while not self.ready(PATIENCE):
                pass
        except BaseException:  # Ctrl-C too: no process is left
            self.close()
            raise

    def _wait(self, patience: float) -> None:
        """Wait until something arrives or ``wake`` is called, at most ``patience`` seconds."""
        if patience and any(ready == self._woken.fileno() for ready, _ in self._waiting.poll(1000 * patience)):
            os.read(self._woken.fileno(), 4096)

    def _drain(self, patience: float) -> None:
        """Take what has been sent, waiting for it, or to be woken, at most so many seconds."""
        self._wait(patience)
        try:
            while self._end is None and self._connection.poll():
                if (message := self._receive()) is not None:
                    self._take(*message)
        except Exception as error:  # the end of the process, or what it failed with
            self._end = error
        if self._end is not None and not self._arrived:
            raise self._end

    def _take(self, outputs: list[StepOutput], stats: EngineStats, answers: list[tuple[int, Exception | None]]) -> None:
        self._arrived += outputs
        self._stats = stats
        for number, error in answers:
            _settle(self._asked.pop(number), error)

    def _named(self, output: StepOutput) -> StepOutput:
        name = self._names[output.request_id]
        if output.finish_reason is not None:
            del self._names[output.request_id], self._numbers[name]
        return replace(output, request_id=name)

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
            raise self._death() from None

    def _receive(self) -> Any:
        """The next message, or ``None`` for a log record, which goes to the handlers here.

        Raises what the process reports, or ``EngineDiedError`` when it reports nothing more.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, Exception):
            self._fail_calls(EngineDiedError(f"the engine failed: {message}"))
            raise message
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
            return None
        return message

    def _death(self) -> JaxdeployError:
        self._process.join(LAST_WORDS)
        if self._process.exitcode == process.UNGUARDED:
            return process.UnguardedScriptError()
        error = EngineDiedError(f"the engine's process ended with exit code {self._process.exitcode}")
        self._fail_calls(error)
        return error


def _settle(answer: Future[None], error: Exception | None) -> None:
    """Give an answer to whoever still waits for it."""
    if not answer.set_running_or_notify_cancel():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)


class _Calls:
    """Methods of ``engine`` that were called and have not answered."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._running: dict[int, Future[None]] = {}

    @property
    def patience(self) -> float | None:
        """Seconds after which to look again whether one has; ``None``: there is none."""
        return ANSWER_PAUSE if self._running else None

    def begin(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Call a method. What it raises is its answer."""
        try:
            self._running[number] = getattr(self._engine, method)(*arguments)
        except Exception as error:  # the caller receives it; the engine goes on
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


def _serve(connection: Connection, build: bytes, log_level: int) -> None:
    """The life of the process: build an engine, obey, step, report."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    with _outbox(connection) as send:
        process.log_through(send, log_level)
        try:
            engine: EngineLike = pickle.loads(build)()
            said = engine.stats
            send((engine.limits, said))
            gc.collect()
            gc.freeze()  # what is here now stays; looking through it again and again would hold up steps
            calls, refused = _Calls(engine), list[StepOutput]()
            while _obey(connection, engine, calls, refused):
                outputs, answers = [*refused, *engine.step()], calls.answers()
                refused.clear()
                stats = engine.stats
                if outputs or answers or stats != said:
                    send((outputs, stats, answers))
                    said = stats
            engine.close()
        except Exception as error:
            send(_sendable(error))


@contextmanager
def _outbox(connection: Connection) -> Iterator[Callable[[Any], None]]:
    """Send from a thread: were the engine to wait for its reader, and the reader for it, nothing would go on."""
    messages: SimpleQueue[Any] = SimpleQueue()

    def deliver() -> None:
        with suppress(OSError):  # whoever started it is gone
            while (message := messages.get()) is not None:
                connection.send(message)

    thread = threading.Thread(target=deliver, name="jaxdeploy-outbox")
    thread.start()
    yield messages.put
    messages.put(None)
    thread.join()


def _obey(connection: Connection, engine: EngineLike, calls: _Calls, refused: list[StepOutput]) -> bool:
    """Do what was asked for since the last step, waiting while there is nothing else to do; whether to go on.

    A request that the engine does not take is ``refused``: its adapter has just been unloaded, or it breaks a rule.
    """
    patience = 0 if engine.has_work else calls.patience
    while connection.poll(patience):
        match connection.recv():
            case "add", request:
                try:
                    engine.add(request)
                except Exception as error:  # only this request ends
                    reason = failure(request.request_id, error)
                    refused.append(StepOutput(request.request_id, (), FinishReason.ERROR, error=reason))
            case "abort", name:
                try:
                    engine.abort(name)
                except Exception:  # the other requests continue
                    logger.exception("request %s could not be aborted", name)
            case "call", call:
                calls.begin(*call)
            case _:
                return False
        patience = 0
    return True


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of others does when it is pickled
        return EngineDiedError(f"the engine failed: {type(error).__name__}: {error}")
    return error
