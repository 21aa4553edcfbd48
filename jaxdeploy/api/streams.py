"""Several readers share one generator. Each gets the outputs of its requests, even if another one ran the step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from jaxdeploy.errors import RequestError
from jaxdeploy.messages import FinishReason, Request, TextOutput

if TYPE_CHECKING:
    from jaxdeploy.engine.front.generator import Generator


T = TypeVar("T")


class Streams:
    """Steps the generator while there are readers. Several threads may use it."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._lock = threading.Lock()
        self._boxes: dict[str, deque[TextOutput]] = {}
        self._stopped: deque[str] = deque()
        self._closed = False

    def read(self, requests: Sequence[Request]) -> Iterator[TextOutput]:
        """Run ``requests`` and yield their outputs. When the reader leaves, those that still run are dropped.

        Raises:
            RequestError: one of them cannot be served; then none is. Or ``close`` came in between.
        """
        box: deque[TextOutput] = deque()
        running: set[str] = set()
        try:
            for request in requests:
                self._submit(request, box)
                running.add(request.request_id)
            while running:
                output = self._next(box)
                if output.finish_reason is not None:
                    running.discard(output.request_id)
                yield output
        finally:
            self._drop(running)
            self._forget_stops({request.request_id for request in requests})

    def stop(self, request_ids: Sequence[str]) -> None:
        """End these requests before the next step. Takes no lock, so that signal handlers may call it."""
        self._stopped.extend(request_ids)

    def between_steps(self, ask: Callable[[], T]) -> T:
        """What the generator's engine says while no step runs."""
        with self._lock:
            return ask()

    def close(self) -> None:
        """Free the generator; it waits for the step that runs."""
        with self._lock:
            self._closed = True
            self._boxes.clear()
            self._generator.close()

    def _submit(self, request: Request, box: deque[TextOutput]) -> None:
        with self._lock:
            self._generator.submit(request)
            self._boxes[request.request_id] = box

    def _next(self, box: deque[TextOutput]) -> TextOutput:
        while not box:
            with self._lock:
                while self._stopped:
                    self._end(self._stopped.popleft())
                if not box:
                    self._step()
        return box.popleft()

    def _step(self) -> None:
        if self._closed:
            raise RequestError("this pipeline was closed while a reply ran; close it after the last one")
        assert self._generator.has_work, "a reader waits for a request that is queued or runs"
        for output in self._generator.step():
            box = self._boxes.get(output.request_id)
            if output.finish_reason is not None:
                self._boxes.pop(output.request_id, None)
            if box is not None:
                box.append(output)

    def _end(self, request_id: str) -> None:
        box = self._boxes.pop(request_id, None)
        if box is not None:
            self._generator.abort(request_id)
            box.append(TextOutput(request_id, "", (), (), FinishReason.ABORT))

    def _forget_stops(self, request_ids: set[str]) -> None:
        """Forget what ``stop`` said of requests that have ended: others may have their names later."""
        with self._lock:
            for request_id in request_ids.intersection(self._stopped):
                while request_id in self._stopped:
                    self._stopped.remove(request_id)

    def _drop(self, request_ids: set[str]) -> None:
        with self._lock:
            for request_id in request_ids:
                if self._boxes.pop(request_id, None) is not None:
                    self._generator.abort(request_id)
