"""The asyncio side: many callers, one engine thread, one stream of outputs per request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from jaxdeploy.config import ChatTemplateConfig, EngineConfig
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.messages import Request, TextOutput

logger = logging.getLogger("jaxdeploy")

IDLE_TIMEOUT = 1.0
"""Seconds without a command after which an idle engine is stepped, so that the death of its process is noticed."""


class _Stream:
    """Where the outputs of a request go: a queue of the caller's loop."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[TextOutput | Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def put(self, output: TextOutput | Exception) -> None:
        """From another thread."""
        _put_all(self.loop, [(self, output)])


def _put_all(loop: asyncio.AbstractEventLoop, items: list[tuple[_Stream, TextOutput | Exception]]) -> None:
    """Hand ``items`` over to streams of one ``loop``, which is woken once for all of them."""

    def put() -> None:
        for stream, output in items:
            stream.outputs.put_nowait(output)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(put)


class EngineStoppedError(JaxdeployError):
    """The engine was closed, or its thread died, while a request ran."""

    exit_code = 1
    http_status = 503


class AsyncEngine:
    """Runs a ``Generator`` in a separate thread. Coroutines submit requests and iterate over their outputs.

    ``from_pretrained`` runs the engine in a separate process; the thread then handles text only.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._stopped = False
        self.failure: Exception | None = None
        """What ended the engine's thread, unless ``close`` did."""
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="jaxdeploy-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        config: EngineConfig,
        *,
        chat_template: ChatTemplateConfig | str | None = None,
        progress: bool = False,
    ) -> AsyncEngine:
        """Load ``model`` into an engine in a separate process. Arguments and errors are those of ``Generator``."""
        return cls(
            Generator.from_pretrained(model, config, chat_template=chat_template, progress=progress, own_process=True)
        )

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is alive."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Raise ``EngineDiedError`` or ``EngineStoppedError`` if a failure ended the engine's thread."""
        if isinstance(self.failure, EngineDiedError):
            raise self.failure
        if self.failure is not None:
            raise EngineStoppedError(f"the engine stopped: {type(self.failure).__name__}: {self.failure}")

    async def generate(self, request: Request) -> AsyncIterator[TextOutput]:
        """Outputs of ``request`` until it ends. Leaving the iteration early aborts it and frees its resources.

        Raises:
            RequestError: it cannot be served. EngineStoppedError: the engine stopped before it ended.
        """
        async with aclosing(self.generate_all([request])) as outputs:
            async for output in outputs:
                yield output

    async def generate_all(self, requests: Sequence[Request]) -> AsyncGenerator[TextOutput]:
        """Outputs of all ``requests`` as they arrive. If one fails, the others are aborted."""
        stream = _Stream()
        running = {request.request_id for request in requests}
        try:
            for request in requests:
                self._send(partial(self._submit, request, stream))
            while running:
                output = await stream.outputs.get()
                if isinstance(output, Exception):
                    raise output
                if output.finish_reason is not None:
                    running.discard(output.request_id)
                yield output
        finally:
            for request_id in running:
                self._tell(partial(self._abort, request_id, stream))

    async def stats(self) -> EngineStats:
        """Return state and counters of the engine. Raises ``EngineStoppedError`` or ``EngineDiedError``."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[EngineStats] = loop.create_future()

        def look() -> None:
            try:
                self._check_running()
                answer: EngineStats | Exception = self.generator.engine.stats
            except Exception as error:  # the caller gets it; other commands continue
                answer = error
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed
                loop.call_soon_threadsafe(_resolve, found, answer)

        self._send(look)
        return await found

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read a LoRA adapter in PEFT's layout; then requests may name it. Other requests continue meanwhile.

        Raises:
            CheckpointError: it is damaged or does not fit. ConfigError: there is no room for adapters.
            EngineStoppedError, EngineDiedError: the engine ended before it was done.
        """
        await self._call(lambda: self.generator.engine.load_adapter(name, folder))

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter. Current ones continue.

        Raises ``UnknownAdapterError``, and the errors of ``load_adapter`` if the engine ends.
        """
        await self._call(lambda: self.generator.engine.unload_adapter(name))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream raises ``EngineStoppedError``."""
        self._tell(lambda: self._fail(request_id, EngineStoppedError(f"request {request_id} was aborted")))

    def close(self) -> None:
        """Stop the thread, fail running requests and free the device memory."""
        self._tell(None)
        self._thread.join()
        self.generator.close()

    async def _call(self, call: Callable[[], Future[None]]) -> None:
        """Run a call in the engine's thread, and wait for the answer."""
        answer: Future[None] = Future()

        def begin() -> None:
            try:
                self._check_running()
                call().add_done_callback(partial(_pass_on, answer))
            except Exception as error:  # the caller gets it; other commands continue
                answer.set_exception(error)

        self._send(begin)
        await asyncio.shield(asyncio.wrap_future(answer))

    def _send(self, command: Callable[[], None]) -> None:
        with self._sending:
            self._check_running()
            self._tell(command)

    def _tell(self, command: Callable[[], None] | None) -> None:
        self._commands.put(command)
        self.generator.wake()

    def _check_running(self) -> None:
        if self._stopped:
            raise EngineStoppedError("the engine has stopped; restart it")

    def _run(self) -> None:
        """The engine thread: take commands, run a step, hand out its outputs."""
        try:
            while self._handle_commands():
                self._deliver(self.generator.step())
        except EngineDiedError as error:
            self.failure = error
            logger.error("%s", error)
        except Exception as error:
            self.failure = error
            logger.exception("the engine stopped")
        self._stop()

    def _stop(self) -> None:
        """Fail running requests and late commands. No command is accepted after this."""
        with self._sending:
            self._stopped = True
        for request_id in list(self._streams):
            self._streams.pop(request_id).put(EngineStoppedError("the engine stopped while the request ran; try again"))
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()

    def _handle_commands(self) -> bool:
        """Run the commands since the last step. Return false to end the thread. An idle engine waits for a command."""
        while True:
            try:
                command = self._commands.get(block=not self.generator.has_work, timeout=IDLE_TIMEOUT)
            except Empty:
                return True
            if command is None:
                return False
            try:
                command()
            except Exception:  # if the engine has died, its next step raises
                logger.exception("a command to the engine failed")

    def _submit(self, request: Request, stream: _Stream) -> None:
        try:
            self._check_running()
            self.generator.submit(request)
        except Exception as error:  # whatever is wrong with a request is its caller's alone
            stream.put(error)
        else:
            self._streams[request.request_id] = stream

    def _deliver(self, outputs: Iterable[TextOutput]) -> None:
        """Hand ``outputs`` to their streams. Outputs of a request that has ended are dropped."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, TextOutput | Exception]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
        for loop, items in by_loop.items():
            _put_all(loop, items)

    def _abort(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:  # otherwise it was refused, and another request may have the name
            del self._streams[request_id]
            self.generator.abort(request_id)

    def _fail(self, request_id: str, error: Exception) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self.generator.abort(request_id)
            stream.put(error)


def _resolve(future: asyncio.Future[EngineStats], answer: EngineStats | Exception) -> None:
    if future.done():  # the caller has cancelled it
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _pass_on(answer: Future[None], done: Future[None]) -> None:
    if done.cancelled():
        answer.set_exception(EngineStoppedError("the engine stopped before it had answered; restart it"))
    elif (error := done.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(None)
