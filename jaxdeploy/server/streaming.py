"""Server-sent events (the HTML standard, section 9.2): the only place that knows how a stream is framed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Send

from jaxdeploy.server.error_handlers import error_reply
from jaxdeploy.server.protocol.stream_event import StreamEvent

PING_SECONDS = 15.0
"""Silence after which a comment is sent, so that nothing on the way closes the connection."""

PING = ": ping\n\n"
NAMED_PING = 'event: ping\ndata: {"type":"ping"}\n\n'
"""The same as an event, for clients that know its name."""

DONE = "data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "the reply, or its pieces"}
}
"""What a route that can stream says of itself."""

LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-ndjson": {}}, "description": "the reply, or its pieces"}
}
"""The same for a stream of lines."""


def event_stream(
    chunks: AsyncGenerator[BaseModel],
    ping_seconds: float = PING_SECONDS,
    *,
    ping: Callable[[], BaseModel] | None = None,
) -> StreamingResponse:
    """Return ``chunks`` as events, then ``[DONE]``. A failure on the way is the last event, in the form of an error.

    ``ping`` makes a chunk without content, for clients that cannot read comments (LMDeploy's).
    """
    return _Stream(chunks, _EVENTS, PING if ping is None else ping, ping_seconds)


def named_event_stream(
    events: AsyncGenerator[StreamEvent], ping: str = PING, ping_seconds: float = PING_SECONDS
) -> StreamingResponse:
    """Return ``events`` with their types as names, as Anthropic and OpenAI's responses stream.

    A failure on the way is the last event.
    """
    return _Stream(events, _NAMED_EVENTS, ping, ping_seconds)


async def line_stream(chunks: AsyncGenerator[BaseModel]) -> StreamingResponse:
    """Return ``chunks`` as lines of JSON, as LMDeploy 0.3 streamed. A failure before the first one is raised."""
    first = await anext(chunks)
    return _Stream(chunks, _LINES, first=line(first))


def event(chunk: BaseModel) -> str:
    """Return one event."""
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def named_event(event_: StreamEvent) -> str:
    """Return one event with its type as name."""
    return f"event: {event_.type}\n{event(event_)}"


def line(chunk: BaseModel) -> str:
    """Return one line of JSON."""
    return f"{chunk.model_dump_json()}\n"


def error_event(error: Exception) -> str:
    """Return the last event of a stream that fails on the way."""
    return event(error_reply(error))


def named_error_event(error: Exception) -> str:
    """Return the same as Anthropic streams it."""
    return f"event: error\ndata: {error_reply(error).model_dump_json()}\n\n"


def error_line(error: Exception) -> str:
    """Return the same for a stream of lines."""
    return f"{error_reply(error).model_dump_json()}\n"


class _Framing(NamedTuple):
    """How chunks are written.

    frame: the text of a chunk.
    error: the text for a failure on the way.
    end: the text at the end.
    media_type: of the answer.
    headers: of the answer.
    """

    frame: Callable[[Any], str]
    error: Callable[[Exception], str]
    end: str
    media_type: str
    headers: Mapping[str, str]


_EVENTS = _Framing(event, error_event, DONE, "text/event-stream", _HEADERS)
_NAMED_EVENTS = _Framing(named_event, named_error_event, "", "text/event-stream", _HEADERS)
_LINES = _Framing(line, error_line, "", "application/x-ndjson", {})


class _Stream(StreamingResponse):
    """Sends ``chunks``, and ``ping`` when nothing has been sent for ``ping_seconds``. ``first`` is sent before all."""

    def __init__(
        self,
        chunks: AsyncGenerator[Any],
        framing: _Framing,
        ping: str | Callable[[], BaseModel] = "",
        ping_seconds: float = math.inf,
        first: str = "",
    ) -> None:
        super().__init__(chunks, media_type=framing.media_type, headers=framing.headers)
        self._chunks, self._framing, self._first = chunks, framing, first
        self._ping, self._ping_seconds = ping, ping_seconds
        self._sent_at = 0.0
        """When anything was sent last, on the monotonic clock; infinity when all has been sent."""

    async def stream_response(self, send: Send) -> None:
        """Send the whole answer."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._sent_at = time.monotonic()
        pinging = asyncio.create_task(self._fill_silence(send)) if self._ping else None
        try:
            async with aclosing(self._chunks):
                await self._send_chunks(send)
        finally:
            if pinging is not None:
                pinging.cancel()

    async def _send_chunks(self, send: Send) -> None:
        text, follows = self._first, True
        while True:
            if text:
                self._sent_at = time.monotonic()
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            if not follows:
                break
            text, follows = await self._next()
        self._sent_at = math.inf
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> tuple[str, bool]:
        """Return the next text, and whether others follow."""
        try:
            return self._framing.frame(await anext(self._chunks)), True
        except StopAsyncIteration:
            return self._framing.end, False
        except Exception as error:  # the headers are sent: the stream is the only place to report it
            return self._framing.error(error), False

    async def _fill_silence(self, send: Send) -> None:
        left = self._ping_seconds
        while left < math.inf:
            await asyncio.sleep(left)
            left = self._sent_at + self._ping_seconds - time.monotonic()
            if left <= 0:
                text = self._ping if isinstance(self._ping, str) else event(self._ping())
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                left = self._ping_seconds
