"""Server-sent events (the HTML standard, section 9.2): the only place that knows how a stream is framed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Send

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
    chunks: AsyncGenerator[BaseModel], ping_seconds: float = PING_SECONDS, *, ping: BaseModel | None = None
) -> StreamingResponse:
    """``chunks`` as events, then ``[DONE]``. A failure on the way is the last event, in the form of an error.

    ``ping`` is a chunk without content, for clients that cannot read comments (LMDeploy's).
    """
    return _EventStream(_framed(chunks), PING if ping is None else event(ping), ping_seconds)


def named_event_stream(
    events: AsyncGenerator[StreamEvent], ping: str = PING, ping_seconds: float = PING_SECONDS
) -> StreamingResponse:
    """``events`` with their types as names, as Anthropic and OpenAI's responses stream. A failure is the last one."""
    return _EventStream(_named(events), ping, ping_seconds)


async def line_stream(chunks: AsyncGenerator[BaseModel]) -> StreamingResponse:
    """``chunks`` as JSON, one a line, as LMDeploy 0.3 streamed. A failure before the first one is raised."""
    first = await anext(chunks)

    async def lines() -> AsyncGenerator[str]:
        async with aclosing(chunks):
            yield f"{first.model_dump_json()}\n"
            try:
                async for chunk in chunks:
                    yield f"{chunk.model_dump_json()}\n"
            except Exception as error:  # headers are out: this is the only way to tell
                yield error_line(error)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def event(chunk: BaseModel) -> str:
    """One event."""
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def error_event(error: Exception) -> str:
    """How a stream ends that failed on the way."""
    return event(error_reply(error))


def named_error_event(error: Exception) -> str:
    """The same as Anthropic streams."""
    return f"event: error\ndata: {error_reply(error).model_dump_json()}\n\n"


def error_line(error: Exception) -> str:
    """The same in a stream of lines."""
    return f"{error_reply(error).model_dump_json()}\n"


class _EventStream(StreamingResponse):
    """Events, and a ``ping`` whenever none has been sent for so many seconds."""

    def __init__(self, events: AsyncGenerator[str], ping: str, ping_seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._events, self._ping, self._ping_seconds = events, ping, ping_seconds
        self._sent = 0.0
        """When anything was sent last, on the monotonic clock; infinitely late when all has been."""

    async def stream_response(self, send: Send) -> None:
        """The whole answer."""

        async def noted(message: Message) -> None:
            self._sent = time.monotonic() if message.get("more_body", True) else math.inf
            await send(message)

        pinging = asyncio.create_task(self._fill_silence(noted))
        try:
            async with aclosing(self._events):
                await super().stream_response(noted)
        finally:
            pinging.cancel()

    async def _fill_silence(self, send: Send) -> None:
        left = self._ping_seconds
        while left < math.inf:
            await asyncio.sleep(left)
            left = self._sent + self._ping_seconds - time.monotonic()
            if left <= 0:
                await send({"type": "http.response.body", "body": self._ping.encode(), "more_body": True})
                left = self._ping_seconds


async def _framed(chunks: AsyncGenerator[BaseModel]) -> AsyncGenerator[str]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield event(chunk)
        except Exception as error:  # headers are out: this is the only way to tell
            yield error_event(error)
        else:
            yield DONE


async def _named(events: AsyncGenerator[StreamEvent]) -> AsyncGenerator[str]:
    async with aclosing(events):
        try:
            async for made in events:
                yield f"event: {made.type}\n{event(made)}"
        except Exception as error:  # headers are out: this is the only way to tell
            yield named_error_event(error)
